"""DistMuonAdamW: ZeRO-2. Gradients are reduced to their owners while backward runs, state is held by owners only.

Every parameter is cut into pieces with one owner each (config/shares.py). As soon as backward has finished the
gradient of a parameter, its pieces are on their way to their owners and `.grad` is gone; over the micro-batches of a
step only the owners accumulate. reduce() waits for what is under way, update() changes owned pieces and sends each to
all ranks while the next ones are updated. The update waits for the whole gradient, since a step with a value that is
not finite anywhere must leave every weight and moment as it was. One rank is the same code without the sending.

Two ways to sum. `fast`: the backend's reduction, whose order of additions depends on the world size. `strict`: the
owner gets every rank's micro-gradient and adds them in the order of the global micro-batches, so any world size gives
the same bits on a CPU, at world_size times the traffic into an owner. (On a GPU the backward itself may round otherwise
from one run to the next; what is done here still has one order.)

With stages on different ranks (parallel.stages) a column is the ranks that train the same stages. A stage's parameters
are reduced in, owned by and broadcast in their column; the other ranks keep them as they were until spread(). What
several columns train is added up on every rank, and sent once a step, in reduce(): columns are at different
micro-batches at a time, and a collective of all ranks in between would make them wait for each other.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from nanopoe import dist
from nanopoe.config.shares import FLIGHT_BYTES, Piece, share_out
from nanopoe.optim.groups import Group
from nanopoe.optim.kernels import adamw_, muon_, second_moment_shape

PARCEL = 8                   # matrices of one shape that a rank updates before they are sent


@dataclass(frozen=True)
class StatePart:
    """Rows [row0, row0 + len(tensor)) of one slot of one parameter's state."""

    param: str
    slot: str
    row0: int
    tensor: Tensor


@dataclass
class Owned:
    """A piece and what its owner holds of it; `values` is a view of the parameter's rows."""

    piece: Piece
    values: Tensor
    state: dict[str, Tensor]
    grad: Tensor | None = None          # summed over ranks and micro-batches

    def add(self, grad: Tensor, *, own: bool) -> None:
        """Add to the gradient; `own` says that nobody else needs `grad`."""
        if self.grad is None:
            self.grad = grad if own else grad.clone()
        else:
            self.grad += grad


@dataclass
class Parcel:
    """Pieces of one kind of update that are sent together: all of one AdamW parameter, or matrices of one shape.

    `state` of muon's own shards is stacked (n, ...), each owned's is a view of it, so that one update takes them all.
    """

    group: Group
    pieces: list[Piece]
    own: list[Owned] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Flight:
    """A gradient on its way. `parts` are every rank's, on an owner in strict mode."""

    piece: Piece
    grad: Tensor
    whole: bool                          # the gradient of all of the parameter, not some rows of it
    parts: list[Tensor] | None
    work: dist.Pending


