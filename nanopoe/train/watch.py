"""What a run tells its user while it trains: console, RUN/metrics.jsonl, RUN/logs/rank_N.log and wandb.

The only place that talks during training. Rank 0 tells all of it, the other ranks write their own log. On a terminal
it is a live display (console.py), elsewhere plain lines. metrics.jsonl holds one JSON object per line with a "kind":
"train", "eval" or "event"; a resumed run first drops the lines after its checkpoint, so the file ends up equal to an
uninterrupted run's but for timings and events. A disk that is full stops no training: see journal.py.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console

from nanopoe import dist
from nanopoe.checkpoint.files import replace_file
from nanopoe.dist import heartbeat
from nanopoe.errors import ConfigError
from nanopoe.train.console import Display, Header, eval_line, train_line
from nanopoe.train.journal import Journal

METRICS = "metrics.jsonl"
__all__ = ["Header", "Watch", "clean", "rank_log", "truncate_metrics"]


class Watch:
    """Tells of one run; a context manager. Building one is collective: what fails on a rank fails on all.

    `start_step` is the number of updates already made (0 for a new run): metrics of later steps are dropped.
    `every`, `wandb_mode` and `wandb_project` are logging.every, .wandb and .wandb_project; `config` is what wandb
    records. `evaluated` holds the steps whose evaluation metrics.jsonl already has, the same on every rank.
    Errors: StorageError when the run folder cannot be written at the start, ConfigError when wandb cannot start.
    """

    def __init__(self, run_dir: str | os.PathLike[str], header: Header, world: dist.World, *, start_step: int = 0,
                 every: int = 1, wandb_mode: str = "disabled", wandb_project: str = "nanopoe",
                 config: dict[str, Any] | None = None, console: Console | None = None):
        self.run_dir, self.header, self.every, self.rank = Path(run_dir), header, every, world.rank
        self.step = start_step
        self.evaluated: set[int] = set()
        self.console = console or Console(highlight=False)
        self._display: Display | None = None
        self._metrics: Journal | None = None
        self._full: set[Path] = set()              # files that were told to wait for the disk
        self._wandb: Any = None
        self._smooth = Smooth()
        self._slow: set[int] = set()               # ranks that are known to be
        with dist.agree(world.device):
            self._log = Journal(rank_log(self.run_dir, self.rank))
            if self.rank == 0:
                self.evaluated = truncate_metrics(self.run_dir / METRICS, start_step)
                self._metrics = Journal(self.run_dir / METRICS)
                if wandb_mode != "disabled":
                    self._wandb = start_wandb(self.run_dir, header.name, wandb_mode, wandb_project, config or {})
        self.evaluated = set(dist.gather_json(sorted(self.evaluated), world.device)[0])
        if self.rank == 0 and self.console.is_terminal:
            self._display = Display(header, self.console, start_step)
        for line in header.lines():
            self._say(line, live=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close(failed=kind is not None)

    # -- what the loop calls -----------------------------------------------------------------------------------

    def train(self, report: dict[str, Any]) -> None:
        """One finished step. Keys: step, tokens, loss, stage_loss [K], pool_loss, lr_scale, momentum, weight_decay,
        grad_norm, seconds, tokens_per_s, mfu, memory_bytes; values may be tensors, None where there is none."""
        line = clean({"kind": "train", **report})
        self.step = line["step"]
        self._record(line)
        smooth = self._smooth.add(line)
        if self._display is not None:
            self._display.train(line, smooth)
        if self.step % self.every == 0 or self.step == self.header.total_steps:
            self._say(train_line(line, self.header.total_steps, smooth["seconds"]), live=False)
        self._tell_slow()

    def eval(self, result: dict[str, Any], step: int | None = None) -> None:
        """An evaluation (nanopoe.train.evaluate) of the model after `step` updates, the present step by default."""
        line = clean({"kind": "eval", "step": self.step if step is None else step, **result})
        self._record(line)
        self.evaluated.add(line["step"])
        if self._display is not None:
            self._display.eval(line)
        self._say(eval_line(line))

    def event(self, name: str, text: str | None = None, **fields: Any) -> None:
        """Anything else worth a line: resumed, checkpoint, warning, finished. On other ranks only in their log.

        `fields` are recorded; people read `text`, or the fields if there is none.
        """
        line = clean({"kind": "event", "step": self.step, "event": name, "time": _now(), **fields})
        self._record(line)
        shown = " ".join(f"{k}={v}" for k, v in clean(fields).items() if v is not None)
        self._say(f"{name} {text or shown}".rstrip())

    def close(self, failed: bool = False) -> None:
        """Leave the terminal as it was and close the files; may be called twice."""
        if self._display is not None:
            self._display.close()
            self._display = None
        if self._wandb is not None:
            self._try_wandb("finish", exit_code=int(failed))
            self._wandb = None
        for journal in (self._metrics, self._log):
            if journal is not None:
                journal.close()
                if journal.trouble is not None:
                    self._print(f"warning: {journal.path} lacks its last {journal.pending} lines: {journal.trouble}")
        self._metrics = None

    # -- where it goes -----------------------------------------------------------------------------------------

    def _say(self, text: str, live: bool = True) -> None:
        """A line to this rank's log and, on rank 0, to the console; with a live display only if `live`."""
        self._write(self._log, f"{_now()} {text}")
        if self.rank == 0 and (self._display is None or live):
            self._print(text)

    def _tell_slow(self) -> None:
        """An event when a rank begins to keep the others waiting, and one when it no longer does. Ranks that run
        different stages are not held against each other: their `idle` shares are in the train lines."""
        if self.rank != 0 or self.header.grid:
            return
        slow = {s.rank: s for s in heartbeat.slow_ranks()}
        for rank in slow.keys() - self._slow:
            s = slow[rank]
            self.event("slow rank", f"{rank} on {s.host}: its part of a step takes {s.seconds:.3g} s, "
                       f"{s.seconds / s.median_seconds:.1f} x the median's {s.median_seconds:.3g} s; the others wait",
                       rank=rank, host=s.host, seconds=s.seconds, median_seconds=s.median_seconds)
        for rank in self._slow - slow.keys():
            self.event("slow rank", f"{rank} keeps up again", rank=rank, over=True)
        self._slow = set(slow)

    def _print(self, text: str) -> None:
        """A line to the console; on other ranks, which have none, to stderr."""
        if self.rank == 0:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(f"rank {self.rank}: {text}", file=sys.stderr, flush=True)

    def _write(self, journal: Journal, line: str) -> None:
        """A line to a file, or to memory while the disk refuses it, which is told once a time."""
        journal.write(line)
        if journal.trouble is not None and journal.path not in self._full:
            self._full.add(journal.path)
            self._print(f"warning: {journal.path} cannot be written: {journal.trouble}; its lines wait in memory")
        elif journal.trouble is None and journal.path in self._full:
            self._full.remove(journal.path)
            self._print(f"{journal.path} is written again, and complete")

    def _record(self, line: dict[str, Any]) -> None:
        """A line to metrics.jsonl and wandb."""
        if self._metrics is not None:
            self._write(self._metrics, json.dumps(line, allow_nan=False))
        if self._wandb is not None and line["kind"] != "event":
            self._try_wandb("log", flatten(line))

    def _try_wandb(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Call wandb; a failure after the start only warns, once: training is worth more than its picture."""
        try:
            getattr(self._wandb, method)(*args, **kwargs)
        except Exception as error:  # whatever it is, the run goes on
            self._wandb = None
            self.event("warning", what=f"wandb failed and is off from here: {type(error).__name__}: {error}")


class Smooth:
    """Bias-corrected exponential means of the numbers of train lines, with a half-life of about 14 steps.

    A number that comes at every tenth step only is weighed by the steps it stands for, so all means lag alike.
    """

    def __init__(self, beta: float = 0.95):
        self.beta = beta
        self.means: dict[str, tuple[float, float, int]] = {}       # weighted sum, weight, step of the last value

    def add(self, line: dict[str, Any]) -> dict[str, Any]:
        """Means after this line: seconds, loss, pool_loss, stage_loss [K]; null where nothing finite came yet."""
        stages = line.get("stage_loss") or []
        step = line["step"]

        def mean(name: str, value: float | None) -> float | None:
            total, weight, last = self.means.get(name, (0.0, 0.0, step - 1))
            if value is not None:
                keep = self.beta ** max(step - last, 1)
                total, weight = keep * total + (1 - keep) * value, keep * weight + 1 - keep
                self.means[name] = (total, weight, step)
            return total / weight if weight else None

        return {**{name: mean(name, line.get(name)) for name in ("seconds", "loss", "pool_loss")},
                "stage_loss": [mean(f"stage {k}", value) for k, value in enumerate(stages)]}


def start_wandb(run_dir: Path, name: str, mode: str, project: str, config: dict[str, Any]) -> Any:
    """A wandb run, "online" or "offline"; the same one for a run folder over all resumes.

    The key comes from WANDB_API_KEY alone; offline needs neither key nor network. Output, code, git and environment
    are not recorded. ConfigError when it cannot start.
    """
    if mode == "online" and not os.environ.get("WANDB_API_KEY"):
        raise ConfigError("wandb needs the environment variable WANDB_API_KEY", "logging.wandb=online",
                          "set it, or use logging.wandb=offline")
    try:
        import wandb  # here, since it is slow to import and most runs do without

        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            replace_file(id_file, os.urandom(4).hex().encode())
        settings = wandb.Settings(silent=True, console="off", disable_git=True, save_code=False, x_disable_meta=True)
        run = wandb.init(mode="online" if mode == "online" else "offline", project=project, name=name,
                         dir=str(run_dir), id=id_file.read_text(encoding="utf-8").strip(),
                         resume="allow" if mode == "online" else None, config=config, settings=settings)
        for kind in ("train", "eval"):                                 # not wandb's own step: a resume may go back
            run.define_metric(f"{kind}/*", step_metric=f"{kind}/step")
        return run
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"wandb could not start: {first}", f"logging.wandb={mode}",
                          "use logging.wandb=offline or disabled") from error


# -- lines and files ----------------------------------------------------------------------------------------------

def clean(line: dict[str, Any]) -> dict[str, Any]:
    """`line` as plain JSON values. NaN and infinities become null and their keys are listed under "nonfinite"."""
    bad: list[str] = []

    def plain(value: Any, where: str) -> Any:
        if hasattr(value, "tolist"):                                   # tensors and numpy values
            value = value.tolist()
        if isinstance(value, dict):
            return {str(k): plain(v, f"{where}.{k}" if where else str(k)) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v, f"{where}.{i}") for i, v in enumerate(value)]
        if isinstance(value, float) and not math.isfinite(value):
            bad.append(where)
            return None
        return value if value is None or isinstance(value, bool | int | float | str) else str(value)

    result = plain(line, "")
    return {**result, "nonfinite": bad} if bad else result


def flatten(line: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line by path, as wandb wants them: {"train/stage_loss.0": 3.1, ..}."""
    found: dict[str, float] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict | list):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                walk(item, f"{path}.{key}" if path else str(key))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[f"{line['kind']}/{path}"] = value

    walk(line, "")
    return found


def truncate_metrics(path: Path, step: int) -> set[int]:
    """Drop the lines of steps > `step`, and lines torn by a crash; returns the steps of the evaluations kept.

    Atomic (a temporary file renamed over the old one); kept lines keep their bytes.
    """
    if not path.exists():
        return set()
    raw = path.read_bytes().splitlines(keepends=True)
    kept, evaluated = [], set()
    for text in raw:
        try:
            line = json.loads(text) if text.endswith(b"\n") else None
        except ValueError:
            line = None
        at = line.get("step") if isinstance(line, dict) else None
        if type(at) is not int or at > step:                               # what is no line of ours is torn, too
            continue
        kept.append(text)
        if isinstance(line, dict) and line.get("kind") == "eval":
            evaluated.add(at)
    if len(kept) != len(raw):
        replace_file(path, b"".join(kept))
    return evaluated


def rank_log(run_dir: Path, rank: int) -> Path:
    """Where a rank keeps its lines and tracebacks."""
    return run_dir / "logs" / f"rank_{rank}.log"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
