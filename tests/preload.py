"""Imported once by the fork server of the tests (tests.ranks.forked): what its children would import themselves."""

import gc
import importlib

from nanopoe.train import compute

for name in ("torch._dynamo", "transformers.models.auto.modeling_auto", "matplotlib.pyplot", "pytest", "hypothesis",
             "nanopoe.train.loop", "nanopoe.train.evaluate", "nanopoe.export.run", "nanopoe.report.plots",
             "nanopoe.infer.measure", "tests.ranks"):
    importlib.import_module(name)
compute.PEAK_S = 0.0         # as in conftest
gc.collect()
gc.freeze()                  # a collection in a child would otherwise write to the pages it shares, and so copy them
