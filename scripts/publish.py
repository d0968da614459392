"""Publish a run: one revision per step on the Hugging Face hub, or in a local git repository; `main` is the newest."""

from __future__ import annotations

import argparse
import hashlib
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nanopoe.errors import ConfigError, entrypoint

if TYPE_CHECKING:
    from nanopoe.export.publish import Addition, Outcome
    from nanopoe.export.publish_tree import Target
    from nanopoe.report.runs import RunStory

EXAMPLES = """examples:
  python -m scripts.publish out/poe_3b --repo me/poe-3b --dry-run         what would go where, in bytes
  python -m scripts.publish out/poe_3b --repo me/poe-3b --private         every step; again: only what is new
  python -m scripts.publish out/poe_3b --repo me/poe-3b --steps 84000,100000-134000
  python -m scripts.publish out/poe_3b --repo me/poe-3b --to hub/poe-3b   the same into a bare git repository
  git clone --branch step-084000 hub/poe-3b there                         .. and a revision out of it
  python -m scripts.publish out/tool --repo me/tool --parent me/poe-3b@step-134000      a specialist: its delta alone
  python -m scripts.publish out/tool --repo me/tool-whole --merged                      .. with all that it stands on

A step that scripts.evaluate has evaluated comes with its own scores and calibrated bounds; every card shows the steps
up to its own. Exports are made one at a time in a temporary folder (TMPDIR). What was killed goes on where it stopped.
environment: HF_TOKEN (the token is read from there alone), HF_ENDPOINT (another hub), HF_HUB_DISABLE_XET=1 (plain LFS
uploads)"""


NAME = re.compile(r'[^"\\`]+')           # it stands in a line of Python, in Markdown
# Of a report, what a reader of a card may want; the rest is of the machine, or in the card as it is.
PICTURES = ("trajectory", "curves", "depth")
SECTIONS = ("Trajectory", "Training", "Tool calls", "Adaptive depth", "Routing")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.publish", description=__doc__, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--repo", metavar="ORG/NAME", help="model repo on the hub, made if it is not there")
    parser.add_argument("--to", type=Path, metavar="FOLDER",
                        help="a bare git repository here, in place of the hub; without --repo the cards tell its name")
    parser.add_argument("--steps", default="all", help="all, or steps and ranges as in 100,300-500 (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="export and compare, but send nothing")
    parser.add_argument("--private", action="store_true", help="make the repo private when it is made")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--parent", metavar="ORG/NAME@REVISION",
                        help="of a specialist: what it stands on, published in the same dtype; only the delta is sent")
    parser.add_argument("--merged", action="store_true",
                        help="of a specialist: one model with all that it stands on")
    parser.add_argument("--base", type=Path, metavar="RUN",
                        help="of a specialist: the run it stands on, if that is not where the specialist says")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    if args.repo is None and args.to is None:
        raise ConfigError("nowhere to publish to", "--repo", "give --repo ORG/NAME, or --to FOLDER")
    if args.private and args.to is not None:
        raise ConfigError("is of a repo on the hub", "--private", "leave it out with --to")
    return args


@entrypoint
def main() -> None:
    args = parsed()
    signal.signal(signal.SIGTERM, signal.default_int_handler)        # so that the temporary folder goes

    from nanopoe.checkpoint import list_steps, open_checkpoint
    from nanopoe.checkpoint.evaluation import select_steps
    from nanopoe.checkpoint.store import checkpoints_of
    from nanopoe.export.publish import Publication, publish

    what = Publication(args.run, name_of(args), trajectory_of(args.run), args.dtype, args.parent,
                       args.merged, args.base)
    steps = select_steps(args.steps, list_steps(args.run), checkpoints_of(args.run)) or [open_checkpoint(args.run).step]
    target = target_of(args)
    found: list[Outcome] = []
    with shown(sys.stderr.isatty()) as show:
        for outcome in publish(what, target, steps, dry_run=args.dry_run, show=show):
            found.append(outcome)
            if not args.dry_run:
                print(line_of(outcome), flush=True)
    tell(target.label, found, args.dry_run)


def name_of(args: argparse.Namespace) -> str:
    """What the cards tell: the repo's id, else the folder's name. ConfigError for one that they cannot."""
    from nanopoe.export.publish_tree import REPO

    if args.repo is not None and not REPO.fullmatch(args.repo):
        raise ConfigError(f"expected ORG/NAME, got {args.repo[:100]!r}", "--repo")
    name: str = args.repo or args.to.absolute().name
    if not (name.isprintable() and NAME.fullmatch(name)):
        raise ConfigError(f"the cards cannot tell the name {name[:100]!a}", "--to",
                          "name another folder, or give --repo")
    return name


