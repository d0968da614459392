"""A stand-in for the Hugging Face hub: the part of its HTTP API that publishing and loading speak, all in memory.

Repos are git as the hub keeps it: commits, blobs by git's SHA-1, large files apart by SHA-256 (LFS). Nothing of it
knows what nanopoe sends; it answers as the hub does, with the hub's codes and headers.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "x" * 34
LARGE = 10 << 20
DATE = "2024-01-01T00:00:00.000Z"
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.png filter=lfs diff=lfs merge=lfs -text\n"
APART = (".safetensors", ".png")                       # as ATTRIBUTES say


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class Blob:
    """A file of a commit; the content of one that is kept apart is in Hub.large by its SHA-256."""

    content: bytes
    sha256: str | None = None
    size: int = 0

    @property
    def oid(self) -> str:
        return git_oid(self.content)

    @property
    def pointer(self) -> dict[str, Any]:
        return {"oid": self.sha256, "size": self.size, "pointerSize": len(self.content)}


def pointer_to(sha256: str, size: int) -> Blob:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    return Blob(text.encode(), sha256, size)


@dataclass(frozen=True)
class Commit:
    id: str
    title: str
    message: str
    files: dict[str, Blob]
    parent: Commit | None

    @property
    def line(self) -> list[Commit]:
        """It and those before it, newest first."""
        return [self, *(self.parent.line if self.parent else [])]


def commit_on(parent: Commit | None, title: str, message: str, files: dict[str, Blob]) -> Commit:
    facts = [parent.id if parent else None, title, message, {path: blob.oid for path, blob in files.items()}]
    return Commit(hashlib.sha1(json.dumps(facts).encode(), usedforsecurity=False).hexdigest(), title, message, files,
                  parent)


@dataclass
class Repo:
    private: bool
    heads: dict[str, Commit]


@dataclass
class Refusal(Exception):
    status: int
    said: str
    code: str | None = None                            # X-Error-Code


@dataclass
class Hub:
    """`with Hub() as hub`: served at hub.url. `log` are the requests (method, path), `sent` the bytes of LFS uploads.

    `trouble(method, path, number)` is asked before a request, counted from 0, is answered: a status makes it the
    answer, "lose" answers nothing after all is done, None leaves it alone. It may wait.
    """

    token: str = TOKEN
    repos: dict[str, Repo] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    staged: dict[str, bytes] = field(default_factory=dict)       # uploaded, not verified
    log: list[tuple[str, str]] = field(default_factory=list)
    sent: int = 0
    read_only: bool = False
    trouble: Callable[[str, str, int], int | str | None] = lambda method, path, number: None

    def __enter__(self) -> Hub:
        hub, self.lock = self, threading.Lock()

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    # -- what tests ask -----------------------------------------------------------------------------------------

    def files(self, repo: str, branch: str) -> dict[str, bytes]:
        """What a reader of the branch gets, without what the hub itself put there."""
        return {path: self.large[blob.sha256] if blob.sha256 else blob.content
                for path, blob in self.repos[repo].heads[branch].files.items() if path != ".gitattributes"}

    def writes(self) -> list[tuple[str, str]]:
        """The requests that could have changed something."""
        return [(method, path) for method, path in self.log if method in ("POST", "PUT") and "validate" not in path]

    # -- what the hub does --------------------------------------------------------------------------------------

    def repo(self, name: str) -> Repo:
        if name not in self.repos:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return self.repos[name]

    def head(self, name: str, revision: str) -> Commit:
        repo = self.repo(name)
        found = repo.heads.get(revision) or next(
            (commit for head in repo.heads.values() for commit in head.line if commit.id == revision), None)
        if found is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        name = f"{body['organization']}/{body['name']}"
        if name in self.repos:
            raise Refusal(409, "You already created this model repo")
        private = body.get("visibility") == "private" or bool(body.get("private"))
        self.repos[name] = Repo(private, {"main": commit_on(None, "initial commit", "",
                                                            {".gitattributes": Blob(ATTRIBUTES)})})
        return {"url": f"{self.url}/{name}", "name": name}

    def branch(self, name: str, branch: str, body: dict[str, Any]) -> dict[str, Any]:
        repo = self.repo(name)
        if branch in repo.heads:
            raise Refusal(409, f"Reference already exists: refs/heads/{branch}")
        repo.heads[branch] = self.head(name, body.get("startingPoint", "main"))
        return {}

    def preupload(self, name: str, revision: str, body: dict[str, Any]) -> dict[str, Any]:
        head, found = self.head(name, revision), []
        for file in body["files"]:
            base64.b64decode(file["sample"], validate=True)
            apart = file["path"].endswith(APART) or file["size"] >= LARGE
            blob = head.files.get(file["path"])
            found.append({"path": file["path"], "uploadMode": "lfs" if apart else "regular", "shouldIgnore": False,
                          **({} if blob is None else {"oid": blob.sha256 or blob.oid})})
        return {"files": found}

    def batch(self, name: str, body: dict[str, Any]) -> dict[str, Any]:
        self.repo(name)
        if body["operation"] != "upload" or body["hash_algo"] != "sha256" or "basic" not in body["transfers"]:
            raise Refusal(422, "unknown kind of batch")
        objects: list[dict[str, Any]] = []
        for one in body["objects"]:
            oid, known = one["oid"], one["oid"] in self.large
            actions = {"upload": {"href": f"{self.url}/lfs/{oid}?signature={self.signature(oid)}", "header": {}},
                       "verify": {"href": f"{self.url}/{name}.git/info/lfs/verify"}}
            objects.append({"oid": oid, "size": one["size"], **({} if known else {"actions": actions})})
        return {"transfer": "basic", "objects": objects}

    def signature(self, oid: str) -> str:
        return hashlib.sha256(f"{self.token}{oid}".encode()).hexdigest()[:32]

    def upload(self, oid: str, signature: str, content: bytes) -> None:
        if signature != self.signature(oid):
            raise Refusal(403, "SignatureDoesNotMatch")
        if hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "the content is not what was announced")
        self.staged[oid] = content
        self.sent += len(content)

    def verify(self, body: dict[str, Any]) -> dict[str, Any]:
        if len(self.staged.get(body["oid"], b"")) != body["size"]:
            raise Refusal(404, "object not found")
        self.large[body["oid"]] = self.staged.pop(body["oid"])
        return {}

    def commit(self, name: str, revision: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
        head = self.repo(name).heads.get(revision)
        if head is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        header, files = lines[0]["value"], dict(head.files)
        if lines[0]["key"] != "header" or header.get("parentCommit", head.id) != head.id:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            key, value = line["key"], line["value"]
            if key == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"], validate=True))
            elif key == "lfsFile":
                if value["oid"] not in self.large:
                    raise Refusal(400, f"the LFS pointer of {value['path']} points to a file that does not exist")
                files[value["path"]] = pointer_to(value["oid"], value["size"])
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            else:
                raise Refusal(400, f"unknown operation {key}")
        made = commit_on(head, header["summary"], header["description"], files)
        self.repos[name].heads[revision] = made
        return {"commitOid": made.id, "commitUrl": f"{self.url}/{name}/commit/{made.id}", "success": True}

    def tree(self, name: str, revision: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        folders: set[str] = set()
        for path, blob in self.head(name, revision).files.items():
            folders |= {path.rpartition("/")[0]} - {""}
            found.append({"type": "file", "path": path, "oid": blob.oid,
                          **({"size": blob.size, "lfs": blob.pointer} if blob.sha256 else {"size": len(blob.content)})})
        return found + [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]

    def info(self, name: str, revision: str) -> dict[str, Any]:
        head = self.head(name, revision)
        return {"id": name, "modelId": name, "private": self.repo(name).private, "sha": head.id,
                "siblings": [{"rfilename": path} for path in head.files]}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.handle_one(b"")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.handle_one(self.body())

    do_PUT = do_POST

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def handle_one(self, body: bytes) -> None:
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        with hub.lock:
            number = len(hub.log)
            hub.log.append((self.command, path))
        trouble = hub.trouble(self.command, path, number)
        try:
            if isinstance(trouble, int):
                raise Refusal(trouble, "trouble")
            with hub.lock:
                answer = self.route(path, body)
        except Refusal as refusal:
            return self.refuse(refusal)
        if trouble == "lose":
            self.close_connection = True
            return None
        if isinstance(answer, Blob):
            return self.answer_file(path, answer)
        return self.answer(json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def route(self, path: str, body: bytes) -> Any:
        hub, parts = self.hub, path.strip("/").split("/")
        if parts[0] == "lfs" and self.command == "PUT":                # the storage knows signatures, no tokens
            if self.headers.get("Authorization"):
                raise Refusal(400, "Only one auth mechanism allowed")
            return hub.upload(parts[1], parse_qs(urlsplit(self.path).query)["signature"][0], body)
        if self.headers.get("Authorization") != f"Bearer {hub.token}":
            raise Refusal(401, "Invalid credentials in Authorization header")
        if self.command == "POST" and hub.read_only:
            raise Refusal(403, "You don't have the rights to do that")
        match (self.command, *parts):
            case ("POST", "api", "repos", "create"):
                return hub.create(json.loads(body))
            case ("POST", "api", "validate-yaml"):
                return {"errors": [], "warnings": []}
            case ("GET" | "POST", "api", "models", org, name, *rest):
                return self.model(f"{org}/{name}", rest, body)
            case ("POST", org, name, "info", "lfs", "objects", "batch"):
                return hub.batch(f"{org}/{name.removesuffix('.git')}", json.loads(body))
            case ("POST", org, name, "info", "lfs", "verify"):
                return hub.verify(json.loads(body))
            case ("GET" | "HEAD", org, name, "resolve", revision, *file):
                blob = hub.head(f"{org}/{name}", revision).files.get("/".join(file))
                if blob is None:
                    raise Refusal(404, "Entry not found", "EntryNotFound")
                self.commit_id = hub.head(f"{org}/{name}", revision).id
                return blob
        raise Refusal(404, f"no such endpoint: {self.command} {path}")

    def model(self, name: str, rest: list[str], body: bytes) -> Any:
        hub = self.hub
        match (self.command, *rest):
            case ("GET",):
                return hub.info(name, "main")
            case ("GET", "revision", revision):
                return hub.info(name, revision)
            case ("GET", "refs"):
                return {"tags": [], "converts": [], "branches": [
                    {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": head.id}
                    for branch, head in hub.repo(name).heads.items()]}
            case ("GET", "commits", revision):
                return [{"id": one.id, "title": one.title, "message": one.message, "date": DATE, "authors": []}
                        for one in hub.head(name, revision).line]
            case ("GET", "tree", revision):
                return hub.tree(name, revision)
            case ("POST", "branch", branch):
                return hub.branch(name, branch, json.loads(body))
            case ("POST", "preupload", revision):
                return hub.preupload(name, revision, json.loads(body))
            case ("POST", "commit", revision):
                return hub.commit(name, revision, [json.loads(line) for line in body.splitlines()])
        raise Refusal(404, f"no such endpoint: {self.command} {'/'.join(rest)}")

    def answer_file(self, path: str, blob: Blob) -> None:
        content = self.hub.large[blob.sha256] if blob.sha256 else blob.content
        self.answer(content, {"ETag": f'"{blob.sha256 or blob.oid}"', "X-Repo-Commit": self.commit_id})

    def refuse(self, refusal: Refusal) -> None:
        self.answer(json.dumps({"error": refusal.said}).encode(),
                    {"X-Error-Message": refusal.said, **({"X-Error-Code": refusal.code} if refusal.code else {})},
                    refusal.status)

    def answer(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass
