"""Inference: the generation engine; adaptive depth, speculation and routing build on it."""
