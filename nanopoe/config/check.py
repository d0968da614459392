"""What a valid file can still get wrong: rules between fields. Everything is listed; nothing is ever adjusted."""

from __future__ import annotations

import fnmatch
import posixpath
from collections import Counter
from collections.abc import Iterator

from nanopoe.config.layout import SMEAR_CHANNELS
from nanopoe.config.schema import CycleConfig, DataConfig, Experiment, ModelConfig, SourceConfig

SMALLEST_VOCAB = 256 + 9      # every byte, and the nine special tokens


def check(exp: Experiment) -> list[str]:
    """Problems of an experiment whose fields are valid one by one, `key: what` a line; empty if there are none."""
    return [*check_model(exp.model), *_task(exp), *_objective(exp), *_parallel(exp), *_attention(exp), *_float8(exp),
            *_batch(exp), *_data(exp.data), *_folders(exp),
            *(p for i, cycle in enumerate(exp.schedule.cycles) for p in _cycle(i, cycle))]


def check_model(m: ModelConfig) -> list[str]:
    """Of `check`, what is about the model alone."""
    return [*_shape(m), *_stages(m), *_specialists(m)]


def divisors(n: int) -> list[int]:
    """All positive divisors, ascending."""
    small = [i for i in range(1, int(n**0.5) + 1) if n % i == 0]
    return sorted({*small, *(n // i for i in small)})


def _some_divisors(n: int) -> str:
    found = divisors(n)
    return ", ".join(map(str, found[:12])) + (", ..." if len(found) > 12 else "")


def _shape(m: ModelConfig) -> Iterator[str]:
    if m.n_embd < SMEAR_CHANNELS:
        yield f"model.n_embd: {m.n_embd} is too narrow; the smear gate reads {SMEAR_CHANNELS} channels"
    if m.n_embd % m.n_head:
        yield f"model.n_head: {m.n_head} does not divide n_embd {m.n_embd}; choose a divisor"
    elif m.n_embd // m.n_head % 2:
        yield f"model.n_head: head dim {m.n_embd // m.n_head} is odd; rotary positions turn pairs of channels"
    if m.n_head % m.n_kv_head:
        yield f"model.n_kv_head: {m.n_kv_head} does not divide n_head {m.n_head}; use one of {_some_divisors(m.n_head)}"
    if m.vocab_size < SMALLEST_VOCAB:
        yield f"model.vocab_size: {m.vocab_size} is below {SMALLEST_VOCAB} (256 bytes and nine special tokens)"
    if m.ve_layers is not None and (list(m.ve_layers) != sorted(set(m.ve_layers))
                                    or any(i >= m.n_layer for i in m.ve_layers)):
        yield f"model.ve_layers: must be ascending layers below n_layer {m.n_layer}"
    if m.window_sizes is not None and (len(m.window_sizes) != m.n_layer or max(m.window_sizes) > m.sequence_len):
        yield f"model.window_sizes: needs {m.n_layer} windows (n_layer), none over sequence_len {m.sequence_len}"


def _stages(m: ModelConfig) -> Iterator[str]:
    if m.poe_mode == "none":
        for key in ("poe_every", "poe_stage_layers"):
            if getattr(m, key) is not None:
                yield f"model.{key}: must be null with poe_mode none, which has no stages"
        if m.stage_heads:
            yield "model.stage_heads: must be false with poe_mode none, which has no stages"
        if m.detach_x0:
            yield "model.detach_x0: must be false with poe_mode none, which has no stages"
    elif (m.poe_every is None) == (m.poe_stage_layers is None):
        yield f"model.poe_every: poe_mode {m.poe_mode} needs either poe_every or poe_stage_layers, the other null"
    elif m.poe_every is not None and m.n_layer % m.poe_every:
        yield (f"model.poe_every: {m.poe_every} does not divide n_layer {m.n_layer}; "
               f"use one of {_some_divisors(m.n_layer)}")
    elif m.poe_stage_layers is not None and sum(m.poe_stage_layers) != m.n_layer:
        yield (f"model.poe_stage_layers: {_short(m.poe_stage_layers)} sums to {sum(m.poe_stage_layers)}, "
               f"n_layer is {m.n_layer}")


def _specialists(m: ModelConfig) -> Iterator[str]:
    for i, shape in enumerate(m.specialists):
        if shape.parent is not None and shape.parent >= i:
            yield (f"model.specialists.{i}.parent: {shape.parent} does not come before it; "
                   f"null is the base{f', 0 to {i - 1} those before' if i else ''}")


def _task(exp: Experiment) -> Iterator[str]:
    """What each task needs, and what has no meaning in it."""
    task, given = exp.task, {"init_from": exp.init_from, "specialist": exp.specialist}
    needed = {"pretrain": None, "sft": "init_from", "specialist": "specialist"}[task]
    for key, value in given.items():
        if (value is not None) != (key == needed) and (key, task) != ("init_from", "pretrain"):
            yield f"{key}: {'needed' if key == needed else 'must be null'} with task {task}"
    if exp.init_from is not None and (exp.init_from.optimizer is None) == (task == "pretrain"):
        yield f"init_from.optimizer: {'needed' if task == 'pretrain' else 'must be null'} with task {task}" + (
            ", true or false" if task == "pretrain" else ", which begins with an optimizer of its own")
    if bool(exp.model.specialists) != (task == "specialist"):
        yield f"model.specialists: {'needed' if task == 'specialist' else 'must be empty'} with task {task}"
    if (exp.optim.embedding_lr is None) != (task == "specialist"):
        yield (f"optim.embedding_lr: {'must be null' if task == 'specialist' else 'needed'} with task {task}, which "
               f"trains {'no' if task == 'specialist' else 'the'} embeddings")
    if task == "sft" and exp.data.kind != "conversations":
        yield f"data.kind: task sft needs conversations, got {exp.data.kind}"
    if task == "specialist" and (exp.objective.kind != "ce" or exp.objective.alpha):
        yield "objective: a specialist has one loss, so kind must be ce and alpha 0"
    if task == "specialist" and not is_one_chain(exp.model):
        yield "model.specialists: a run trains the end of one chain; every parent must be the specialist before"
    if task == "specialist" and (exp.name == "base" or exp.name.isdecimal()):
        yield f"name: a specialist cannot be called {exp.name!r}; the base and stages are called so"
    if exp.specialist and exp.specialist.warm_start and len(exp.model.specialists) > 1:
        yield "specialist.warm_start: must be false on another specialist, whose chat tokens it reads"
    if exp.specialist and exp.specialist.cache_states and exp.data.replay_steps is None:
        yield "specialist.cache_states: no row comes again without data.replay_steps; set it, or false"


def is_one_chain(m: ModelConfig) -> bool:
    return [shape.parent for shape in m.specialists] == [None, *range(len(m.specialists) - 1)][:len(m.specialists)]


def _short(items: tuple[int, ...]) -> str:
    return str(list(items)) if len(items) <= 16 else f"a list of {len(items)}"


def _objective(exp: Experiment) -> Iterator[str]:
    o, mode = exp.objective, exp.model.poe_mode
    if o.kind == "residual_logop" and mode != "flat":
        yield f"objective.kind: residual_logop needs poe_mode flat (the pool before a stage is fixed), got {mode}"
    if o.kind == "residual_logop" and o.rho is None:
        yield "objective.rho: residual_logop needs it (0.5 is the published choice)"
    if o.kind != "residual_logop" and o.rho is not None:
        yield f"objective.rho: must be null with kind {o.kind}, which does not use it"


def _parallel(exp: Experiment) -> Iterator[str]:
    """What stages on different ranks cannot do: they exchange boundary states, forward, and nothing else."""
    m, P = exp.model, exp.parallel.stages
    if P == 1:
        return
    if exp.task == "specialist":
        yield f"parallel.stages: must be 1 with task specialist, which trains one stage; got {P}"
    elif m.poe_mode != "flat":
        yield f"parallel.stages: {P} needs poe_mode flat, where no gradient crosses a boundary; got {m.poe_mode}"
    else:
        K = len(m.poe_stage_layers) if m.poe_stage_layers else m.n_layer // (m.poe_every or m.n_layer)
        if P > K:
            yield f"parallel.stages: {P} ranks cannot share {K} stage{'s' * (K > 1)}; use {K} or fewer"
    if exp.objective.kind == "residual_logop":
        yield (f"parallel.stages: must be 1 with objective residual_logop, got {P}; its stages read the "
               "log-probabilities of all before, vocabulary-wide")
    if exp.runtime.numerics == "strict":
        yield (f"parallel.stages: must be 1 with runtime.numerics strict, got {P}; gradients of shared parameters are "
               "added up by rank, which is another order")


def _attention(exp: Experiment) -> Iterator[str]:
    if exp.data.document_mask and exp.runtime.attention == "flash":
        yield "runtime.attention: flash has no masks of documents (data.document_mask); use auto or flex"


def _float8(exp: Experiment) -> Iterator[str]:
    """Tensor cores take 16 numbers of 8 bits at a time, along every side of a product."""
    if not exp.runtime.float8:
        return
    m, rows = exp.model, exp.batch.device_batch_size * exp.model.sequence_len
    for key, size in (("model.n_embd", m.n_embd), ("model.n_kv_head", m.n_embd // m.n_head * m.n_kv_head),
                      ("model.intermediate_size", m.intermediate_size or 4 * m.n_embd),
                      ("batch.device_batch_size", rows)):
        if size % 16:
            yield f"{key}: with runtime.float8 products need sides that are multiples of 16, this makes one of {size}"


def _batch(exp: Experiment) -> Iterator[str]:
    tokens, micro = exp.batch.tokens_per_step, exp.model.sequence_len * exp.batch.device_batch_size
    if tokens % micro:
        below, above = tokens // micro * micro, -(-tokens // micro) * micro
        near = f"{below} or {above}" if below else f"{above}"
        yield (f"batch.tokens_per_step: {tokens} is not a multiple of sequence_len * device_batch_size = {micro}; "
               f"nearest {near}")


def _cycle(index: int, c: CycleConfig) -> Iterator[str]:
    at, down = f"schedule.cycles.{index}", round(c.warmdown_ratio * c.steps)
    if c.warmup_steps + down > c.steps:
        yield f"{at}.warmup_steps: {c.warmup_steps} + warm-down {down} exceed the cycle's {c.steps} steps"
    if c.momentum_warmup_steps + down > c.steps:
        yield (f"{at}.momentum_warmup_steps: {c.momentum_warmup_steps} + warm-down {down} exceed "
               f"the cycle's {c.steps} steps")


def _data(d: DataConfig) -> Iterator[str]:
    for split, sources in (("train", d.train), ("val", d.val)):
        for name, n in Counter(s.name for s in sources).items():
            if n > 1:
                yield f"data.{split}: {n} sources named {name!r}; names are keys"
        for i, source in enumerate(sources):
            if not source.path:
                yield f"data.{split}.{i}.path: empty"
            if source.files is not None and (not source.files or "/" in source.files):
                yield f"data.{split}.{i}.files: {source.files!r} is not a pattern of file names inside the folder"
    yield from _kind(d)
    for i, val in enumerate(d.val):
        for j, train in enumerate(d.train):
            if _overlap(val, train):
                yield f"data.val.{i}: reads the same files as data.train.{j} ({val.path}); the splits must not overlap"


def _kind(d: DataConfig) -> Iterator[str]:
    """What only text has, and what only conversations have."""
    if (d.kind == "conversations") != (d.packing == "bestfit_pad"):
        yield f"data.packing: {d.packing} does not go with kind {d.kind}; bestfit_pad is for conversations, and only it"
    if (d.kind == "conversations") != (d.json_layout_prob is not None):
        yield (f"data.json_layout_prob: {'needed' if d.kind == 'conversations' else 'must be null'} with kind {d.kind}")
    if d.kind == "conversations":
        if d.case_aug_prob:
            yield "data.case_aug_prob: must be 0 with kind conversations; scripts.prepare_data can copy greetings"
        for split, sources in (("train", d.train), ("val", d.val)):
            for i, source in enumerate(sources):
                if source.weight != 1.0:
                    yield f"data.{split}.{i}.weight: must be 1 with kind conversations, where repeat counts"
                if split == "val" and source.repeat != 1:
                    yield f"data.val.{i}.repeat: must be 1; every conversation is evaluated once"
    elif any(source.repeat != 1 for source in (*d.train, *d.val)):
        yield "data.train: repeat must be 1 with kind text, which has weights"


def _overlap(a: SourceConfig, b: SourceConfig) -> bool:
    """Whether the two surely share files, as far as the names tell: the loader sees the files themselves."""
    if posixpath.normpath(a.path) != posixpath.normpath(b.path):
        return False
    one, other = a.files or "*.parquet", b.files or "*.parquet"
    return one == other or fnmatch.fnmatchcase(one, other) or fnmatch.fnmatchcase(other, one)


def _folders(exp: Experiment) -> Iterator[str]:
    """The run is written into a folder that is clearly meant: no way up, not a root, not the user's data."""
    if exp.name.strip(".") == "":
        yield f"name: {exp.name!r} is not a name"
    if not exp.tokenizer:
        yield "tokenizer: empty"
    if exp.run_dir is None:
        return
    parts = exp.run_dir.replace("\\", "/").split("/")
    if ".." in parts or exp.run_dir.startswith("~") or not any(p.strip(".") for p in parts):
        yield f"run_dir: {exp.run_dir!r} is not a safe folder; name one without '..' or '~', such as out/{exp.name}"
    inputs = [exp.tokenizer, *(s.path for s in (*exp.data.train, *exp.data.val))]
    inputs += [exp.init_from.path] if exp.init_from else [exp.specialist.base] if exp.specialist else []
    if posixpath.normpath(exp.run_dir) in map(posixpath.normpath, inputs):
        yield f"run_dir: {exp.run_dir!r} is also read from; a run needs a folder of its own"
