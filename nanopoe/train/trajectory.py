"""The record of a checkpoint: everything SPEC 7 asks of a step, made once and kept (checkpoint/evaluation.py).

One pass over the validation rows gives bits per byte and accuracy of every view, and of its first rows what
calibration needs. Rank 0 alone then writes the probes and runs every mode on them: more ranks would say the same.

Of conversations each source is read alone, too. Stages of a base are calibrated by the base's own run, on its own
text, so the record of a specialist has neither calibration nor modes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanopoe import dist
from nanopoe.checkpoint import Checkpoint, open_checkpoint
from nanopoe.checkpoint.evaluation import evaluation_path, read_evaluation
from nanopoe.config import Experiment, config_hash
from nanopoe.data.loader import open_sources
from nanopoe.data.validation import EvalBatches, validation_by_source
from nanopoe.dist import World
from nanopoe.infer.calibrate import Observer, calibration
from nanopoe.infer.engine import Engine
from nanopoe.infer.measure import calibrated_modes, compare
from nanopoe.infer.probes import probe_ids, probes
from nanopoe.infer.speculative import Speculative
from nanopoe.infer.weights import Weights
from nanopoe.model import GPT
from nanopoe.tokenizer import Tokenizer
from nanopoe.train.build import validation
from nanopoe.train.evaluate import evaluate
from nanopoe.train.restore import load_trained

CALIBRATION_TOKENS = 131_072     # 64 x 2048 (SPEC 4)
MODE_TOKENS = 60                 # of each probe (SPEC 7)
TIMES = ("measured_speedup", "tokens_per_s", "plain_tokens_per_s")


@dataclass(frozen=True)
class Request:
    """What a record is made from: the first `tokens` of the validation split (null: the run's evaluation.tokens), of
    these the first `calibration_tokens` for calibration; without `speed` it holds no times of modes."""

    tokens: int | None = None
    calibration_tokens: int = CALIBRATION_TOKENS
    speed: bool = True

    def of(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """As a record keeps it, with the checkpoint's files and the validation data by their hashes."""
        experiment = checkpoint.experiment
        data = experiment.data
        return {"tokens": self.tokens or experiment.evaluation.tokens, "calibration_tokens": self.calibration_tokens,
                "speed": self.speed, "checkpoint": checkpoint.identity,
                "validation": {source.name: source.digest for source in open_sources(data.val, data.kind)}}


def finished(run_dir: str | Path, step: int, request: Request) -> dict[str, Any] | None:
    """The record of a step if it is of this request, this checkpoint and this data; null when there is work to do.

    Times that nobody asked for do no harm. DataError for a file that is no record.
    """
    path = evaluation_path(run_dir, step)
    if not path.exists():
        return None
    record = read_evaluation(path)
    has, wants = record.get("request"), request.of(open_checkpoint(run_dir, step))
    same = isinstance(has, dict) and has in (wants, {**wants, "speed": True})
    return record if same else None


def evaluate_checkpoint(run_dir: str | Path, step: int | None, request: Request, world: World,
                        show: Callable[[int, int], None] = lambda done, total: None) -> dict[str, Any]:
    """Make the record of a checkpoint, the newest by default; the same dict on every rank. Collective.

    `evaluate`'s keys, and run, step, config_hash, request (Request.of), truncated (conversations read without their
    front), sources (`source_figures`), asked ("question" in a user's turn, or "text" to go on with), probes,
    calibration (infer/calibrate.py), and modes, see `mode_figures`; the last two are null for a model without stages
    to leave out, and for a specialist. `show` is told how many of how many rows this rank has read.
    """
    model, tokenizer, checkpoint = load_trained(run_dir, step, world)
    experiment = checkpoint.experiment
    with dist.agree(world.device):
        of = request.of(checkpoint)
        batches = validation(experiment, tokenizer, world, request.tokens)
    observer = None
    if experiment.model.poe_mode != "none" and model.layout.n_stages > 1 and not model.config.specialists:
        first = min(-(-request.calibration_tokens // experiment.model.sequence_len), batches.rows)
        observer = Observer(model, len(range(world.rank, first, world.size)))      # row i is read by rank i mod W
    result = evaluate(model, _shown(batches, show), tokenizer.token_bytes, observe=observer)
    result["truncated"] = batches.truncated
    sources = source_figures(model, tokenizer, experiment, world, request.tokens, result)
    table = None if observer is None else gathered(observer.table(), experiment.model.sequence_len, world)
    found: dict[str, Any] = {}
    with dist.agree(world.device):
        if world.is_main:
            calibrated = None if table is None else calibration(table, experiment.model)
            weights, asked = Weights(model), "question" if experiment.data.kind == "conversations" else "text"
            found = {"asked": asked, "probes": probes(weights, tokenizer, asked=asked), "calibration": calibrated,
                     "modes": calibrated and mode_figures(weights, probe_ids(tokenizer, asked), calibrated,
                                                          request.speed)}
    return {"run": experiment.name, "step": checkpoint.step, "config_hash": config_hash(experiment), "request": of,
            **result, "sources": sources, **dist.gather_json(found, world.device)[0]}


def source_figures(model: GPT, tokenizer: Tokenizer, experiment: Experiment, world: World, tokens: int | None,
                   whole: dict[str, Any]) -> dict[str, Any] | None:
    """Of each source of the validation split alone, of conversations on assistant tokens: {name: {bpb, accuracy,
    targets, bytes, tokens, truncated, base, dual}}; null of text from one source. Collective.

    bpb and accuracy are those of what the run trains: the last specialist, or the full pool. base and dual (its pool
    with the base) are {bpb, accuracy} of a specialist, else null. `whole` is the result of all of them together, which
    of a single source is its own. Of conversations every source is read for `tokens`, of text for its equal share of
    them: a mixture has many.
    """
    names, chats = [source.name for source in experiment.data.val], experiment.data.kind == "conversations"
    if len(names) == 1:
        return {names[0]: source_figure(whole)} if chats else None
    each = tokens if chats else -(-(tokens or experiment.evaluation.tokens) // len(names))
    with dist.agree(world.device):
        alone = validation_by_source(experiment, tokenizer, world, each)
    return {name: source_figure({**evaluate(model, batches, tokenizer.token_bytes), "truncated": batches.truncated})
            for name, batches in alone.items()}


def source_figure(result: dict[str, Any]) -> dict[str, Any]:
    """One source of source_figures from its evaluation."""
    full, special = {key: result[key]["full"] for key in ("bpb", "accuracy")}, result["specialists"]
    if special is None:
        trained, base, dual = full, None, None
    else:
        trained, dual = ({key: special[key][view][-1] for key in full} for view in ("specialist", "dual"))
        base = full
    return {**trained, **{key: result[key] for key in ("targets", "bytes", "tokens", "truncated")}, "base": base,
            "dual": dual}


def _shown(batches: EvalBatches, show: Callable[[int, int], None]) -> Iterator[Tensor]:
    done, total = 0, sum(len(rows) for rows in batches)
    for rows in batches:
        yield rows
        done += len(rows)
        show(done, total)


def gathered(mine: Tensor, sequence_len: int, world: World) -> Tensor:
    """Tables (rows, T, F) of all ranks as one process would have seen their rows: row i came from rank i mod W."""
    if world.size == 1:
        return mine
    counts = [int(n) for n in dist.gather_json(len(mine), world.device)]
    most = max(counts)
    if not most:
        return mine
    mine = mine.view(len(mine), sequence_len, mine.size(-1))                       # without rows it has no T either
    padded = F.pad(mine, (0, 0, 0, 0, 0, most - len(mine))).contiguous().to(world.device)
    everything = padded.new_empty(world.size * most, *padded.shape[1:])
    dist.all_gather(everything, padded).wait()
    return everything.view(world.size, most, *padded.shape[1:]).transpose(0, 1).flatten(0, 1)[:sum(counts)].cpu()


def mode_figures(weights: Weights, prompts: list[list[int]], calibrated: dict[str, Any], speed: bool) -> dict[str, Any]:
    """Every mode on the prompts (the seven probes) x 60 tokens, greedy, one at a time, in turns with plain decoding.

    {prompts, tokens, threads, device, speculative and speculative_auto: {drafts, prefix, ..}, wand_max, wand_p99,
    wand_lead, wand_lead_p99, routed}; each as of nanopoe.infer.measure.compare. Times are of this machine now; null
    without `speed`.
    """
    engine = Engine(weights)
    found: dict[str, Any] = {"prompts": len(prompts), "tokens": MODE_TOKENS, "threads": torch.get_num_threads(),
                             "device": str(weights.device)}
    modes = calibrated_modes(calibrated)
    for name, figures in compare(engine, modes, prompts, MODE_TOKENS, repeats=3 if speed else 1).items():
        mode = modes[name]
        drafter = {"drafts": mode.drafts, "prefix": mode.prefix} if isinstance(mode, Speculative) else {}
        found[name] = {**drafter, **figures, **({} if speed else dict.fromkeys(TIMES))}
    return found
