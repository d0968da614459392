"""Is all as a run of this experiment needs it? Ranks, clocks, run folder, disk, network, data, memory: a row each.

Start it as the training will be started, on the same hosts. It changes nothing and trains no step of the run; the dry
batch is a step of its own, in memory alone. scripts.train makes the cheap checks again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING, Any

from nanopoe.errors import ConfigError, entrypoint, everywhere

if TYPE_CHECKING:
    from nanopoe.train.doctor_exam import Row

EXAMPLES = """examples:
  python -m scripts.doctor configs/quickstart.yaml
  torchrun --nproc_per_node=8 -m scripts.doctor configs/poe_1p3b.yaml
  srun torchrun ... -m scripts.doctor configs/poe_3b.yaml run_dir=shared/poe_3b --json

exit codes: 0 healthy, warnings included; 2 a row in trouble, or no experiment. torchrun turns all but 0 into 1."""
STYLES = {"ok": "green", "warning": "yellow", "trouble": "bold red"}


def print_table(name: str, rows: list[Row], seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    worst = next((state for state in ("trouble", "warning") if any(row.state == state for row in rows)), "healthy")
    table = Table(title=f"{name}: {worst}, {len(rows)} checks in {seconds:.1f} s", title_justify="left")
    for title in ("check", "state", "found", "what to do"):
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(row.check, Text(row.state, STYLES[row.state]), Text(row.found), Text(row.do))
    Console().print(table)


def as_json(name: str, rows: list[Row], seconds: float) -> dict[str, Any]:
    return {"name": name, "healthy": all(row.state != "trouble" for row in rows), "seconds": round(seconds, 2),
            "checks": [row.as_dict() for row in rows]}


@entrypoint
def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.doctor", description=__doc__, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="experiment file, see configs/")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value", help="changes to it")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_intermixed_args()
    from nanopoe.config import load_experiment

    try:
        experiment = load_experiment(args.config, args.overrides)
    except ConfigError as error:
        raise everywhere(error) from None
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")                # a lost rank is told by us, in one line
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")                      # the profiler counts memory, and says so
    from nanopoe import dist
    from nanopoe.train.doctor import diagnose

    with dist.world(experiment.runtime.device, experiment.runtime.timeout_s) as world:
        rows = diagnose(experiment, world)
        if world.is_main:
            seconds = sum(row.seconds for row in rows)
            if args.json:
                print(json.dumps(as_json(experiment.name, rows, seconds), indent=2))
            else:
                print_table(experiment.name, rows, seconds)
            sys.stdout.flush()
        dist.barrier()                                                   # torchrun ends all when the first one exits
    return 2 if any(row.state == "trouble" for row in rows) else 0


if __name__ == "__main__":
    main()
