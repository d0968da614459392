"""Publishing: every step a revision, in a folder of git and on a stand-in for the hub; nothing is sent twice."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanopoe.checkpoint import open_checkpoint
from nanopoe.checkpoint.cascade import open_cascade, save_delta
from nanopoe.checkpoint.evaluation import save_evaluation
from nanopoe.export import publish_hub
from nanopoe.export.publish_tree import Content, change_of, content_of
from nanopoe.export.run import export_run
from nanopoe.infer.engine import Engine
from nanopoe.infer.weights import Weights
from nanopoe.train.restore import load_cascade, load_trained
from tests.commands import ROOT, Done, refused
from tests.exports import load
from tests.hub_server import TOKEN, Hub, git_oid
from tests.reports import MAX, record
from tests.test_specialist import ALONE, specialist_dict, train

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>'")     # between the hub's client and its httpx2

STEPS = (3, 5, 8)
BRANCHES = ["main", "step-000003", "step-000005", "step-000008"]


def evaluated(run: Path, step: int) -> None:
    """The record of a step, as scripts.evaluate names what it was made from."""
    identity = open_checkpoint(run, step).identity
    save_evaluation(run, record(step, stages=2, modes=False, request={"checkpoint": identity}), "")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """Checkpoints of steps 3, 5 and 8, without metrics and records: so its cards need no plots, which take a second."""
    here = tmp_path / "run"
    shutil.copytree(finished / "run", here, ignore=shutil.ignore_patterns(
        "metrics.jsonl", "evaluation", *(f"step_{step:08d}" for step in range(9) if step not in STEPS)))
    return here


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in, and this process set up to publish to it."""
    from huggingface_hub import close_session, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)           # the hub's other protocol, over other hosts
    monkeypatch.setattr(publish_hub, "WAITS", (0.01, 0.01))
    with Hub() as served:
        for name, value in (("HF_TOKEN", TOKEN), ("HF_ENDPOINT", served.url), ("NO_PROXY", "127.0.0.1")):
            monkeypatch.setenv(name, value)
        yield served
        close_session()


