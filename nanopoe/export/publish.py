"""Publish a run: one revision per step, `main` the newest, on the hub or in a folder of git (publish_hub, publish_git).

Each commit holds the digest of all that its export is made from. A revision whose newest commit has the wanted digest
is passed over without an export, so a publish that was killed goes on where it stopped. Any other is exported and
compared file by file, and only files whose digests differ are sent. One export is on this disk at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from nanopoe.checkpoint import open_checkpoint
from nanopoe.checkpoint.cascade import is_delta
from nanopoe.checkpoint.evaluation import evaluation_path
from nanopoe.errors import ConfigError, StorageError
from nanopoe.export.publish_tree import MAIN, Content, Target, branch_of, change_of, contents_of, steps_of
from nanopoe.export.repo import Dtype
from nanopoe.export.run import export_run, scores_of
from nanopoe.export.stage import HUB_ID

PLACE = "nanopoe-published-repo"         # the folder of an export, which its card tells, until it is the repo's id

REVISIONS = """
## Revisions

Every published step is a revision of its own; `main` is the newest. This one is

```python
model = AutoModelForCausalLM.from_pretrained("{repo}", revision="{branch}", trust_remote_code=True, dtype="auto")
```
"""


@dataclass(frozen=True)
class Addition:
    """What goes into a card besides the export's own: `write` puts its pictures into a folder and returns Markdown,
    `digest` is that of all it is made from."""

    digest: str
    write: Callable[[Path], str]


@dataclass(frozen=True)
class Publication:
    """What is published: the run as scripts.export_hf takes it, and the id that the cards tell.

    `addition` makes what a card says of the steps up to its own.
    """

    run: Path
    repo: str
    addition: Callable[[int], Addition]
    dtype: Dtype = "bfloat16"
    parent: str | None = None
    merged: bool = False
    base: Path | None = None

    def __post_init__(self) -> None:
        if is_delta(self.run):
            raise ConfigError("is a delta, which has no steps", self.run, "publish its run, or use scripts.export_hf")
        if self.parent is not None and (os.path.isdir(self.parent) or not HUB_ID.fullmatch(self.parent)):
            raise ConfigError("is no ORG/NAME@REVISION", self.parent,
                              "who loads a published specialist finds its parent on the hub alone: publish that first")

    @cached_property
    def code(self) -> str:
        """The digest of the code that writes exports, their cards and their plots."""
        rooms = Path(__file__).parent, Path(__file__).parents[1] / "report"
        found = hashlib.sha256()
        for path in sorted(path for room in rooms for path in room.rglob("*") if path.suffix in (".py", ".jinja")):
            found.update(path.read_bytes())
        return found.hexdigest()

    def source(self, step: int) -> str:
        """SHA-256 over all that the revision of a step is made from."""
        record = evaluation_path(self.run, step)
        scores = hashlib.sha256(record.read_bytes()).hexdigest() if record.exists() else None
        facts = [open_checkpoint(self.run, step).identity, scores, self.dtype, self.parent, self.merged, self.repo,
                 self.code, self.addition(step).digest]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def calibrated(self, step: int) -> bool:
        return bool((scores_of(self.run, step) or {}).get("calibration"))

    @contextmanager
    def exported(self, step: int) -> Iterator[Path]:
        """The files of a revision, for as long as the block runs. Errors as of export_run."""
        try:
            with tempfile.TemporaryDirectory(prefix="nanopoe-publish-", ignore_cleanup_errors=True) as top:
                out, _ = export_run(self.run, Path(top) / PLACE, step=step, dtype=self.dtype, parent=self.parent,
                                    merged=self.merged, base=self.base)
                card = out / "README.md"
                text = card.read_text(encoding="utf-8").replace(PLACE, self.repo)
                text += REVISIONS.format(repo=self.repo, branch=branch_of(step)) + self.addition(step).write(out)
                card.write_text(text, encoding="utf-8")
                yield out
        except StorageError as error:
            if PLACE not in (error.where or ""):
                raise                                    # of the target
            raise no_room(error.what) from error
        except OSError as error:
            raise no_room(f"cannot write the export: {error.strerror or error}") from error


def no_room(what: str) -> StorageError:
    return StorageError(what, tempfile.gettempdir(), "free space there, or name a folder with space in TMPDIR")


@dataclass(frozen=True)
class Outcome:
    """What became of a revision: files and bytes that were sent, or would be; `fresh` bytes are new to the repository.

    `there`: nothing had to be sent.
    """

    branch: str
    step: int
    calibrated: bool
    files: int = 0
    bytes: int = 0
    fresh: int = 0
    removed: int = 0

    @property
    def there(self) -> bool:
        return not self.files and not self.removed


def publish(what: Publication, target: Target, steps: Sequence[int], *, dry_run: bool = False,
            show: Callable[[str], None] = lambda doing: None) -> Iterator[Outcome]:
    """Bring the revisions of `steps`, ascending, and `main` up to date, each told when it is; nothing of a dry run.

    `main` becomes the newest of these steps unless the target has a newer one. `show` is told what is being done.
    Errors are those of the export and of the target; what was told is done.
    """
    there = target.branches()
    newest = max([*steps, *steps_of(there)])
    known: set[Content] = set()
    for step in steps:
        show(f"step {step}: looking at what is there")
        branches = [branch_of(step), *[MAIN] * (step == newest)]
        calibrated, source = what.calibrated(step), what.source(step)
        due = [branch for branch in branches if branch not in there or target.source(branch) != source]
        yield from (Outcome(branch, step, calibrated) for branch in branches if branch not in due)
        if due:
            show(f"step {step}: exporting")
            with what.exported(step) as folder:
                wanted = contents_of(folder)
                for branch in due:
                    held = target.tree(branch) if branch in there else {}
                    change = change_of(wanted, held, {*known, *held.values()})
                    outcome = Outcome(branch, step, calibrated, len(change.write),
                                      sum(one.size for one in change.write.values()), change.fresh, len(change.remove))
                    if not change.empty and not dry_run:
                        show(f"step {step}: sending {outcome.files} files to {branch}")
                        target.commit(branch, folder, change, title_of(what, step), source)
                    known |= {*wanted.values(), *held.values()}
                    yield outcome


def title_of(what: Publication, step: int) -> str:
    return f"{open_checkpoint(what.run, step).experiment.name}, step {step}"
