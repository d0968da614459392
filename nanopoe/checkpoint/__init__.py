"""Checkpoints: step folders that are whole or absent, readable by any world size.

container and format are the files; store finds, opens and reads; commit saves and rotates, saver does it beside
training; lock keeps a second job out; compare and inspect are for people.
"""

from nanopoe.checkpoint.commit import Saved, Target, clean, rotate, save_checkpoint, set_aside_after, set_bad
from nanopoe.checkpoint.compare import digest
from nanopoe.checkpoint.lock import run_lock
from nanopoe.checkpoint.saver import Outcome, Saver
from nanopoe.checkpoint.store import Checkpoint, folder_of, list_steps, open_checkpoint, open_tokenizer, step_before

__all__ = ["Checkpoint", "Outcome", "Saved", "Saver", "Target", "clean", "digest", "folder_of", "list_steps",
           "open_checkpoint", "open_tokenizer", "rotate", "run_lock", "save_checkpoint", "set_aside_after", "set_bad",
           "step_before"]