@pytest.fixture(autouse=True)
def _terminates() -> Iterator[None]:
    """The command takes SIGTERM for itself."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def git(folder: Path, *words: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True, text=True).stdout


def commits(folder: Path) -> dict[str, str]:
    return dict(line.split() for line in git(folder, "for-each-ref", "--format=%(refname:short) %(objectname)")
                .splitlines())


def clone(folder: Path, branch: str, out: Path) -> dict[str, bytes]:
    """The files of a branch, checked out."""
    git(folder, "clone", "--quiet", "--branch", branch, str(folder), str(out))
    return files_of(out)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and ".git" not in path.relative_to(folder).parts}


def changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    return sorted(name for name in after if before.get(name) != after[name])


# -- in a folder ------------------------------------------------------------------------------------------------------

def test_every_step_is_a_branch_with_the_export_of_that_step(run: Path, finished: Path, tmp_path: Path,
                                                             command: Any) -> None:
    shutil.copyfile(finished / "run" / "metrics.jsonl", run / "metrics.jsonl")
    evaluated(run, 3)
    evaluated(run, 8)
    out = tmp_path / "repo"
    done = command("publish", run, "--to", out, "--repo", "me/tiny")
    assert done.code == 0 and sorted(commits(out)) == BRANCHES, done
    assert git(out, "symbolic-ref", "HEAD").strip() == "refs/heads/main"
    for step in STEPS:
        own, _ = export_run(run, tmp_path / "me" / str(step), step=step)
        expected, found = files_of(own), clone(out, f"step-{step:06d}", tmp_path / f"clone{step}")
        card, plain = found.pop("README.md").decode(), expected.pop("README.md").decode()
        figures = {name for name in found if name.startswith("figures/")}
        assert {name: found[name] for name in found.keys() - figures} == expected
        assert figures == {f"figures/{name}.png" for name in re.findall(r"\]\(figures/(\w+)\.png\)", card)}
        assert card.startswith(plain.replace(f'"{step}"', '"me/tiny"')) and 'repo = "me/tiny"' in card
        assert f'revision="step-{step:06d}"' in card
        bounds = json.loads(found["config.json"]).get(MAX)
        assert bounds == (None if step == 5 else record(step, stages=2)["calibration"][MAX])
        table = card.partition("#### Bits per byte")[2].partition("####")[0]
        assert [int(s) for s in re.findall(r"^\| (\d+) \|", table, re.M)] == [s for s in (3, 8) if s <= step]
    assert clone(out, "main", tmp_path / "newest") == files_of(tmp_path / "clone8") != files_of(tmp_path / "clone5")


def test_the_second_run_does_nothing_and_a_change_only_what_it_changes(run: Path, tmp_path: Path, command: Any,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))                 # no identity, no configuration
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "another"))             # of a repository that is not meant
    out, other = tmp_path / "repo", tmp_path / "other"

    def publish(folder: Path, *arguments: str) -> Done:
        done = command("publish", run, "--to", folder, "--repo", "me/tiny", *arguments)
        assert done.code == 0, done
        return done

    assert "would be" in publish(out, "--dry-run").out and not out.exists()
    publish(out)
    monkeypatch.delenv("GIT_DIR")
    first = commits(out)
    with monkeypatch.context() as nowhere:               # it does not even export
        nowhere.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
        again = publish(out)
        assert again.out.count("there already") == 4 and "nothing to do" in again.out and commits(out) == first
        refused(command("publish", run, "--to", other), 7, "storage", "nowhere: .*name a folder with space in TMPDIR")
    publish(other, "--steps", "3")
    assert sorted(commits(other)) == ["main", "step-000003"] and commits(other)["main"] == first["step-000003"]
    publish(other)
    both = commits(other)
    assert changed(both, first) == ["main"] and git(other, "rev-list", "--count", "main").strip() == "2"
    assert git(other, "rev-parse", "main^{tree}") == git(out, "rev-parse", "main^{tree}")
    publish(other, "--steps", "5")                                       # control: an older one alone moves nothing
    assert commits(other) == both
    evaluated(run, 5)                                # of step 8 the card changes, which shows it; of step 3 nothing
    assert publish(out).out.count("there already") == 1
    assert changed(first, commits(out)) == ["main", "step-000005", "step-000008"]
    for step, files in ((5, ["README.md", "config.json"]), (8, ["README.md"])):
        found = git(out, "diff", "--name-only", first[f"step-00000{step}"], f"step-00000{step}").split()
        assert found == [*files, "figures/depth.png", "figures/trajectory.png"]


def test_a_published_revision_gives_the_engines_tokens(run: Path, tmp_path: Path, command: Any) -> None:
    assert command("publish", run, "--to", tmp_path / "repo", "--dtype", "float32").code == 0
    answers = []
    for step in (3, 8):
        folder = tmp_path / f"there{step}"
        clone(tmp_path / "repo", f"step-{step:06d}", folder)
        prompt = list(range(20, 28))
        model = load_trained(run, step, ALONE)[0]
        ours = Engine(Weights(model)).generate([prompt], max_new_tokens=12)[0]
        hub = load(folder)
        hub.generation_config.eos_token_id = None
        theirs = hub.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        assert theirs[0, len(prompt):].tolist() == ours
        answers.append(ours)
    assert answers[0] != answers[1]                                      # control: another revision, another model
    assert 'repo = "repo"' in (tmp_path / "there3" / "README.md").read_text()


# -- on the hub -------------------------------------------------------------------------------------------------------

def apart(hub: Hub) -> int:
    """The bytes of all files that are kept apart, each once."""
    return sum(len(content) for content in hub.large.values())


def test_the_hub_gets_what_the_folder_gets(run: Path, tmp_path: Path, command: Any, hub: Hub) -> None:
    def publish(*arguments: str) -> str:
        done = command("publish", run, "--repo", "me/tiny", *arguments)
        assert done.code == 0 and TOKEN not in done.out + done.err and not done.err, done
        return done.out

    evaluated(run, 8)                                                    # its pictures are in a folder
    told = publish("--private", "--dry-run")
    assert hub.repos == {} and hub.writes() == []
    assert [line.split("│")[1].strip() for line in told.splitlines() if "│" in line and "step" in line] == BRANCHES[1:]
    assert publish("--private", "--steps", "8").count(" new\n") == 3
    assert publish("--private").count("there already") == 2
    repo = hub.repos["me/tiny"]
    assert repo.private and sorted(repo.heads) == BRANCHES and hub.sent == apart(hub) > 0
    assert [len(repo.heads[branch].line) for branch in BRANCHES] == [2, 2, 2, 2]
    assert command("publish", run, "--repo", "me/tiny", "--to", tmp_path / "repo").code == 0
    for branch in BRANCHES:
        assert hub.files("me/tiny", branch) == clone(tmp_path / "repo", branch, tmp_path / branch)
    assert hub.files("me/tiny", "main") == hub.files("me/tiny", "step-000008") != hub.files("me/tiny", "step-000003")
    before = hub.writes()
    assert "nothing to do" in publish() and hub.writes() == before
    repo.heads["main"] = repo.heads["step-000003"]                       # somebody else's doing
    sent = hub.sent
    assert publish().count("there already") == 3 and hub.sent == sent                   # its weights are there
    assert hub.files("me/tiny", "main") == hub.files("me/tiny", "step-000008")
    assert [path for _, path in hub.writes()[len(before):]][-1] == "/api/models/me/tiny/commit/main"
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_files_of_others_stay_and_stale_weights_go(run: Path, command: Any, hub: Hub) -> None:
    assert command("publish", run, "--repo", "me/tiny", "--steps", "3").code == 0
    head = hub.repos["me/tiny"].heads["step-000003"]
    for name in ("NOTICE", "model-00001-of-00002.safetensors", "figures/old.png", "config.json"):
        head.files[name] = hub.repos["me/tiny"].heads["main"].files[".gitattributes"]
    object.__setattr__(head, "message", "edited by hand")
    answers = iter(["lose"])                             # of the commit that removes them, which cannot be made twice
    hub.trouble = lambda method, path, number: next(answers, None) if "/commit/" in path else None
    done = command("publish", run, "--repo", "me/tiny", "--steps", "3")
    assert next(answers, None) is None
    assert done.code == 0 and "step-000003: 1 files" in done.out and "main: there already" in done.out, done
    there = hub.files("me/tiny", "step-000003")
    assert there.keys() - hub.files("me/tiny", "main").keys() == {"NOTICE"}
    assert there["config.json"] == hub.files("me/tiny", "main")["config.json"]


@pytest.mark.parametrize("part, nth", [("PUT /lfs/", 2), ("POST /api/models/me/tiny/commit/step-000005", 1)],
                         ids=["upload", "commit"])
def test_it_goes_on_where_the_hub_failed(run: Path, command: Any, hub: Hub, part: str, nth: int) -> None:
    """Its storage is full in the middle of the second step."""
    seen = 0

    def full(method: str, path: str, number: int) -> int | None:
        nonlocal seen
        ours = f"{method} {path}".startswith(part)
        seen += ours
        return 507 if ours and seen == nth else None

    hub.trouble = full
    done = command("publish", run, "--repo", "me/tiny")
    refused(done, 7, "storage", "me/tiny: the hub refused, with 507.*run the same command again")
    assert "step-000003" in done.out and "step-000005" not in done.out
    there = hub.repos["me/tiny"].heads
    assert sorted(there) == ["main", "step-000003", "step-000005"] and len(there["step-000005"].line) == 1   # empty yet
    assert len(hub.large) == (1 if nth == 2 else 2)                      # the second step's weights were sent, or not
    hub.trouble = lambda method, path, number: None
    assert command("publish", run, "--repo", "me/tiny").out.count("there already") == 1
    assert sorted(there) == BRANCHES and hub.sent == apart(hub) and len(hub.large) == 3       # nothing was sent twice
    assert hub.files("me/tiny", "step-000005") != hub.files("me/tiny", "step-000003")


def test_an_answer_that_is_lost_or_late_is_asked_for_again(run: Path, command: Any, hub: Hub) -> None:
    asked: dict[str, int] = {}

    def once(method: str, path: str, number: int) -> int | str | None:
        """The first of each kind fails: a commit's is lost after it was made, the others pass."""
        kind = next((k for k in ("/refs", "/create", "/commit/", "/branch/", "/commits/") if k in path), None)
        if kind is None or (method, kind) == ("GET", "/commit/"):
            return None
        asked[kind] = asked.get(kind, 0) + 1
        return None if asked[kind] > 1 else "lose" if kind == "/commit/" else 503

    hub.trouble = once
    assert command("publish", run, "--repo", "me/tiny", "--steps", "8").code == 0
    assert set(asked) >= {"/create", "/commit/", "/branch/", "/commits/"}
    assert [len(head.line) for head in hub.repos["me/tiny"].heads.values()] == [2, 2]   # not committed twice
    hub.trouble = lambda method, path, number: 503 if path.endswith("/refs") else None
    before = len(hub.log)
    refused(command("publish", run, "--repo", "me/tiny"), 7, "storage", "the hub refused, with 503")
    assert len([path for _, path in hub.log[before:] if path.endswith("/refs")]) == 3   # bounded


