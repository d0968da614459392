"""The fault suite: its short form here, the full one with `python -m tests.faults`, and that it can fail."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.faults import __main__ as suite
from tests.faults.harness import FAULTS, Fault, Report, Room

IDS = list(FAULTS)                       # importing the suite has registered them


def holds(id: str, folder: Path, trials: int) -> None:
    report = FAULTS[id].run(Room(folder), trials)
    assert report.failures == [] and report.trials > 0


@pytest.mark.parametrize("id", [i for i in IDS if FAULTS[i].short])
def test_what_must_hold_holds(id: str, tmp_path: Path) -> None:
    holds(id, tmp_path, FAULTS[id].short)


@pytest.mark.slow
@pytest.mark.parametrize("id", IDS)
def test_it_holds_every_time(id: str, tmp_path: Path) -> None:
    holds(id, tmp_path, FAULTS[id].full)


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    monkeypatch.setattr(sys, "argv", ["faults", *arguments])
    return suite.main(), capsys.readouterr().out.splitlines()


def test_what_does_not_hold_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(room: Room, trials: int) -> Report:
        report = Report(trials, note=f"drew {room.draw.randrange(10**6)}")
        for i in range(trials):
            report.check(i % 2 == 0, f"trial {i} did not hold")
        return report

    monkeypatch.setitem(FAULTS, "F98", Fault("F98", "half of it breaks", broken, short=1, full=6))
    code, lines = run(monkeypatch, capsys, "F98")
    assert code == 1 and lines[0].split() == ["id", "trials", "failures", "seconds", "what"]
    assert lines[1].split()[:3] == ["F98", "6", "3"] and "half of it breaks (drew " in lines[1]
    assert [line.strip() for line in lines[2:]] == [f"trial {i} did not hold" for i in (1, 3, 5)]
    assert run(monkeypatch, capsys, "F98", "--trials", "2")[0] == 1
    code, short = run(monkeypatch, capsys, "F98", "--short")                                         # control
    assert code == 0 and len(short) == 2 and short[1].split()[:3] == ["F98", "1", "0"]
    drawn = [run(monkeypatch, capsys, "F98", "--seed", seed)[1][1].split("drew ")[1] for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(SystemExit) as refused:
        run(monkeypatch, capsys, "F1000")
    assert refused.value.code == 2
