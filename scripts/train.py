"""Train the experiment of a YAML file, from its newest checkpoint on if there is one."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from nanopoe.config import load_experiment, make_plan
from nanopoe.errors import ConfigError, entrypoint, everywhere, set_error_log

EXAMPLES = """examples:
  python -m scripts.train configs/quickstart.yaml
  python -m scripts.train configs/small_poe.yaml schedule.cycles.0.steps=150 run_dir=out/short
  torchrun --nproc_per_node=8 -m scripts.train configs/poe_1p3b.yaml
  python -m scripts.train configs/quickstart.yaml resume.step=200

exit codes: 0 done, 2 config, 3 data, 4 checkpoint, 5 numerics, 6 lost peer, 7 storage (torchrun turns all into 1)"""


@entrypoint
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.train", description=__doc__, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="experiment file, see configs/")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value", help="changes to it")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    ranks = os.environ.get("WORLD_SIZE", "1")
    try:
        experiment = load_experiment(args.config, args.overrides)
        if ranks.isascii() and ranks.isdecimal():                        # or else `world` refuses it
            make_plan(experiment, int(ranks))                            # refuse before torch is even imported
    except ConfigError as error:
        raise everywhere(error) from None
    set_error_log(Path(experiment.out) / "logs" / f"rank_{os.environ.get('RANK', '0')}.log")

    from nanopoe.dist import world
    from nanopoe.train.loop import train

    with world(experiment.runtime.device, experiment.runtime.timeout_s) as here:
        train(experiment, here)


if __name__ == "__main__":
    main()
