"""Ranks: what fails on one fails on all, a rank that is gone is told of, and every message comes once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nanopoe import dist, errors
from nanopoe.dist import World, agree, environment_world
from nanopoe.errors import ConfigError, DataError, NanopoeError, PeerError, StorageError
from tests.ranks import run_ranks

TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def _own_error_log() -> Iterator[None]:
    yield
    errors.set_error_log(None)


def fail_on_one(world: World, bad_rank: int) -> tuple[str, int, bool, str]:
    """(message, exit code, whether all raise it, the causes' types) after a block in which one rank fails."""
    try:
        with agree():
            if world.rank == bad_rank:
                raise KeyError("lost")
    except NanopoeError as error:
        causes, cause = [], error.__cause__
        while cause is not None:
            causes.append(type(cause).__name__)
            cause = cause.__cause__
        return str(error), error.exit_code, error.everywhere, " ".join(causes)
    return "no error", 0, False, ""


def test_what_fails_on_one_rank_fails_on_all() -> None:
    others, own = run_ranks(fail_on_one, 2, 1)
    assert others[:3] == own[:3] and own[2]
    assert "rank 1: KeyError: 'lost'" in own[0]
    assert own[3] == "NanopoeError KeyError", "the traceback of the cause gets into the log of its rank"
    assert others[3] == ""
    assert run_ranks(fail_on_one, 2, 7) == [("no error", 0, False, "")] * 2                    # control


def test_a_disk_error_keeps_its_cause() -> None:
    with pytest.raises(StorageError, match="No space") as caught, agree():
        raise OSError(28, "No space left on device")
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(ZeroDivisionError), agree():                   # control: alone, a bug stays what it is
        _ = 1 / 0


def left_alone(world: World, collective: str) -> str:
    dist.barrier()
    if world.rank == 1:
        torch.distributed.destroy_process_group()                    # as a killed process: the connection closes
        return "left"
    try:
        if collective == "all_reduce":
            dist.all_reduce_sum_(torch.ones(2))
        elif collective == "reduce_to":
            dist.reduce_to(torch.ones(2), 0).wait()
        elif collective == "gather_to":
            dist.gather_to(torch.ones(2), [torch.ones(2), torch.ones(2)], 0).wait()
        elif collective == "broadcast":
            dist.broadcast(torch.ones(2), 1).wait()
        elif collective == "all_gather":
            dist.all_gather(torch.ones(4), torch.ones(2)).wait()
        elif collective == "agree":
            with agree():
                raise DataError("a bad shard", "shard 3")
        else:
            dist.barrier()
    except NanopoeError as error:
        return str(error)
    finally:
        torch.distributed.destroy_process_group()                    # nobody is there to meet at the harness's barrier
    return "nothing noticed"


@pytest.mark.parametrize("collective", ["all_reduce", "reduce_to", "gather_to", "broadcast", "all_gather", "barrier"])
def test_a_rank_that_is_gone_is_an_error_of_its_peers(collective: str) -> None:
    message = run_ranks(left_alone, 2, collective)[0]
    assert message.startswith("error[peer] rank 0: another rank is gone") and "\n" not in message
    assert "pair.cc" not in message and "GLHF" not in message


def test_own_trouble_is_told_even_when_the_peers_are_gone() -> None:
    assert run_ranks(left_alone, 2, "agree")[0] == "error[data] shard 3: a bad shard"


@pytest.mark.parametrize("change, named", [
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two'"), ({"RANK": "-1"}, "RANK='-1'"), ({"RANK": "2"}, "RANK=2, WORLD_SIZE=2"),
    ({"MASTER_PORT": ""}, "MASTER_PORT=''"), ({"MASTER_ADDR": None}, "lacks MASTER_ADDR")])
def test_an_environment_that_names_no_world(monkeypatch: pytest.MonkeyPatch, change: dict[str, str | None],
                                            named: str) -> None:
    for key, value in TORCHRUN.items():
        monkeypatch.setenv(key, value)
    assert environment_world() == (1, 1, 2)                          # control
    for key, changed in change.items():
        if changed is None:
            monkeypatch.delenv(key)
        else:
            monkeypatch.setenv(key, changed)
    with pytest.raises(ConfigError, match=named):
        environment_world()


def test_one_rank_tells_what_all_raise(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                                       tmp_path: Path) -> None:
    """The first rank of a host speaks at once, the others after a while in which torchrun ends them; each once."""
    waited: list[float] = []
    monkeypatch.setattr(errors.time, "sleep", waited.append)
    monkeypatch.setattr(sys, "argv", ["train"])
    errors.set_error_log(tmp_path / "rank.log")
    for local_rank, everywhere, patience in (("0", True, []), ("1", True, [errors.PATIENCE_S]), ("1", False, [])):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        error = PeerError("gone")
        error.everywhere = everywhere
        errors.report(error)
        errors.report(error)
        assert capsys.readouterr().err == "error[peer] gone\n"
        assert waited == patience
        waited.clear()
    assert (tmp_path / "rank.log").read_text().count("PeerError") == 3
