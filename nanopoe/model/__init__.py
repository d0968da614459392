"""The model: GPT trunk in stages, heads, losses, pool. Read gpt.py first, then stages.py, loss.py, pool.py."""

from nanopoe.model.gpt import GPT

__all__ = ["GPT"]
