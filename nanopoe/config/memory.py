"""The memory planner: what one rank holds at the fullest moment of a training step, in bytes, by arithmetic alone.

A step is walked through as it runs (model/stages.py, model/head.py, optim/dist_muon_adamw.py): every head, every
block's backward, the embedding's, the reduction and every parcel of the update is a Moment, and the fullest counts.
Weights and optimizer state are there at all of them. Measured beside it: `scripts.bench memory`. Of a GPU no figure was
measured: its norm and attention count as fused kernels, blocks as not compiled, and what libraries take or is lost
between blocks of memory is not in it; runtime.float8 counts as bfloat16. Evaluations and saves are no part of a step.

Letters: R rows x length of a micro-batch, d width, V vocabulary, u = R d elements in the compute dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby

from nanopoe.config.check import divisors
from nanopoe.config.counts import block_shapes, group_of, parameter_shapes, trained_shapes
from nanopoe.config.layout import CHUNK_ELEMENTS, SMEAR_CHANNELS, VE_GATE_CHANNELS, layout_of
from nanopoe.config.plan import Plan, make_plan, parameter_homes, valid_world_sizes
from nanopoe.config.schema import Experiment
from nanopoe.config.shares import FLIGHT_BYTES, Kind, Piece, share_out, state_elements

FP32, INT64 = 4, 8
CPU_ROWS, TILE_ELEMENTS = 512, 1 << 20     # of model/head.py
PARCEL = 8                                 # of optim/dist_muon_adamw.py
CACHE_BLOCK = 1 << 18                      # of optim/kernels.py
GIB = 1 << 30
USABLE = 0.9                               # of a GPU's memory: the rest is its libraries' and lost between blocks


@dataclass(frozen=True)
class Memory:
    """Bytes of the fullest rank at the fullest moment of a step, which `peak` names. `gradients` are the sums it owns,
    whole ones of what several stages train, and those on their way; `activations` all else that a step allocates."""

    weights: int
    optimizer: int
    gradients: int
    activations: int
    peak: str

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.gradients + self.activations

    def as_dict(self) -> dict[str, int | str]:
        return asdict(self) | {"total": self.total}


@dataclass(frozen=True)
class Moment:
    name: str
    gradients: int
    activations: int


def memory_per_rank(exp: Experiment, world_size: int) -> Memory:
    """The fullest of `world_size` ranks (ZeRO-2): fp32 weights whole, optimizer state and summed gradients of what it
    owns, and what a step needs beside them. ConfigError for a world size that does not fit."""
    weights = FP32 * sum(math.prod(shape) for shape in parameter_shapes(exp.model).values())
    found = []
    for rank in Shares(exp, world_size).ranks():
        moment = max(Step(exp, rank).moments(), key=lambda m: m.gradients + m.activations)
        found.append(Memory(weights, rank.state, moment.gradients, moment.activations, moment.name))
    return max(found, key=lambda memory: memory.total)


# -- what a rank owns -------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Rank:
    """A rank's place in the plan; bytes of its optimizer state, and of the sums it owns by parameter. `whole` are the
    shapes of what it trains, `late` what it adds up whole over a step (parallel.stages)."""

    plan: Plan
    column: int
    ranks: int                           # that gradients are summed over; 1: nothing is sent
    state: int
    owned: dict[str, int]
    whole: dict[str, tuple[int, ...]]
    late: frozenset[str]


class Shares:
    """Who owns what, of all ranks."""

    def __init__(self, exp: Experiment, world_size: int):
        self.plan, self.trained = make_plan(exp, world_size), trained_shapes(exp.model)
        self.homes = parameter_homes(exp.model, self.plan)
        self.kinds: dict[str, Kind] = {n: "muon" if group_of(n) == "matrices" else "adamw" for n in self.trained}
        self.pieces = share_out(self.trained, self.kinds, world_size, self.homes)
        self.world_size = world_size

    def ranks(self) -> Iterator[Rank]:
        """Those that differ in what they own, or run."""
        mine: list[list[Piece]] = [[] for _ in range(self.world_size)]
        for piece in self.pieces:
            mine[piece.owner].append(piece)
        late = frozenset(self.trained) - self.homes.keys() if self.homes else frozenset()
        for number, pieces in enumerate(mine):
            column = self.plan.place(number)[1]
            shapes = [(p.param, (p.high - p.low, *self.trained[p.param][1:])) for p in pieces]
            trains = {name: shape for name, shape in self.trained.items()
                      if number in self.homes.get(name, range(self.world_size))}
            yield Rank(self.plan, column, self.plan.world_size,
                       FP32 * sum(state_elements(self.kinds[name], shape) for name, shape in shapes),
                       {name: FP32 * math.prod(shape) for name, shape in shapes}, trains, late)


# -- a step -----------------------------------------------------------------------------------------------------------

class Step:
    """One step of a rank, of which `moments` are the full ones.

    Over the micro-batches sums are whole from the first on, so the last is the fullest: `later` says there are several.
    """

    def __init__(self, exp: Experiment, rank: Rank):
        self.exp, self.m, self.rank, self.layout = exp, exp.model, rank, layout_of(exp.model)
        runtime = exp.runtime
        self.cpu = runtime.device == "cpu"
        self.size = 4 if runtime.compute_dtype == "float32" or (runtime.compute_dtype == "auto" and self.cpu) else 2
        self.rows = rank.plan.device_batch_size * self.m.sequence_len
        self.u = self.rows * self.m.n_embd * self.size
        self.later = rank.plan.micro_steps > 1
        self.upcast = self.rows * self.m.n_embd * FP32 if self.cpu or self.size == FP32 else self.u
        self.kv = self.m.n_kv_head * self.layout.head_dim
        self.vocab = self.layout.padded_vocab * self.m.n_embd * FP32

    # -- blocks

    def layers(self, k: int) -> list[int | None]:
        """Of stage k, a specialist's as None."""
        if self.m.specialists:
            return [None] * self.m.specialists[-1].n_layer
        return list(self.layout.stage_layers(k))

    def saved(self, layer: int | None) -> int:
        """Bytes that a block keeps for its backward.

        Three residual states (its input, and both inputs of norms, which a CPU keeps in fp32); both normed; q and k
        before their norm; q, k, v as attention reads them and what it gives; the squared MLP; norms' factors of rows;
        and where there are value embeddings these and their gate. Shorter dtypes add a copy of every matrix. Windows
        on a CPU are fp32, without groups, and what they give is copied once.
        """
        R, d, s, H = self.rows, self.m.n_embd, self.size, self.m.n_head
        norm = self.upcast // (R * d)                            # bytes of an element that a norm keeps
        total = self.u + 2 * self.upcast + 2 * self.u + R * (d + self.kv) * norm
        windowed = layer is not None and self.layout.window_sizes[layer] < self.m.sequence_len - 1
        if (windowed or self.exp.data.document_mask) and self.cpu:
            total += 3 * R * d * FP32 + self.u
        else:
            total += R * (2 * d + 2 * self.kv) * s + R * H * FP32
        total += R * self.layout.intermediate * s + R * (2 + H + self.m.n_kv_head) * FP32
        if layer in self.layout.ve_layers:
            total += R * (self.kv + VE_GATE_CHANNELS + 2 * self.m.n_kv_head) * s
        return total + self.casts(layer)

    def kept(self, layer: int | None) -> int:
        """`saved` between forward and backward: with activation checkpointing only its input."""
        return self.u if self.exp.runtime.activation_checkpointing else self.saved(layer)

    def casts(self, layer: int | None) -> int:
        """Bytes of a block's matrices in a shorter compute dtype."""
        if self.size == FP32:
            return 0
        return self.size * sum(map(math.prod, block_shapes(self.m, "", layer in self.layout.ve_layers).values()))

    def embedded(self) -> int:
        """x0, and what embedding, norm and smear keep for the backward (a specialist's: nothing)."""
        if self.m.specialists:
            return self.u
        narrow = self.rows * (SMEAR_CHANNELS * self.size + 5 * FP32)
        return self.u + self.upcast + self.u + narrow

    # -- the head

    @cached_property
    def pool(self) -> int:
        """fp32 (R, V) of all stages: a loss that reads it, or the pool's loss that a run reports now and then."""
        several = self.layout.n_stages > 1 and not self.m.specialists and self.m.poe_mode != "none"
        return self.rows * self.m.vocab_size * FP32 if several and not self.rank.plan.stages else 0

    def head(self) -> tuple[int, int]:
        """(bytes at a chunk of FusedHead, bytes at the head's backward), both beside what is there before."""
        V, d, s = self.m.vocab_size, self.m.n_embd, self.size
        n = min(max(1, CHUNK_ELEMENTS // V), self.rows)
        n, width = (min(n, CPU_ROWS), 0) if self.cpu else (n, V)
        width = width or min(V, max(64, TILE_ELEMENTS // n))
        both = 2 * self.u + (self.upcast if s < FP32 and self.cpu else 0) + V * d * FP32       # normed, dx, d_weight
        both += self.vocab if self.layout.stage_heads or self.m.specialists else 0             # heads added up
        chunk = n * V * s + 2 * n * width * FP32 + n * d * s                                   # gradient, tiles, h
        if s < FP32:
            chunk += n * V * FP32 + n * width * s + V * d * s                                  # kept, raw, weight
            chunk += max(n * V * FP32 if self.cpu else 0, V * d * s)                           # scatter_ | h^T g
        else:
            chunk += n * d * s                                                                 # dh
        crop = self.vocab if self.layout.padded_vocab != V else 0
        return both + chunk, both + crop + self.vocab

    # -- the walk

    def moments(self) -> Iterator[Moment]:
        yield from self.micro_batch()
        yield from self.update()

    def micro_batch(self) -> Iterator[Moment]:
        """The last of a step."""
        plan, u = self.rank.plan, self.u
        stages = range(1 if self.m.specialists else self.layout.n_stages)
        if plan.stages:
            stages = plan.stages[self.rank.column]
        local = self.m.poe_mode == "flat" and not self.m.specialists
        ids = INT64 * (plan.micro_steps * plan.device_batch_size * (plan.sequence_len + 1) + 4 * self.rows)
        always = ids + self.embedded() + self.pool + (u * self.later if plan.stages else 0)    # a state being sent
        always += u if plan.stages and self.rank.column else 0                                 # a state received
        sums = sum(self.rank.owned.values()) if self.later else 0
        whole = sum(self.computed[name] for name in self.rank.late) if self.later else 0
        chunk, backward = self.head()
        kept: list[int | None] = []
        sent = 0
        for i, k in enumerate(stages):
            kept += self.layers(k)
            waiting = min(i, 1) * u if local else i * u                                        # gradients of heads
            alive = always + sum(map(self.kept, kept)) + u + waiting + (u if i and local else 0)
            gradients = sums + whole + self.flying(sent)
            yield Moment(f"head of stage {k}", gradients, alive + chunk)
            yield Moment(f"backward of head {k}", gradients, alive + backward)
            if i == 0 and not self.rank.late:
                whole = self.vocab if len(stages) > 1 else 0
            if not self.later:
                sums += sum(self.rank.owned.get(name, 0) for name in self.heads(k, len(stages)))
                whole = max(whole, self.vocab if self.rank.late else 0)
            if local or k == stages[-1]:
                top = alive + (u if not waiting or not local else 0)
                yield from self.backward(kept, top, sums + whole)
                sums += 0 if self.later else sum(self.of_block(layer, self.rank.owned) for layer in kept)
                sent = sum(self.of_block(layer, self.computed) for layer in kept)
                kept = []
        if not self.m.specialists and (not plan.stages or self.rank.column == 0 or not self.m.detach_x0):
            yield Moment("backward of the embedding", sums + whole + self.vocab, always + 6 * u)

    def backward(self, layers: list[int | None], alive: int, gradients: int) -> Iterator[Moment]:
        """Of blocks, the last first. The MLP has its gradient twice (R, I) for a moment; attention four of (R, d) in
        fp32 on a CPU, after what the MLP kept is gone; value embeddings a whole (V, kv)."""
        inner, u = self.rows * self.layout.intermediate * self.size, self.u
        matrix, sent = self.m.n_embd * self.layout.intermediate * FP32, 0
        for layer in reversed(layers):
            backout = u if self.m.poe_mode == "none" and layer is not None and layer >= self.m.n_layer // 2 else 0
            flying = self.flying(sent)
            alive += self.saved(layer) - self.kept(layer)                                      # run again
            yield Moment(f"backward of block {layer}", gradients + matrix + flying, alive + 2 * inner + backout)
            below = alive - inner - u - self.upcast + 4 * self.rows * self.m.n_embd * FP32 + 2 * u
            table = self.layout.padded_vocab * self.kv * FP32 if layer in self.layout.ve_layers else 0
            yield Moment(f"backward of block {layer}", gradients + table + flying, below + backout)
            alive -= self.saved(layer)
            gradients += 0 if self.later else self.of_block(layer, self.rank.owned)
            sent += self.of_block(layer, self.computed)
            if layer == layers[-1]:
                alive += u                                                                     # into x0

    def of_block(self, layer: int | None, sizes: dict[str, int]) -> int:
        """The share of one block in `sizes`."""
        if layer is None:
            return sum(b for n, b in sizes.items() if ".h." in n) // self.m.specialists[-1].n_layer
        names = (f"transformer.h.{layer}.", f"value_embeds.{layer}.")
        return sum(b for n, b in sizes.items() if n.startswith(names))

    @cached_property
    def computed(self) -> dict[str, int]:
        """Bytes of the whole gradients that this rank computes."""
        return {name: FP32 * math.prod(shape) for name, shape in self.rank.whole.items()}

    def heads(self, k: int, stages: int) -> list[str]:
        """Whose sums are there after head k."""
        if self.m.specialists:
            return [n for n in self.rank.owned if n.endswith(".lm_head_stage.weight")]
        return [f"lm_head_stages.{k}.weight", *(["lm_head.weight"] if stages == 1 and not self.rank.late else [])]

    def flying(self, sent: int) -> int:
        """Bytes of gradients on their way to other ranks, of `sent` that the backward has just let go of.

        A bound: how many have arrived is the network's. In `strict` an owner also has every rank's.
        """
        if self.rank.ranks == 1:
            return 0
        newest = 2 * FP32 * max(map(math.prod, self.rank.whole.values()))
        return min(sent, FLIGHT_BYTES + newest) * (2 if self.exp.runtime.numerics == "strict" else 1)

    def update(self) -> Iterator[Moment]:
        """Parcel by parcel in the order of the groups, AdamW's first; each lets go of its gradients.

        AdamW needs two temporaries, of blocks on a CPU. Muon needs, of a parcel of `unit` bytes: values, gradients,
        Nesterov's sum and the update (4), their signs as bytes (1/4) and three products, on a CPU one more for the
        signs in fp32; or 4 and five Gram matrices, in the polar iteration.
        """
        left = sum(self.rank.owned.values())
        if self.rank.late:
            late = sum(self.computed[name] for name in self.rank.late)
            yield Moment("reduction of what all columns train", left + late, 0)
        matrices = {n: b for n, b in self.rank.owned.items() if group_of(n) == "matrices"}
        for name, size in self.rank.owned.items():
            if name not in matrices:
                yield Moment(f"update of {name}", left, 2 * (min(size, CACHE_BLOCK * FP32) if self.cpu else size))
        left = sum(matrices.values())
        strict = self.exp.runtime.numerics == "strict"
        ordered = sorted(matrices, key=lambda n: self.rank.whole[n])
        for shape, names in groupby(ordered, key=lambda n: self.rank.whole[n]):
            count, small, one = len(list(names)), min(shape), FP32 * math.prod(shape)
            while count:
                unit = one * (1 if strict else min(count, PARCEL))
                gram = small**2 / math.prod(shape)
                polar = 4 + 5 * gram if self.size == FP32 else 4 + 2.5 * gram
                stacks = 2 if strict else 0
                yield Moment(f"update of matrices {shape[0]} x {shape[1]}", left,
                             int(unit * (max(8.25 if self.cpu else 7.25, polar) - stacks)))
                left -= one * min(count, PARCEL)
                count -= min(count, PARCEL)


# -- what fits --------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Fit:
    """The largest `device_batch_size` within `usable` bytes, with its plan; if none fits it is null, `memory` is the
    smallest batch's, and `do` says what would help."""

    usable: int
    device_batch_size: int | None
    micro_steps: int
    memory: Memory
    do: str

    def as_dict(self) -> dict[str, object]:
        return asdict(self) | {"memory": self.memory.as_dict()}


def largest_batch(exp: Experiment, world_size: int, gpu_bytes: int) -> Fit:
    """What fits into 90 % of a GPU's memory on each of `world_size` ranks, of the batches that share the step out
    evenly among them. ConfigError if there are none."""
    usable, rows = int(USABLE * gpu_bytes), exp.batch.tokens_per_step // exp.model.sequence_len
    on_gpu = exp.model_copy(update={"runtime": exp.runtime.model_copy(update={"device": "cuda"})})
    candidates = [on_gpu.model_copy(update={"batch": exp.batch.model_copy(update={"device_batch_size": b})})
                  for b in reversed(divisors(rows))]
    valid = [e for e in candidates if world_size in valid_world_sizes(e)]
    if not valid:
        make_plan(candidates[-1], world_size)                    # says why
    for e in valid:
        memory = memory_per_rank(e, world_size)
        if memory.total <= usable:
            break
    b, micro_steps = e.batch.device_batch_size, make_plan(e, world_size).micro_steps
    if memory.total <= usable:
        return Fit(usable, b, micro_steps, memory, f"batch.device_batch_size={b}")
    return Fit(usable, None, micro_steps, memory, "; ".join(_savings(e, world_size, memory)))


def _savings(exp: Experiment, world_size: int, least: Memory) -> Iterator[str]:
    """What would make the smallest batch need less, with the GiB it would then plan."""
    stages = layout_of(exp.model).n_stages
    changes: list[tuple[str, Experiment, int]] = []
    if not exp.runtime.activation_checkpointing:
        again = exp.model_copy(update={"runtime": exp.runtime.model_copy(update={"activation_checkpointing": True})})
        changes.append(("runtime.activation_checkpointing=true", again, world_size))
    if exp.model.poe_mode == "flat" and exp.objective.kind == "ce" and not exp.model.specialists:
        parted = exp.model_copy(update={"parallel": exp.parallel.model_copy(update={"stages": stages})})
        ranks = next((n for n in valid_world_sizes(parted) if n >= world_size), None)
        if exp.parallel.stages < stages and ranks is not None:
            changes.append((f"parallel.stages={stages} on {ranks} ranks", parted, ranks))
    if (ranks := valid_world_sizes(exp)[-1]) > world_size:
        changes.append((f"{ranks} ranks", exp, ranks))
    for name, changed, ranks in changes:
        total = memory_per_rank(changed, ranks).total
        if total < least.total:
            yield f"{name} plans {total / GIB:,.2f} GiB"
    yield "a shorter model.sequence_len, or a smaller model"
