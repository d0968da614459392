"""Revisions on the Hugging Face hub, by its own client. The token comes from HF_TOKEN and goes to the client alone."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import disable_progress_bars, logging

from nanopoe.errors import ConfigError, NanopoeError, StorageError
from nanopoe.export.publish_tree import MAIN, REPO, SOURCE, Change, Content, source_in

WAITS = (1.0, 2.0, 4.0)                  # seconds before a request is made again; then it is an error
PASSING = (408, 429, 500, 502, 503, 504)
AGAIN = "run the same command again: it goes on where it stopped"

Answer = TypeVar("Answer")
Operation = CommitOperationAdd | CommitOperationCopy | CommitOperationDelete


class HubTarget:
    """A model repo of the hub, made by the first commit; `private` says how.

    ConfigError for an id that is none, without a token, for a token the hub does not take, or for a repo that is public
    and was to be private; StorageError when the hub does not answer, or refuses.
    """

    def __init__(self, repo: str, *, private: bool = False):
        self.repo, self.label, self.private = repo, repo, private
        if not REPO.fullmatch(repo):
            raise ConfigError(f"expected ORG/NAME, got {repo[:100]!r}", "--repo")
        token = os.environ.get("HF_TOKEN", "").strip()
        if not token:
            raise ConfigError("there is no token", "HF_TOKEN", "set it to a token of the hub that may write, as in "
                              "HF_TOKEN=$(cat FILE) python -m scripts.publish ..; it is read from there alone")
        logging.set_verbosity_error()            # what it would say of a request is said in one line by us
        disable_progress_bars()
        self.api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=token)
        info = self._ask(self._info)
        self.made = info is not None
        if info is not None and private and not info.private:
            raise ConfigError("is public already", repo, "make it private in its settings, or leave out --private")

    def branches(self) -> list[str]:
        if not self.made:
            return []
        return [ref.name for ref in self._ask(lambda: self.api.list_repo_refs(self.repo)).branches]

    def source(self, branch: str) -> str | None:
        return source_in(self._ask(lambda: self._commits(branch))[0].message)

    def tree(self, branch: str) -> dict[str, Content]:
        entries = self._ask(lambda: list(self.api.list_repo_tree(self.repo, revision=branch, recursive=True)))
        return {entry.path: Content(entry.size, sha256=entry.lfs.sha256) if entry.lfs else
                Content(entry.size, oid=entry.blob_id) for entry in entries if isinstance(entry, RepoFile)}

    def commit(self, branch: str, folder: Path, change: Change, title: str, source: str) -> None:
        if not self.made:
            self._ask(lambda: self.api.create_repo(self.repo, private=self.private or None, exist_ok=True))
            self.made = True
        self._ask(lambda: self._commit(branch, folder, change, title, source))

    # -- requests -----------------------------------------------------------------------------------------------

    def _info(self) -> Any:
        try:
            return self.api.model_info(self.repo)
        except RepositoryNotFoundError as error:
            if error.response.status_code == 404:
                return None
            raise                                # 401: of a token, the hub says the same as of a repo it does not show

    def _commits(self, branch: str) -> list[Any]:
        """Newest first; none of a branch that is not there."""
        try:
            return self.api.list_repo_commits(self.repo, revision=branch)
        except RevisionNotFoundError:
            return []

    def _commit(self, branch: str, folder: Path, change: Change, title: str, source: str) -> None:
        """May be repeated: when the answer to a commit was lost, the next try finds the commit."""
        commits = self._commits(branch)
        if commits and source_in(commits[0].message) == source:
            return
        if not commits:                          # from the first commit, which holds nothing of another step
            commits = self._commits(MAIN)[-1:]
            self.api.create_branch(self.repo, branch=branch, revision=commits[0].commit_id, exist_ok=True)
        operations: list[Operation] = [*(CommitOperationAdd(path, folder / path) for path in change.write),
                      *(CommitOperationDelete(path) for path in change.remove)]
        self.api.create_commit(self.repo, operations, commit_message=title, commit_description=SOURCE + source,
                               revision=branch, parent_commit=commits[0].commit_id)

    def _ask(self, request: Callable[[], Answer]) -> Answer:
        """The answer, asked for again while the reason may pass; then the typed error."""
        for wait in (*WAITS, None):
            try:
                return request()
            except Exception as error:           # what the client and its transport raise has no common base
                if wait is None or not passes(error):
                    raise typed(error, self.repo) from error
                time.sleep(wait)
        raise AssertionError


# -- errors -----------------------------------------------------------------------------------------------------------

def answer_of(error: BaseException) -> HfHubHTTPError | None:
    """The hub's answer behind an error: that of an upload is wrapped in another."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, HfHubHTTPError):
        found = found.__cause__
    return found


def lost(error: BaseException) -> BaseException | None:
    """The failure of the network behind an error that is no answer."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, (HTTPError, ConnectionError)):
        found = found.__cause__
    return None if isinstance(found, OfflineModeIsEnabled) else found


def passes(error: BaseException) -> bool:
    answer = answer_of(error)
    return lost(error) is not None if answer is None else answer.response.status_code in PASSING


def typed(error: Exception, repo: str) -> NanopoeError:
    """One line of ours for what the client raised."""
    answer = answer_of(error)
    if answer is not None:
        return refused(answer, repo)
    if isinstance(error, OfflineModeIsEnabled):
        return ConfigError("keeps the hub's client from the network", "HF_HUB_OFFLINE", "unset it, or use --to FOLDER")
    network = lost(error)
    if network is not None:
        return StorageError(f"the hub cannot be reached ({first_line(network)})", repo,
                            f"check the network and HF_ENDPOINT, then {AGAIN}")
    return StorageError(f"the hub's client gave up ({first_line(error)})", repo, AGAIN)


def refused(answer: HfHubHTTPError, repo: str) -> NanopoeError:
    code = answer.response.status_code
    said = first_line(answer.server_message) if answer.server_message else ""
    said = f": {said}" if said else ""
    if code == 401:
        return ConfigError(f"the hub does not take this token{said}", "HF_TOKEN", "make a new one in its settings")
    if code == 403:
        return ConfigError(f"this token may not do that{said}", repo, "use one that may write to this repo")
    if code in (409, 412):
        return StorageError(f"was changed by somebody else meanwhile{said}", repo, AGAIN)
    return StorageError(f"the hub refused, with {code}{said}", repo, AGAIN)


def first_line(said: object) -> str:
    return (str(said).strip().splitlines() or [type(said).__name__])[0][:200].rstrip(".")
