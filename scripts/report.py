"""Draw the curves of runs and compare their evaluations."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nanopoe.checkpoint import list_steps, open_checkpoint
from nanopoe.errors import ConfigError, StorageError, entrypoint
from nanopoe.report.plots import plot_comparison, plot_curves
from nanopoe.report.runs import RunStory, load_run
from nanopoe.report.tables import comparison_markdown, comparison_table

EXAMPLES = """examples:
  python -m scripts.report out/quickstart --out out/quickstart/report
  python -m scripts.report out/small_bp out/small_poe out/small_poe_heads --out out/comparison

writes for one run curves.png and comparison.md, for several curves_RUN.png each, comparison.png and comparison.md"""


def read(path: Path) -> RunStory:
    """A run with the phases of its schedule, which its newest checkpoint knows."""
    return load_run(path, open_checkpoint(path).experiment if list_steps(path) else None)


def write(runs: list[RunStory], evaluations: dict[str, dict[str, Any]], out: Path) -> list[str]:
    """All files of the report into `out`; their names."""
    out.mkdir(parents=True, exist_ok=True)
    written = ["curves.png"] if len(runs) == 1 else [f"curves_{run.name}.png" for run in runs]
    for run, name in zip(runs, written, strict=True):
        plot_curves(run, out / name)
    if len(runs) > 1:
        plot_comparison(runs, out / "comparison.png")
        written.append("comparison.png")
    if evaluations:
        (out / "comparison.md").write_text(comparison_markdown(evaluations), encoding="utf-8")
        written.append("comparison.md")
    return written


@entrypoint
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.report", description=__doc__, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    runs = [read(path) for path in args.runs]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ConfigError(f"two runs of one name among {', '.join(names)}", do="rename a run folder")
    evaluations = {run.name: run.evaluation for run in runs if run.evaluation is not None}
    try:
        written = write(runs, evaluations, args.out)
    except OSError as error:
        raise StorageError(f"cannot be written ({error.strerror or error})", args.out,
                           "free space or choose another --out") from error
    if evaluations:
        from rich.console import Console

        Console(highlight=False, width=160).print(comparison_table(evaluations))
    print(f"written to {args.out}: {', '.join(written)}")


if __name__ == "__main__":
    main()
