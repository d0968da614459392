"""DistMuonAdamW: Muon and AdamW with gradients reduced to shards and state held only for what a rank owns (ZeRO-2).

Each bucket is a stack of equal units that is cut evenly over the ranks, the last shares padded or empty:
  muon   all matrices of one shape, a unit is a whole matrix (the polar iteration needs all of it)
  adamw  one tensor, a unit is a row
reduce() sums gradients into this rank's units; update() changes those and gathers the parameters of all. One rank is
the same code with shares of everything. State is keyed by parameter name and row, so any world size can read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanopoe import dist
from nanopoe.optim.groups import Group
from nanopoe.optim.kernels import adamw_, muon_, second_moment_shape


@dataclass(frozen=True)
class StatePart:
    """Rows [row0, row0 + len(tensor)) of one slot of one parameter's state; Muon's parts are whole (row0 = 0)."""

    param: str
    slot: str
    row0: int
    tensor: Tensor


@dataclass
class Bucket:
    """Units [low, high) of `units` are this rank's; `share` is what every rank sends and receives, padding included."""

    group: Group
    names: tuple[str, ...]
    params: list[Tensor]
    units: int
    share: int
    low: int
    high: int
    state: dict[str, Tensor] = field(default_factory=dict)
    grad: Tensor | None = None                     # (high - low, ...) reduced
    in_flight: list[Tensor] = field(default_factory=list)

    @property
    def is_muon(self) -> bool:
        return self.group.kind == "muon"

    def stacked(self, tensors: list[Tensor], low: int, high: int) -> Tensor:
        """Units [low, high) of `tensors`: a view for adamw, a copy for muon."""
        if not self.is_muon:
            return tensors[0][low:high]
        return torch.stack(tensors[low:high]) if high > low else tensors[0].new_empty(0, *tensors[0].shape)

    def write_back(self, low: int, values: Tensor) -> None:
        """Units from `low` on become `values`."""
        if self.is_muon:
            for p, value in zip(self.params[low:low + len(values)], values, strict=True):
                p.copy_(value)
        else:
            self.params[0][low:low + len(values)] = values


