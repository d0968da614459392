"""Hugging Face repos of trained models (SPEC 10): `export` writes one, hub_code/ holds the code that ships in it."""

from nanopoe.export.repo import export

__all__ = ["export"]
