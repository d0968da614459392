"""Strict YAML -> a frozen Experiment; the plan and the counts that follow from it. No torch in this package."""

from nanopoe.config.layout import Layout, layout_of
from nanopoe.config.load import config_hash, dump_experiment, experiment_from_dict, load_experiment
from nanopoe.config.plan import Plan, make_plan, valid_world_sizes
from nanopoe.config.schema import Experiment, ModelConfig, ObjectiveConfig

__all__ = ["Experiment", "Layout", "ModelConfig", "ObjectiveConfig", "Plan", "config_hash", "dump_experiment",
           "experiment_from_dict", "layout_of", "load_experiment", "make_plan", "valid_world_sizes"]
