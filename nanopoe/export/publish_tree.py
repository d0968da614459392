"""What a published revision holds, and what an export would change of it.

A revision is a branch: `step-084000` of a step, `main` of the newest one. A file that is there is known by the SHA-1
git gives a blob, or by the SHA-256 of its content where the hub keeps it apart from git (LFS).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

MAIN = "main"
REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
BRANCH = re.compile(r"step-(\d{6,18})")
FIGURES = "figures"                      # the pictures of the card
# What an export may have written that the next one may not: two sets of weights in one repo would be ambiguous.
OURS = re.compile(rf"(?:model(?:-\d{{5}}-of-\d{{5}})?|delta)\.safetensors|model\.safetensors\.index\.json|{FIGURES}/.+")
SOURCE = "nanopoe-source: "              # in the message of a commit: the digest of all that its export is made from
CHUNK = 1 << 20


@dataclass(frozen=True)
class Content:
    """A file's size in bytes and its digests, in hex; a revision knows one of the two, a file on this disk both."""

    size: int
    oid: str | None = None               # git's of the blob
    sha256: str | None = None

    def same(self, other: Content) -> bool:
        known = [(a, b) for a, b in ((self.sha256, other.sha256), (self.oid, other.oid)) if a and b]
        return self.size == other.size and bool(known) and all(a == b for a, b in known)


@dataclass(frozen=True)
class Change:
    """What makes a revision the export: files to write, with their content, and those of an earlier export to remove;
    `fresh` are the bytes written whose content is nowhere else in the repository, as far as it was looked at."""

    write: dict[str, Content]
    remove: list[str]
    fresh: int

    @property
    def empty(self) -> bool:
        return not self.write and not self.remove


class Target(Protocol):
    """A repository of revisions: the hub's, or a folder of git's."""

    label: str

    def branches(self) -> Collection[str]:
        """The branches there are; none where there is no repository yet."""

    def source(self, branch: str) -> str | None:
        """The digest in the message of a branch's newest commit; None of a commit that is not ours."""

    def tree(self, branch: str) -> dict[str, Content]:
        """Every file of a branch by its path."""

    def commit(self, branch: str, folder: Path, change: Change, title: str, source: str) -> None:
        """Make the change, as one commit, all or nothing; a branch that is not there begins with it."""


def branch_of(step: int) -> str:
    return f"step-{step:06d}"


def steps_of(branches: Collection[str]) -> list[int]:
    return sorted(int(match[1]) for branch in branches if (match := BRANCH.fullmatch(branch)))


def message(title: str, source: str) -> str:
    return f"{title}\n\n{SOURCE}{source}\n"


def source_in(text: str) -> str | None:
    """The digest that a commit's message holds."""
    match = re.search(rf"^{SOURCE}([0-9a-f]{{64}})$", text, re.MULTILINE)
    return match[1] if match else None


def content_of(path: Path) -> Content:
    size = path.stat().st_size
    blob, plain = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False), hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            blob.update(chunk)
            plain.update(chunk)
    return Content(size, blob.hexdigest(), plain.hexdigest())


def contents_of(folder: Path) -> dict[str, Content]:
    """Every file below a folder by its path there."""
    return {path.relative_to(folder).as_posix(): content_of(path) for path in sorted(folder.rglob("*"))
            if path.is_file()}


def change_of(wanted: Mapping[str, Content], there: Mapping[str, Content], known: Collection[Content]) -> Change:
    """From what is there to what is wanted; `known` is content the repository has elsewhere.

    Files that no export writes, a license for one, stay.
    """
    write = {path: content for path, content in wanted.items()
             if path not in there or not content.same(there[path])}
    remove = sorted(path for path in there if path not in wanted and OURS.fullmatch(path))
    fresh = {content for content in write.values() if not any(content.same(one) for one in known)}
    return Change(write, remove, sum(content.size for content in fresh))