class DistMuonAdamW:
    """`params` are the trainable parameters by name; every one must be in exactly one group, and the reverse.

    `shared` names those that more than one backward call of a micro-batch adds to: their gradient is complete only when
    take() is called. All other gradients leave from a hook, in the order of the backward pass, which is the same on
    every rank. All state is allocated here.

    `homes` names the column (ascending ranks) of every parameter that not all ranks train, and `column` is the process
    group of this rank's, null where it is alone in it.
    """

    def __init__(self, params: Mapping[str, Tensor], groups: list[Group], rank: int = 0, world_size: int = 1,
                 polar_dtype: torch.dtype = torch.float32, numerics: Literal["fast", "strict"] = "fast",
                 shared: Collection[str] = (), homes: Mapping[str, Sequence[int]] | None = None,
                 column: dist.Group | None = None):
        grouped = [name for group in groups for name in group.params]
        if sorted(grouped) != sorted(params):
            odd = sorted(set(grouped) ^ set(params)) or sorted({n for n in grouped if grouped.count(n) > 1})
            raise ValueError(f"every trainable parameter belongs to exactly one group; look at {', '.join(odd)}")
        assert not homes or numerics == "fast", "what columns add up has no strict order"
        self.rank, self.world_size, self.polar_dtype, self.numerics = rank, world_size, polar_dtype, numerics
        self.params = dict(params)
        self.homes, self._column = dict(homes or {}), column
        self._taking = [name for name in params if rank in self._ranks(name) and (name in self.homes or not homes)]
        self._late = [name for name in params if homes and name not in homes]      # sent in reduce()
        self._spread = 0                           # updates done when all ranks last held the same weights
        self.steps = 0                             # updates done, AdamW's bias correction counts them
        kinds = {name: group.kind for group in groups for name in group.params}
        shapes = {name: tuple(params[name].shape) for name in grouped}
        self._pieces: dict[str, list[Piece]] = {name: [] for name in grouped}
        for piece in share_out(shapes, kinds, world_size, homes):
            self._pieces[piece.param].append(piece)
        self.parcels = [self._parcel(group, pieces) for group in groups for pieces in self._parcelled(group)]
        self._owned = {(s.piece.param, s.piece.low): s for parcel in self.parcels for s in parcel.own}
        self.flights: deque[Flight] = deque()
        self._taken: set[str] = set()
        self.listening = True
        for name in self._taking:
            if name not in shared:
                params[name].register_post_accumulate_grad_hook(partial(_complete, weakref.ref(self), name))

    def _ranks(self, name: str) -> Sequence[int]:
        """The ranks that train a parameter."""
        return self.homes.get(name, range(self.world_size))

    def _group(self, name: str) -> dist.Group | None:
        return self._column if name in self.homes else None

    def _parcelled(self, group: Group) -> Iterator[list[Piece]]:
        """The parcels of a group in the order they are updated: the same on every rank."""
        if group.kind == "adamw":
            yield from (self._pieces[name] for name in group.params)
            return
        place: dict[str, tuple[tuple[int, ...], int]] = {}       # shape, and which parcel of its owner's
        count: dict[tuple[object, int], int] = {}
        for name in group.params:
            shape, owner = tuple(self.params[name].shape), self._pieces[name][0].owner
            place[name] = (shape, count.get((shape, owner), 0) // PARCEL)
            count[shape, owner] = count.get((shape, owner), 0) + 1
        for _, names in groupby(sorted(group.params, key=place.__getitem__), key=place.__getitem__):
            yield [self._pieces[name][0] for name in names]

    def _parcel(self, group: Group, pieces: list[Piece]) -> Parcel:
        parcel = Parcel(group, pieces)
        own = [piece for piece in pieces if piece.owner == self.rank]
        if not own:
            return parcel
        shape = self.params[own[0].param].shape
        if group.kind == "muon":
            sizes = {"momentum": shape, "second": second_moment_shape(*shape)}
        else:
            sizes = dict.fromkeys(("exp_avg", "exp_avg_sq"), (own[0].high - own[0].low, *shape[1:]))
        like = self.params[own[0].param].detach()
        parcel.state = {slot: like.new_zeros(len(own), *size) for slot, size in sizes.items()}
        parcel.own = [Owned(piece, self.params[piece.param].detach()[piece.low:piece.high],
                           {slot: stacked[i] for slot, stacked in parcel.state.items()})
                     for i, piece in enumerate(own)]
        return parcel

    # -- gradients to their owners ------------------------------------------------------------------------------

    @torch.no_grad()
    def complete(self, name: str, param: Tensor) -> None:
        """The gradient of `param` over one micro-batch is complete: send its pieces off and let go of it."""
        assert name not in self._taken, f"{name} got two gradients in a micro-batch: it is shared"
        grad, param.grad = param.grad, None
        assert grad is not None and grad.is_contiguous(), f"no plain gradient of {name}: did another take it?"
        self._taken.add(name)
        for piece in self._pieces[name]:
            self._send(piece, grad[piece.low:piece.high], whole=len(self._pieces[name]) == 1)
        older = sum(f.grad.nbytes for f in self.flights if f.piece.param != name)
        while self.flights and self.flights[0].piece.param != name and (self.flights[0].work.done
                                                                        or older > FLIGHT_BYTES):
            older -= self.flights[0].grad.nbytes
            self._land(self.flights.popleft())

    def _send(self, piece: Piece, grad: Tensor, whole: bool) -> None:
        if len(self._ranks(piece.param)) == 1:
            self._owned[piece.param, piece.low].add(grad, own=True)
            return
        parts = None
        if self.numerics == "fast":
            work = dist.reduce_to(grad, piece.owner, self._group(piece.param))
        else:
            if piece.owner == self.rank:
                parts = [torch.empty_like(grad) for _ in range(self.world_size)]
            work = dist.gather_to(grad, parts, piece.owner)
        self.flights.append(Flight(piece, grad, whole, parts, work))

    def _land(self, flight: Flight) -> None:
        flight.work.wait()
        if flight.piece.owner != self.rank:
            return
        owned = self._owned[flight.piece.param, flight.piece.low]
        if flight.parts is None:
            owned.add(flight.grad, own=flight.whole)      # rows of a larger gradient would keep all of it alive
            return
        for part in flight.parts:                         # by rank: the order of the global micro-batches
            owned.add(part, own=True)

    @torch.no_grad()
    def take(self) -> None:
        """End a micro-batch: send off what is not yet, the shared parameters' gradients. Collective in a column."""
        for name in self._taking:
            if name not in self._taken and self.params[name].grad is not None:
                self.complete(name, self.params[name])
        missing = set(self._taking) - self._taken
        assert not missing, f"no gradient: {', '.join(sorted(missing)[:3])}"
        self._taken.clear()

    @torch.no_grad()
    def reduce(self) -> Tensor:
        """Send off what all columns have added up, and wait until every owner has its sums. Returns the squared norm of
        the owned ones, fp64, (). Collective."""
        for name in self._late:
            self.complete(name, self.params[name])
        self._taken.clear()
        while self.flights:
            self._land(self.flights.popleft())
        grads = []
        for owned in self._owned.values():
            assert owned.grad is not None, "take() ends every micro-batch"
            grads.append(owned.grad)
        device = next(iter(self.params.values())).device
        return torch.nn.utils.get_total_norm(grads).to(device, torch.float64).square()

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """Gradients computed in this block stay in `.grad`."""
        self.listening = False
        try:
            yield
        finally:
            self.listening = True

    # -- update -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update(self, lr_scale: float, momentum: float, decay_scale: float, grad_scale: float = 1.0) -> None:
        """Update owned pieces with the reduced gradients (times `grad_scale`), then give every rank those it trains.

        `lr_scale` multiplies every rate, `decay_scale` Muon's weight decay (the schedule's values of this step).
        """
        self.steps += 1
        under_way = []
        for parcel in self.parcels:
            for owned in parcel.own:
                assert owned.grad is not None, "reduce() comes before update()"
                if grad_scale != 1.0:
                    owned.grad = owned.grad * grad_scale
            if parcel.own:
                self._apply(parcel, lr_scale, momentum, decay_scale)
            for owned in parcel.own:
                owned.grad = None
            under_way += [dist.broadcast(self._values(p), p.owner, self._group(p.param)) for p in parcel.pieces
                          if self.rank in self._ranks(p.param) and len(self._ranks(p.param)) > 1]
        for work in under_way:
            work.wait()

    @torch.no_grad()
    def spread(self) -> None:
        """Give every rank the weights that other columns train, for an evaluation, a save or a comparison; nothing if
        that was done since the last update. Collective.

        A rank's own column keeps its copies, right or wrong: a comparison of ranks is to see them.
        """
        if self.homes and self._spread < self.steps:
            for parcel in self.parcels:
                pieces = [p for p in parcel.pieces if p.param in self.homes]
                kept = [self.rank in self._ranks(p.param) and self.rank != p.owner for p in pieces]
                for work in [dist.broadcast(torch.empty_like(self._values(p)) if keep else self._values(p), p.owner)
                             for p, keep in zip(pieces, kept, strict=True)]:
                    work.wait()
        self._spread = self.steps

    def _values(self, piece: Piece) -> Tensor:
        return self.params[piece.param].detach()[piece.low:piece.high]

    def _apply(self, parcel: Parcel, lr_scale: float, momentum: float, decay_scale: float) -> None:
        group, own, lr = parcel.group, parcel.own, parcel.group.lr * lr_scale
        if group.kind == "adamw":
            for s in own:
                adamw_(s.values, s.grad, s.state["exp_avg"], s.state["exp_avg_sq"], self.steps, lr,  # type: ignore[arg-type]
                       group.betas, group.eps, group.weight_decay)
            return
        decay = group.weight_decay * decay_scale
        if self.numerics == "strict":      # one by one: the bits cannot depend on how many matrices a rank owns
            for s in own:
                muon_(s.values, s.grad, s.state["momentum"], s.state["second"], lr, momentum,  # type: ignore[arg-type]
                      group.beta2, decay, self.polar_dtype)
            return
        values = torch.stack([s.values for s in own])
        grads = torch.stack([s.grad for s in own])                                                # type: ignore[misc]
        muon_(values, grads, parcel.state["momentum"], parcel.state["second"], lr, momentum, group.beta2, decay,
              self.polar_dtype)
        torch._foreach_copy_([s.values for s in own], list(values.unbind()))

    def discard(self) -> None:
        """Forget the gradients: the step is not taken."""
        while self.flights:
            self._land(self.flights.popleft())
        self._taken.clear()
        for owned in self._owned.values():
            owned.grad = None
        for param in self.params.values():
            param.grad = None

    # -- state --------------------------------------------------------------------------------------------------

    def state_names(self) -> list[str]:
        """`<param>::<slot>` of all state there is, whoever owns it."""
        slots = {"muon": ("momentum", "second"), "adamw": ("exp_avg", "exp_avg_sq")}
        return [f"{name}::{slot}" for parcel in self.parcels for name in dict.fromkeys(p.param for p in parcel.pieces)
                for slot in slots[parcel.group.kind]]

    def state_parts(self) -> Iterator[StatePart]:
        """This rank's state by parameter name and row."""
        for owned in self._owned.values():
            for slot, tensor in owned.state.items():
                yield StatePart(owned.piece.param, slot, owned.piece.low, tensor)

    @torch.no_grad()
    def load_state(self, rows: Callable[[str, str, int, int], Tensor], steps: int) -> None:
        """Fill the state from `rows(param, slot, low, high)`, whatever world size wrote it."""
        self.steps = self._spread = steps
        for part in self.state_parts():
            part.tensor.copy_(rows(part.param, part.slot, part.row0, part.row0 + part.tensor.size(0)))


def _complete(optimizer: weakref.ref[DistMuonAdamW], name: str, param: Tensor) -> None:
    """The hook. It must not keep the optimizer: the cycle through a parameter's hooks is one that nothing collects."""
    listener = optimizer()
    if listener is not None and listener.listening:
        listener.complete(name, param)
