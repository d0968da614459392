"""nanopoe: training of Product-of-Experts language models. Layers of the package: see README, "The house"."""

__version__ = "0.1.0"