def target_of(args: argparse.Namespace) -> Target:
    if args.to is not None:
        from nanopoe.export.publish_git import GitTarget

        return GitTarget(args.to)
    from nanopoe.export.publish_hub import HubTarget

    return HubTarget(args.repo, private=args.private)


# -- the trajectory in a card -----------------------------------------------------------------------------------------

def trajectory_of(run: Path) -> Callable[[int], Addition]:
    """What the card of a step says of the steps up to it; nothing of a run that kept no records."""
    from nanopoe.checkpoint import open_checkpoint
    from nanopoe.export.publish import Addition
    from nanopoe.report.runs import load_run, phases_of, read_records, trajectory

    if not (run / "metrics.jsonl").exists() and not any((run / "evaluation").glob("*step_*.json*")):
        return lambda step: Addition("", lambda folder: "")
    whole, records = load_run(run), read_records(run / "evaluation")

    def until(step: int) -> Addition:
        experiment = open_checkpoint(run, step).experiment
        evals = [e for e in whole.evals if e.step <= step]
        story = replace(whole, name=experiment.name, experiment=experiment, phases=phases_of(experiment.schedule),
                        train=[line for line in whole.train if line["step"] <= step], evals=evals, sources={},
                        records=trajectory([r for r in records if r.step <= step], evals), unknown=None,
                        tools=[t for t in whole.tools if t.step <= step])
        return Addition(hashlib.sha256(repr(story).encode()).hexdigest(), partial(write_trajectory, story))

    return until


def write_trajectory(run: RunStory, folder: Path) -> str:
    """The pictures of a run into figures/ of an export; Markdown that shows them, one level below a card's title."""
    from nanopoe.export.publish_tree import FIGURES
    from nanopoe.report.document import Chapter, markdown, run_chapter
    from nanopoe.report.write import plots_of

    (folder / FIGURES).mkdir()
    drawn = {kind: f"{FIGURES}/{kind}.png" for kind, plot in plots_of(run).items()
             if kind in PICTURES and plot(run, folder / FIGURES / f"{kind}.png")}
    if not drawn:
        (folder / FIGURES).rmdir()
    told = [replace(section, text="") for section in run_chapter(run, drawn).sections if section.title in SECTIONS]
    told = [section for section in told if not section.empty]
    text = markdown([Chapter("Over the steps", "", [], told)])
    return "\n" + re.sub(r"^#", "##", text, flags=re.MULTILINE) if told else ""


# -- what is told -----------------------------------------------------------------------------------------------------

@contextmanager
def shown(wanted: bool) -> Iterator[Callable[[str], None]]:
    """What is being done and for how long, on a terminal; elsewhere nothing."""
    if not wanted:
        yield lambda doing: None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda doing: bar.reset(task, description=doing)


def line_of(outcome: Outcome) -> str:
    sent = f"{outcome.files} files of {size(outcome.bytes)}, {size(outcome.fresh)} of it new"
    done = "there already" if outcome.there else sent
    return f"step {outcome.step} -> {outcome.branch}: {done}"


def size(count: int) -> str:
    from rich.filesize import decimal

    return decimal(count)


def tell(label: str, found: list[Outcome], dry_run: bool) -> None:
    """A table of what would be sent, and the last word."""
    from rich.console import Console
    from rich.table import Table

    due = [outcome for outcome in found if not outcome.there]
    if dry_run:
        table = Table("revision", "step", "calibrated", title=label)
        for name in ("files", "bytes", "new bytes", "files removed"):
            table.add_column(name, justify="right")
        for o in found:
            table.add_row(o.branch, str(o.step), "yes" if o.calibrated else "-", *(
                ["there already", "-", "-", "-"] if o.there else
                [str(o.files), f"{o.bytes:,}", f"{o.fresh:,}", str(o.removed)]))
        Console(highlight=False, width=120).print(table)
    steps = len({outcome.step for outcome in found})
    if not due:
        print(f"nothing to do: {label} has {steps} {'step' if steps == 1 else 'steps'} as they are here")
    elif dry_run:
        print(f"nothing was sent; it would be {size(sum(o.fresh for o in due))} in {len(due)} commits to {label}")
    else:
        print(f"published to {label}: {len(due)} of {len(found)} revisions, {size(sum(o.fresh for o in due))} new")


if __name__ == "__main__":
    main()
