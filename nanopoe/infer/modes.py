"""Modes by name, as commands take them, with the calibrated figures of a checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nanopoe.errors import ConfigError
from nanopoe.infer.calibrate import LEAD_MAX, LEAD_P99, MAX, P99
from nanopoe.infer.cascade import Route
from nanopoe.infer.depth import Routed, Wand
from nanopoe.infer.engine import Engine, Mode
from nanopoe.infer.sampling import Sampling
from nanopoe.infer.speculative import Speculative
from nanopoe.infer.views import Composition
from nanopoe.infer.weights import Weights
from nanopoe.model.pool import View

BOUNDS = {"lead": LEAD_MAX, "lead_p99": LEAD_P99, "max": MAX, "p99": P99}

MODES = """modes:
  full                 the pool of all stages
  stage:K prefix:N     one stage alone (from 0), or the first N pooled
  compose:0=1,3=2      chosen stages, stage=weight; of a cascade also compose:base=1,NAME=2
  wand                 adaptive depth: greedy, leaves as soon as later stages cannot change the token
  speculative          stage 0 drafts, the pool verifies: the same text, sooner
  routed               stage 0 answers where it is confident: greedy
of a cascade, a base with specialists, whose full is the last of them:
  base                 the base, as if nothing stood on it
  specialist[:NAME]    one of them (default: the last)
  dual[:NAME]          the base and one of them pooled, with equal weights
  route                the one of all these experts for whom the prompt has the lowest perplexity"""

OF_A_BASE = ("wand", "speculative", "routed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--mode and what goes with it, and how tokens are drawn."""
    parser.add_argument("--mode", default="full", help="see below [full]")
    parser.add_argument("--bounds", choices=tuple(BOUNDS), default="lead",
                        help="wand: what the lead of a token lost in calibration (lead) or the range of all changes "
                             "(max), of all calibration tokens; or of 99 %% of them (lead_p99, p99), sooner and less "
                             "sure [lead]")
    parser.add_argument("--drafts", default="auto", metavar="M",
                        help="speculative: tokens a round, or auto: as long as it pays [auto]")
    parser.add_argument("--drafter", type=int, default=1, metavar="N", help="speculative: the first N stages draft [1]")
    parser.add_argument("--threshold", type=float, help="routed: confidence of stage 0 (default: the calibrated one)")
    parser.add_argument("--alpha", type=float, default=0.0, help="pool K^alpha * mean_k l_k [0]")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy [0]")
    parser.add_argument("--top-k", type=int, help="draw from the so many most probable tokens")
    parser.add_argument("--top-p", type=float, help="draw from the fewest tokens that hold this probability")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1: old tokens are rarer [1]")
    parser.add_argument("--seed", type=int, default=0, help="of sampling [0]")


def sampling_of(args: argparse.Namespace) -> Sampling:
    return Sampling(args.temperature, args.top_k, args.seed, args.top_p, args.repetition_penalty)


@dataclass(frozen=True)
class Choice:
    """What --mode stands for: an engine of the right view, and a mode or None."""

    engine: Engine
    mode: Mode | None


def choose(weights: Weights, args: argparse.Namespace, calibration: Callable[[], dict[str, Any]]) -> Choice:
    """`calibration` is called only if the mode needs it. ConfigError for an unknown mode or one the model lacks."""
    view: View | Composition = View()
    mode: Mode | None = None
    if weights.names and args.mode in OF_A_BASE:
        raise ConfigError(f"{args.mode} is of a base alone, and this one has specialists", "--mode",
                          "give the base's own run, without --with")
    if args.mode.startswith("compose:"):
        view = Composition.parse(args.mode.removeprefix("compose:"))
    elif args.mode == "wand":
        Wand.check_request(weights.config, sampling_of(args), args.alpha)
        mode = Wand(_bounds(args, calibration), lead=args.bounds.startswith("lead"))
    elif args.mode == "routed":
        Routed.check_request(weights.config, sampling_of(args), args.alpha)
        mode = Routed(_threshold(args, calibration))
    elif args.mode == "route":
        mode = Route()
    elif args.mode == "speculative":
        mode = Speculative(_drafts(args.drafts), args.drafter)
    else:
        try:
            view = View.parse(args.mode)
        except ConfigError:
            raise ConfigError(f"unknown mode {args.mode!r}", "--mode", "use full, stage:K, prefix:N, compose:K=W,.., "
                              "wand, speculative or routed; of a cascade base, specialist[:NAME], dual[:NAME] or "
                              "route") from None
    engine = Engine(weights, view, alpha=args.alpha)
    if mode is not None:
        mode.check(weights.config, weights.n_stages, sampling_of(args), args.alpha)
    return Choice(engine, mode)


def _bounds(args: argparse.Namespace, calibration: Callable[[], dict[str, Any]]) -> list[float]:
    found = calibration().get(BOUNDS[args.bounds])
    if not isinstance(found, list) or not all(isinstance(b, float) for b in found):
        raise ConfigError(f"the calibration has no {args.bounds} bounds", "--mode wand", "run scripts.calibrate again")
    return found


def _threshold(args: argparse.Namespace, calibration: Callable[[], dict[str, Any]]) -> float:
    if args.threshold is not None:
        return float(args.threshold)
    routing = calibration().get("routing")
    if not isinstance(routing, dict) or not isinstance(routing.get("threshold", ""), float | None):
        raise ConfigError("the calibration has no routing threshold", "--mode routed", "run scripts.calibrate again")
    return float("inf") if routing["threshold"] is None else routing["threshold"]


def _drafts(text: str) -> int | None:
    if text == "auto":
        return None
    if not (text.isascii() and text.isdecimal()):
        raise ConfigError(f"expected a number or auto, got {text!r}", "--drafts")
    return int(text)
