"""Report on runs: the trajectory of evaluated steps as tables and plots, in Markdown and as one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

from nanopoe.checkpoint import list_steps, open_checkpoint
from nanopoe.checkpoint.evaluation import parse_steps
from nanopoe.errors import CheckpointError, ConfigError, StorageError, entrypoint
from nanopoe.report.runs import RunStory, choose, load_run
from nanopoe.report.tables import comparison_table
from nanopoe.report.write import write_report

EXAMPLES = """examples:
  python -m scripts.report out/quickstart                              into out/quickstart/report
  python -m scripts.report out/poe_3b --steps 83923,100000-134723 --out out/second_cycle
  python -m scripts.report out/small_bp out/small_poe --out out/comparison
  python -m scripts.report out/sft_tool out/stage_tool_quickstart --out out/comparison

reads RUN/metrics.jsonl, RUN/evaluation/step_*.json (scripts.evaluate, scripts.calibrate) and tools_step_*.jsonl
(scripts.evaluate_tools)
writes report.html, one page that needs no network, report.md, and its pictures as PNG files"""


def read(path: Path) -> RunStory:
    """A run with its experiment, which its newest checkpoint knows; a run can be looked at without."""
    experiment, unknown, lineage = None, "there is no checkpoint", []
    if list_steps(path):
        try:
            newest = open_checkpoint(path)
            experiment, lineage = newest.experiment, newest.state.get("lineage", [])
        except CheckpointError as error:
            unknown = f"the newest checkpoint {error.what}"
    return load_run(path, experiment, unknown, lineage)


@entrypoint
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.report", description=__doc__, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder to write (default, for one run: RUN/report)")
    parser.add_argument("--steps", metavar="LIST", help="evaluated steps to show, such as 100,200-600 (default: all)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    if args.out is None and len(args.runs) > 1:
        raise ConfigError("a report of several runs needs a folder", "--out", "name one")
    wanted = parse_steps(args.steps) if args.steps is not None else None
    runs = [read(path) for path in args.runs]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ConfigError(f"two runs of one name among {', '.join(names)}", do="rename a run folder")
    runs = runs if wanted is None else choose(runs, wanted)
    out = args.out or args.runs[0] / "report"
    try:
        written = write_report(runs, out)
    except OSError as error:
        raise StorageError(f"cannot be written ({error.strerror or error})", out,
                           "free space or choose another --out") from error
    evaluations = {run.name: run.newest for run in runs if run.newest}
    if evaluations:
        from rich.console import Console

        Console(highlight=False, width=160).print(comparison_table(evaluations))
    print(f"written to {out}: {', '.join(written)}")


if __name__ == "__main__":
    main()
