"""Muon for matrices, AdamW for the rest, state sharded: kernels (math), groups (who is what), dist_* (who has what)."""

from nanopoe.optim.dist_muon_adamw import DistMuonAdamW
from nanopoe.optim.groups import Group, build_groups

__all__ = ["DistMuonAdamW", "Group", "build_groups"]