def test_a_killed_publish_goes_on(run: Path, hub: Hub, tmp_path: Path) -> None:
    """As a shell starts it, killed for good while it sends the second step."""
    reached, go_on = threading.Event(), threading.Event()

    def hold(method: str, path: str, number: int) -> None:
        if path.endswith("/commit/step-000005"):
            reached.set()
            go_on.wait(30)

    def start() -> subprocess.Popen[str]:
        variables = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "TMPDIR": str(tmp_path)}
        return subprocess.Popen([sys.executable, "-m", "scripts.publish", str(run), "--repo", "me/tiny"], cwd=ROOT,
                                env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    hub.trouble = hold
    child = start()
    assert reached.wait(60)
    uploaded = [path for method, path in hub.log if method == "PUT"]
    child.kill()
    out, err = child.communicate()
    hub.trouble = lambda method, path, number: None
    go_on.set()
    assert "step-000003" in out and "step-000005" not in out and TOKEN not in out + err
    before = len(hub.log)
    child = start()
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0 and not err and "step 3 -> step-000003: there already" in out, (out, err)
    assert sorted(hub.repos["me/tiny"].heads) == BRANCHES
    assert hub.files("me/tiny", "main") == hub.files("me/tiny", "step-000008")
    assert not {path for method, path in hub.log[before:] if method == "PUT"} & set(uploaded) and uploaded


# -- specialists ------------------------------------------------------------------------------------------------------

LOADER = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("me/tool", revision=sys.argv[1], trust_remote_code=True).eval()
model.generation_config.eos_token_id = None
out = model.generate(torch.tensor([list(range(20, 28))]), max_new_tokens=8, do_sample=False)
print(out[0, 8:].tolist())
"""


def test_a_specialist_is_published_on_its_base_and_loads_from_the_hub(run: Path, data: Path, tmp_path: Path,
                                                                      command: Any, hub: Hub) -> None:
    tool = tmp_path / "tool"
    train(ALONE, specialist_dict(data, tool, run, **{"checkpoint.every": None}))
    (tool / "metrics.jsonl").unlink()
    assert command("publish", run, "--repo", "me/tiny", "--dtype", "float32", "--steps", "8").code == 0
    for arguments, words in (((), "give --parent.* or --merged"), (("--parent", run), "is no ORG/NAME@REVISION"),
                             (("--parent", "me/tiny"), "is no ORG/NAME@REVISION")):
        refused(command("publish", tool, "--repo", "me/tool", *arguments), 2, "config", words)
    assert "me/tool" not in hub.repos                                    # refused before anything is made
    done = command("publish", tool, "--repo", "me/tool", "--dtype", "float32", "--parent", "me/tiny@step-000008")
    assert done.code == 0, done
    files = hub.files("me/tool", "main")
    assert "delta.safetensors" in files and "model.safetensors" not in files
    assert json.loads(files["config.json"])["parent"]["revision"] == "step-000008"
    merged = command("publish", tool, "--to", tmp_path / "merged", "--merged")
    assert merged.code == 0 and "model.safetensors" in clone(tmp_path / "merged", "main", tmp_path / "whole")
    save_delta(open_cascade(tool), tmp_path / "delta", "float32")
    refused(command("publish", tmp_path / "delta", "--repo", "me/delta"), 2, "config", "is a delta")
    said = subprocess.run(
        [sys.executable, "-c", LOADER, "step-000008"], capture_output=True, text=True, timeout=60,
        env={**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
             "HF_MODULES_CACHE": str(tmp_path / "modules")})
    prompt = list(range(20, 28))
    ids = torch.tensor([prompt])
    model = load_cascade(tool, None, ALONE).model
    for _ in range(8):
        with torch.no_grad():
            logits = model(ids)[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    assert said.stdout.strip() == str(ids[0, 8:].tolist()), said


# -- refusals ---------------------------------------------------------------------------------------------------------

def test_what_cannot_be_published_is_refused_in_a_line(run: Path, tmp_path: Path, command: Any, hub: Hub,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    def publish(*arguments: str | Path) -> Done:
        done = command("publish", run, *arguments)
        assert TOKEN not in done.out + done.err
        return done

    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("x")
    for arguments, code, kind, words in (
            ((), 2, "config", "nowhere to publish to; give --repo"),
            (("--repo", "tiny"), 2, "config", "expected ORG/NAME, got 'tiny'"),
            (("--repo", "me/tiny", "--to", tmp_path / "x", "--private"), 2, "config", "is of a repo on the hub"),
            (("--repo", "me/tiny", "--steps", "4"), 4, "checkpoint", "no step 4; steps there: 3, 5, 8"),
            (("--repo", "me/tiny", "--merged"), 2, "config", "is a base, not a specialist"),
            (("--to", tmp_path / "used"), 2, "config", "is in use, and is not a bare git repository")):
        refused(publish(*arguments), code, kind, words)
    assert hub.repos == {} and hub.writes() == []
    assert publish("--repo", "me/tiny", "--steps", "3").code == 0                        # control: all is well
    refused(publish("--repo", "me/tiny", "--private"), 2, "config", "me/tiny: is public already")
    hub.read_only = True
    refused(publish("--repo", "me/tiny"), 2, "config", "this token may not do that")
    hub.read_only = False
    hub.token = "hf_another"
    refused(publish("--repo", "me/tiny"), 2, "config", "HF_TOKEN: the hub does not take this token: Invalid")
    monkeypatch.setenv("HF_TOKEN", "")
    for more in ((), ("--dry-run",)):
        refused(publish("--repo", "me/tiny", *more), 2, "config", "HF_TOKEN: there is no token; set it")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    refused(publish("--repo", "me/tiny"), 7, "storage", "the hub cannot be reached .*check the network")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused(publish("--repo", "me/tiny"), 2, "config", "HF_HUB_OFFLINE: keeps")
    (run / "checkpoints" / "step_00000005" / "manifest.json").write_text("{}")
    refused(publish("--to", tmp_path / "torn"), 4, "checkpoint", "step_00000005")
    assert sorted(commits(tmp_path / "torn")) == ["step-000003"]                         # what was told is done


# -- digests ----------------------------------------------------------------------------------------------------------

def test_a_change_is_what_differs(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one\n")
    one = content_of(tmp_path / "a")
    assert one.oid == git_oid(b"one\n") and one.size == 4
    by_oid, by_sha = Content(4, oid=one.oid), Content(4, sha256=one.sha256)
    assert one.same(by_oid) and one.same(by_sha) and not by_oid.same(by_sha) and not one.same(Content(5, oid=one.oid))
    assert change_of({"a": one}, {"a": by_sha}, ()).empty
    moved = change_of({"b": one}, {"a": by_sha, "model.safetensors": by_oid}, {by_sha})
    assert (list(moved.write), moved.remove, moved.fresh) == (["b"], ["model.safetensors"], 0)
    assert change_of({"b": one, "c": one}, {}, ()).fresh == 4
