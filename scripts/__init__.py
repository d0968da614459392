"""Verbs: python -m scripts.<name> --help."""
