"""Checkpoints: step folders that are whole or absent, readable by any world size (format.py), and their store."""

from nanopoe.checkpoint.store import Checkpoint, list_steps, open_checkpoint, open_tokenizer, save_checkpoint

__all__ = ["Checkpoint", "list_steps", "open_checkpoint", "open_tokenizer", "save_checkpoint"]
