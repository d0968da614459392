"""Train the experiment of a YAML file, from its newest checkpoint on if there is one."""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nanopoe.errors import ConfigError, entrypoint, everywhere, report, set_error_log
from nanopoe.train.signals import Signals

if TYPE_CHECKING:                    # the rest is imported where it is needed, when signals are already heard
    from nanopoe.config import Experiment

EXAMPLES = """examples:
  python -m scripts.train configs/quickstart.yaml
  python -m scripts.train configs/small_poe.yaml schedule.cycles.0.steps=150 run_dir=out/short
  torchrun --nproc_per_node=8 -m scripts.train configs/poe_1p3b.yaml
  python -m scripts.train configs/quickstart.yaml resume.step=200

signals: SIGTERM, SIGINT (Ctrl-C) and SIGUSR1, to any rank or to torchrun, save and stop all ranks; once more after 2 s
  leaves at once, unsaved. SIGUSR2 writes the stacks of a rank into its log.

exit codes: 0 done, 2 config, 3 data, 4 checkpoint, 5 numerics, 6 lost peer, 7 storage, 75 preempted: saved, start again
  to go on; 128 + signal: left at once. torchrun turns all but 0 into 1: RUN/status.json has the code, the reason and
  the command to go on."""


@entrypoint
def main() -> int:
    with Signals() as signals:
        args = arguments()
        experiment = load(args.config, args.overrides)
        log = Path(experiment.out) / "logs" / f"rank_{os.environ.get('RANK', '0')}.log"
        set_error_log(log)
        signals.stacks_to(log)
        try:
            return run(experiment, signals)
        finally:
            signals.settle()                                             # whatever comes now, the exit code stands


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.train", description=__doc__, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="experiment file, see configs/")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value", help="changes to it")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args()


def load(config: str, overrides: list[str]) -> Experiment:
    """The experiment; ConfigError, before torch is even imported, if it is none or does not fit the ranks."""
    from nanopoe.config import load_experiment, make_plan

    ranks = os.environ.get("WORLD_SIZE", "1")
    try:
        experiment = load_experiment(config, overrides)
        if ranks.isascii() and ranks.isdecimal():                        # or else `world` refuses it
            make_plan(experiment, int(ranks))
        return experiment
    except ConfigError as error:
        raise everywhere(error) from None


def run(experiment: Experiment, signals: Signals) -> int:
    """Train; the exit code. The last line on the console is the command to go on, where something is left to do."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")                # a lost rank is told by us, in one line
    from nanopoe.dist import environment_world, when_lost, world
    from nanopoe.train.loop import train
    from nanopoe.train.status import Status, fail, resume_command

    rank, _, size = environment_world()
    status = Status(experiment.out, rank, size, resume_command("scripts.train", sys.argv[1:], os.environ))
    when_lost(partial(fail, status))
    try:
        with world(experiment.runtime.device, experiment.runtime.timeout_s) as here:
            train(experiment, here, signals, status)
    except Exception as error:
        report(error)
        fail(status, error)
        raise
    if status.state == "preempted" and rank == 0:
        print(f"to go on: {status.resume}", flush=True)
    return status.exit_code or 0


if __name__ == "__main__":
    main()
