"""Check an experiment file, in well under a second and without importing torch.

Exit code 0 and a summary if it (each of them) can be run, 2 and a line per problem if not.
"""

from __future__ import annotations

import argparse
import math

from nanopoe.config import Experiment, layout_of, load_experiment, make_plan, valid_world_sizes
from nanopoe.config.counts import count_parameters, trained_shapes
from nanopoe.errors import ConfigError, entrypoint, report

EXAMPLES = """examples:
  python -m scripts.check_config configs/poe_3b.yaml --world-size 12
  python -m scripts.check_config configs/quickstart.yaml seed=7 schedule.cycles.0.steps=400
  python -m scripts.check_config configs/*.yaml
  python -m scripts.check_config configs/poe_3b.yaml 'model.poe_stage_layers=[16,6,5,5]'"""


def summary(exp: Experiment, world_size: int) -> list[str]:
    """What the experiment amounts to, a line each. Raises ConfigError for a world size that does not fit."""
    plan, counts, layout = make_plan(exp, world_size), count_parameters(exp.model), layout_of(exp.model)
    ends = ", ".join(map(str, layout.boundaries))
    return [
        f"parameters   {counts.total:,} in {counts.tensors} tensors",
        f"task         {task_of(exp)}",
        f"stages       {layout.n_stages} ({exp.model.poe_mode}), ending with layer {ends}",
        f"schedule     {plan.total_steps:,} steps in {len(exp.schedule.cycles)} cycles",
        f"tokens       {plan.total_tokens:,} = {plan.total_steps:,} x {plan.tokens_per_step:,}",
        f"step         {plan.micro_steps} x {plan.device_batch_size} rows of {plan.sequence_len} on {world_size} ranks"
        + (f" = {plan.grid()}" if plan.stages else ""),
        f"ranks        {', '.join(map(str, valid_world_sizes(exp)))} are valid",
        f"output       {exp.out}",
    ]


def task_of(exp: Experiment) -> str:
    """What is trained, and on what."""
    if exp.specialist is not None:
        trained = sum(map(math.prod, trained_shapes(exp.model).values()))
        return f"specialist of {exp.model.specialists[-1].n_layer} layers on {exp.specialist.base}, trains {trained:,}"
    if exp.init_from is None:
        return exp.task
    if exp.task == "sft":
        return f"sft of {exp.init_from.path}"
    return f"pretrain from {exp.init_from.path}, {'with' if exp.init_from.optimizer else 'without'} its optimizer"


@entrypoint
def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.check_config", description=__doc__, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="experiment file (YAML)")
    parser.add_argument("more", nargs="*", default=[], metavar="file | key.sub=value",
                        help="more files; keys to set in all of them, list items by index")
    parser.add_argument("--world-size", type=int, metavar="N", help="ranks to plan for (default: parallel.stages)")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_intermixed_args()
    files = [args.file, *(arg for arg in args.more if "=" not in arg)]
    code = 0
    for file in files:
        try:
            exp = load_experiment(file, [arg for arg in args.more if "=" in arg])
            lines = summary(exp, args.world_size or exp.parallel.stages)
            print("\n".join([f"ok {file}", *("  " + line for line in lines)]))
        except ConfigError as error:                  # the other files still get their answer
            report(error)
            code = error.exit_code
    return code


if __name__ == "__main__":
    main()
