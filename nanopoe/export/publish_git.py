"""Revisions in a bare git repository in a folder: objects written by git's plumbing, no index of yours, no identity.

The same exports make the same commits: author, date and parents hold nothing of the machine or the hour.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from nanopoe.errors import ConfigError, StorageError
from nanopoe.export.publish_tree import MAIN, Change, Content, message, source_in

AUTHOR = {"NAME": "nanopoe", "EMAIL": "nanopoe@localhost", "DATE": "@0 +0000"}
FILE = "100644"
MAKING = "nanopoe-making"                # a file in the folder until the repository is whole


class GitTarget:
    """The folder is made by the first commit. ConfigError for one in use that is no bare repository, or without git."""

    def __init__(self, folder: Path):
        self.folder, self.label = folder, str(folder)
        if shutil.which("git") is None:
            raise ConfigError("git is not installed", "--to", "install git, or publish with --repo alone")
        self.begun = (folder / MAKING).is_file()                 # by a publish that was killed, or had no room
        self.made = not self.begun and folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
        if self.made and not ((folder / "HEAD").is_file() and (folder / "objects").is_dir()):
            raise ConfigError("is in use, and is not a bare git repository", folder, "choose a new or empty folder")

    def branches(self) -> list[str]:
        if not self.made:
            return []
        return self._git("for-each-ref", "--format=%(refname:strip=2)", "refs/heads").splitlines()

    def source(self, branch: str) -> str | None:
        return source_in(self._git("log", "-1", "--format=%B", f"refs/heads/{branch}", "--"))

    def tree(self, branch: str) -> dict[str, Content]:
        found = {}
        for line in self._git("ls-tree", "-r", "-l", "-z", f"refs/heads/{branch}").split("\0")[:-1]:
            facts, path = line.split("\t", 1)
            _, kind, oid, size = facts.split()
            if kind == "blob":
                found[path] = Content(int(size), oid)
        return found

    def commit(self, branch: str, folder: Path, change: Change, title: str, source: str) -> None:
        if not self.made:
            self._make()
        before = [self._git("rev-parse", f"refs/heads/{branch}").strip()] if branch in self.branches() else []
        lines = [f"{FILE} {self._blob(folder / path)}\t{path}" for path in change.write]
        lines += [f"0 {'0' * 40}\t{path}" for path in change.remove]
        with tempfile.TemporaryDirectory(prefix="nanopoe-index-") as top:
            index = str(Path(top) / "index")
            self._git("read-tree", *(before or ["--empty"]), index=index)
            self._git("update-index", "-z", "--index-info", text="".join(f"{line}\0" for line in lines), index=index)
            tree = self._git("write-tree", index=index).strip()
        parents = [word for commit in before for word in ("-p", commit)]
        made = self._git("commit-tree", tree, *parents, text=message(title, source)).strip()
        self._git("update-ref", f"refs/heads/{branch}", made, *(before or ["0" * 40]))

    def _make(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self.folder.iterdir() if self.begun else ():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != MAKING:
                    path.unlink()
            (self.folder / MAKING).touch()
            self.begun = True
            self._git("init", "--quiet", "--bare", "--object-format=sha1", "--template=", f"--initial-branch={MAIN}")
            (self.folder / MAKING).unlink()
        except OSError as error:
            raise self._refused(error.strerror or str(error)) from error
        self.made = True

    def _blob(self, path: Path) -> str:
        """Write a file as it is. Weights do not get smaller by being compressed."""
        squeeze = ["-c", "core.compression=0"] if path.suffix == ".safetensors" else []
        return self._git(*squeeze, "hash-object", "-w", "--no-filters", "--", str(path)).strip()

    def _git(self, *words: str, text: str = "", index: str | None = None) -> str:
        """What a command of git says. It sees neither your configuration nor a repository around the folder."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_") and name != "HF_TOKEN"}
        who = {f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in AUTHOR.items()}
        if index is not None:
            kept["GIT_INDEX_FILE"] = index
        done = subprocess.run(
            ["git", *words], input=text.encode(), capture_output=True,
            env={**kept, **who, "GIT_DIR": str(self.folder.absolute()), "GIT_CONFIG_GLOBAL": os.devnull,
                 "GIT_CONFIG_NOSYSTEM": "1", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"})
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
            told = next((line for line in said if line.startswith(("fatal:", "error:"))), said[-1])
            locked = ".lock': File exists" in told               # by a git that was killed
            raise self._refused(f"git: {told[:400]}", "remove that file if no other git works there" if locked else "")
        return done.stdout.decode(errors="surrogateescape")      # of others: no name of ours holds any

    def _refused(self, what: str, do: str = "") -> StorageError:
        return StorageError(f"cannot be written or read ({what})", self.folder,
                            f"{do or 'free space or check the rights'}, and run the same command again")
