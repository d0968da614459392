"""Calibrate a checkpoint with other options than scripts.evaluate: bounds of adaptive depth, routing threshold."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from nanopoe.errors import ConfigError, entrypoint

EXAMPLES = """examples:
  python -m scripts.calibrate out/quickstart                         the newest checkpoint
  python -m scripts.calibrate out/poe_1p3b --step 20000 --tokens 131072 --device cuda
  python -m scripts.calibrate out/quickstart --routing agreement --cap 0.05 --json | jq .routing

replaces `calibration` in RUN/evaluation/step_NNNNNNNN.json, which generate, chat and export_hf read; evaluates the
step first if that was not done, and scripts.evaluate --again puts the default back.
Its keys: nanopoe.infer.calibrate.calibration"""


@entrypoint
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.calibrate", description=__doc__, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--step", type=int, help="checkpoint to calibrate (default: the newest)")
    parser.add_argument("--tokens", type=int, default=131072, help="of the validation split [131072]")
    parser.add_argument("--routing", choices=("target_regression", "agreement", "nll"), default="target_regression",
                        help="what routing must not cost [target_regression]")
    parser.add_argument("--cap", type=float, default=0.020, help="how much of it a confidence may cost [0.020]")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    if args.tokens < 1:
        raise ConfigError(f"must be 1 or more, got {args.tokens}", "--tokens")
    if not 0 <= args.cap < float("inf"):
        raise ConfigError(f"must be 0 or more, got {args.cap}", "--cap")

    from nanopoe.checkpoint.evaluation import (
        evaluation_path,
        is_of,
        read_evaluation,
        save_calibration,
        save_evaluation,
    )
    from nanopoe.dist import world
    from nanopoe.infer.calibrate import calibrate
    from nanopoe.infer.depth import check_poe
    from nanopoe.infer.modes import BOUNDS
    from nanopoe.report.tables import evaluation_markdown
    from nanopoe.train.build import validation
    from nanopoe.train.restore import load_trained
    from nanopoe.train.trajectory import Request, evaluate_checkpoint

    with world(args.device) as here:
        if here.size > 1:
            raise ConfigError(f"calibrates on one rank, not {here.size}", "torchrun",
                              "start it with python -m scripts.calibrate")
        model, tokenizer, checkpoint = load_trained(args.run, args.step, here)
        check_poe(model.config, str(args.run))
        if model.config.specialists:
            raise ConfigError("is a specialist; the modes belong to its base", args.run, "calibrate the base's own run")
        path = evaluation_path(args.run, checkpoint.step)
        if not (path.exists() and is_of(read_evaluation(path), checkpoint.identity)):
            result = evaluate_checkpoint(args.run, checkpoint.step, Request(speed=False), here)
            save_evaluation(args.run, result, evaluation_markdown(result, f"{result['run']}, step {result['step']}"))
        rows = validation(checkpoint.experiment, tokenizer, here, args.tokens)
        found = calibrate(model, rows, mode=args.routing, cap=args.cap)
    path = save_calibration(args.run, checkpoint.step, found)
    if args.json:
        print(json.dumps(found, indent=1))
        return
    r = found["routing"]
    print(f"{args.run}, step {checkpoint.step}, {found['tokens']:,} tokens")
    for name, bounds in ((name, found[key]) for name, key in BOUNDS.items()):
        w = found["wand"][name]
        print(f"bounds {name:9} {'  '.join(f'{b:.4f}' for b in bounds)}   exits "
              f"{' '.join(f'{e:.1%}' for e in w['exits'])}   "
              f"agreement {w['agreement']:.2%}   predicted {w['predicted_speedup']:.2f}x")
    threshold = "none" if r["threshold"] is None else f"{r['threshold']:.4f}"
    print(f"routing {r['mode']} at {r['cap']:g}: threshold {threshold}   routed {r['routed']:.1%}   regression "
          f"{r['regression']:.4f}   agreement {r['agreement']:.2%}   projected {r['projected_speedup']:.2f}x")
    print(f"saved in {path}")


if __name__ == "__main__":
    main()