class DistMuonAdamW:
    """`params` are the trainable parameters by name; every one must be in exactly one group, and the reverse."""

    def __init__(self, params: Mapping[str, Tensor], groups: list[Group], rank: int = 0, world_size: int = 1,
                 polar_dtype: torch.dtype = torch.float32):
        grouped = [name for group in groups for name in group.params]
        if sorted(grouped) != sorted(params):
            odd = sorted(set(grouped) ^ set(params)) or sorted({n for n in grouped if grouped.count(n) > 1})
            raise ValueError(f"every trainable parameter belongs to exactly one group; look at {', '.join(odd)}")
        self.rank, self.world_size, self.polar_dtype = rank, world_size, polar_dtype
        self.steps = 0                             # updates done, AdamW's bias correction counts them
        self.buckets = [self._bucket(group, names, params) for group in groups for names in stacks(group, params)]

    def _bucket(self, group: Group, names: tuple[str, ...], params: Mapping[str, Tensor]) -> Bucket:
        tensors = [params[name].detach() for name in names]
        units = len(tensors) if group.kind == "muon" else tensors[0].size(0)
        share = -(-units // self.world_size)
        low, high = min(self.rank * share, units), min((self.rank + 1) * share, units)
        bucket = Bucket(group, names, [params[name] for name in names], units, share, low, high)
        own, first = high - low, tensors[0]
        if group.kind == "muon":
            second = second_moment_shape(*first.shape)
            bucket.state = {"momentum": first.new_zeros(own, *first.shape), "second": first.new_zeros(own, *second)}
        else:
            bucket.state = {slot: first.new_zeros(own, *first.shape[1:]) for slot in ("exp_avg", "exp_avg_sq")}
        return bucket

    # -- one step -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reduce(self) -> Tensor:
        """Sum `.grad` over ranks into this rank's units. Returns the squared norm of the units owned, fp64, ().

        A parameter without a gradient is an error of ours. `.grad` is kept until update(), so that a non-finite
        one can still be traced.
        """
        works = []
        for bucket in self.buckets:
            grads = [p.grad for p in bucket.params]
            assert all(g is not None for g in grads), f"no gradient: {bucket.names}"
            if self.world_size == 1:
                bucket.grad = bucket.stacked(grads, 0, bucket.units)          # type: ignore[arg-type]
                continue
            everything = pad(bucket.stacked(grads, 0, bucket.units), self.world_size * bucket.share)  # type: ignore
            mine = everything.new_empty(bucket.share, *everything.shape[1:])
            works.append(dist.reduce_scatter(mine, everything))
            bucket.in_flight = [everything, mine]                             # alive until the wait
            bucket.grad = mine[: bucket.high - bucket.low]
        for work in works:
            work.wait()
        total = torch.zeros((), dtype=torch.float64, device=self.buckets[0].params[0].device)
        for bucket in self.buckets:
            bucket.in_flight = []
            assert bucket.grad is not None
            total += bucket.grad.double().square().sum()
        return total

    @torch.no_grad()
    def update(self, lr_scale: float, momentum: float, decay_scale: float, grad_scale: float = 1.0) -> None:
        """Update owned units with the reduced gradients (times `grad_scale`), then give every rank all parameters.

        `lr_scale` multiplies every rate, `decay_scale` Muon's weight decay (the schedule's values of this step).
        """
        self.steps += 1
        works = []
        for bucket in self.buckets:
            assert bucket.grad is not None, "reduce() comes before update()"
            if grad_scale != 1.0:
                bucket.grad = bucket.grad * grad_scale
            values = bucket.stacked(bucket.params, bucket.low, bucket.high)
            self._apply(bucket, values, lr_scale, momentum, decay_scale)
            bucket.grad = None
            for p in bucket.params:
                p.grad = None
            if self.world_size == 1:
                if bucket.is_muon:
                    bucket.write_back(0, values)
                continue
            mine = pad(values, bucket.share).contiguous()
            everything = mine.new_empty(self.world_size * bucket.share, *mine.shape[1:])
            works.append(dist.all_gather(everything, mine))
            bucket.in_flight = [mine, everything]
        for work in works:
            work.wait()
        for bucket in self.buckets:
            if bucket.in_flight:
                bucket.write_back(0, bucket.in_flight[1][: bucket.units])
                bucket.in_flight = []

    def _apply(self, bucket: Bucket, values: Tensor, lr_scale: float, momentum: float, decay_scale: float) -> None:
        group, state, lr = bucket.group, bucket.state, bucket.group.lr * lr_scale
        if not bucket.is_muon:
            adamw_(values, bucket.grad, state["exp_avg"], state["exp_avg_sq"], self.steps, lr,   # type: ignore[arg-type]
                   group.betas, group.eps, group.weight_decay)
            return
        # On CPU one matrix at a time: the bits then cannot depend on how many a rank owns. CUDA takes the stack.
        count = len(values)
        width = count if values.is_cuda else 1
        for i in range(0, count, max(width, 1)):
            part = slice(i, i + width)
            muon_(values[part], bucket.grad[part], state["momentum"][part], state["second"][part],  # type: ignore[index]
                  lr, momentum, group.beta2, group.weight_decay * decay_scale, self.polar_dtype)

    def discard(self) -> None:
        """Forget the reduced gradients: the step is not taken."""
        for bucket in self.buckets:
            bucket.grad = None
            for p in bucket.params:
                p.grad = None

    # -- state --------------------------------------------------------------------------------------------------

    def state_parts(self) -> Iterator[StatePart]:
        """This rank's state by parameter name and row."""
        for bucket in self.buckets:
            for slot, tensor in bucket.state.items():
                if bucket.is_muon:
                    for i, name in enumerate(bucket.names[bucket.low:bucket.high]):
                        yield StatePart(name, slot, 0, tensor[i])
                elif bucket.high > bucket.low:
                    yield StatePart(bucket.names[0], slot, bucket.low, tensor)

    @torch.no_grad()
    def load_state(self, rows: Callable[[str, str, int, int], Tensor], steps: int) -> None:
        """Fill the state from `rows(param, slot, low, high)`, whatever world size wrote it."""
        self.steps = steps
        for part in self.state_parts():
            part.tensor.copy_(rows(part.param, part.slot, part.row0, part.row0 + part.tensor.size(0)))


def stacks(group: Group, params: Mapping[str, Tensor]) -> list[tuple[str, ...]]:
    """The buckets of a group: matrices of one shape together for muon, one tensor each for adamw."""
    if group.kind == "adamw":
        return [(name,) for name in group.params]
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name in group.params:
        by_shape.setdefault(tuple(params[name].shape), []).append(name)
    return [tuple(names) for names in by_shape.values()]


def pad(tensor: Tensor, units: int) -> Tensor:
    """Zeros behind the first dimension up to `units`."""
    if tensor.size(0) == units:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(units - tensor.size(0), *tensor.shape[1:])])
