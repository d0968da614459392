"""The record of an evaluated step as typed values, checked: what every table and plot of a trajectory reads.

What scripts.evaluate writes is in nanopoe.train.evaluate and nanopoe.infer.calibrate. Here only what is drawn is named;
other keys are not looked at, and parts that an older or smaller evaluation lacks are null.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nanopoe.errors import DataError
from nanopoe.report.cells import MODE_NAMES

Share = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
T = TypeVar("T")


class Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore", allow_inf_nan=False, populate_by_name=True)


class ByView(Part, Generic[T]):
    """Of the pool and, but for BP, of each stage and prefix; of a specialist's run all of it is the base's."""

    full: T
    stages: list[T] | None = None
    prefixes: list[T] | None = None


class Bpb(ByView[Amount]):
    """Bits per byte. `renormalise_false` is the training log's value (SPEC 3)."""

    alpha: dict[Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?$")], Amount] | None = None
    renormalise_false: Amount | None = None


class BySpecialist(Part, Generic[T]):
    """Of each specialist, the trained one last, and of its pool with the base."""

    specialist: Annotated[list[T], Field(min_length=1)]
    dual: Annotated[list[T], Field(min_length=1)]


class Specialists(Part):
    bpb: BySpecialist[Amount]
    accuracy: BySpecialist[Share]


class Score(Part):
    bpb: Amount
    accuracy: Share


class SourceScore(Score):
    """What was trained, on one source of the validation split; `base` and `dual` are of a specialist."""

    targets: Count
    bytes: Annotated[int, Field(ge=1)]
    tokens: Count
    truncated: Count
    base: Score | None = None
    dual: Score | None = None


class Diversity(Part):
    bits_per_byte: float
    nats_per_token: float


class Exits(Part):
    """Adaptive depth on calibration positions; `exits[k]` is the share that left at stage k."""

    exits: list[Share]
    mean_depth: Amount
    agreement: Share
    predicted_speedup: Amount


class ScaledExits(Exits):
    scale: Amount


class Wand(Part):
    """Adaptive depth with each kind of bounds."""

    p99: Exits
    max: Exits
    lead_p99: Exits | None = None
    lead: Exits | None = None


class Routing(Part):
    """`agreement` is that of stage 0 with the pool over all targets."""

    mode: str
    cap: Amount
    threshold: Amount | None
    routed: Share
    projected_speedup: Amount
    agreement: Share
    regression: float | None = None
    regression_held_out: float | None = None


class RoutingPoint(Part):
    """`agreement` is that of the routed output with the pool's."""

    threshold: Amount
    routed: Share
    agreement: Share
    regression: float
    projected_speedup: Amount


class Curves(Part):
    wand: list[ScaledExits] = []
    lead: list[ScaledExits] = []
    routing: list[RoutingPoint] = []


class Calibration(Part):
    """Bounds of the K-1 transitions: `p99` and `max` of all changes (SPEC 4), `lead_p99` and `lead` of the leader's."""

    tokens: Count
    p99: list[Amount] = Field(alias="poe_wand_p99_bounds_per_stage_head")
    max: list[Amount] = Field(alias="poe_wand_max_bounds_per_stage_head")
    lead_p99: list[Amount] | None = Field(default=None, alias="poe_wand_lead_p99_bounds")
    lead: list[Amount] | None = Field(default=None, alias="poe_wand_lead_max_bounds")
    wand: Wand
    routing: Routing
    curves: Curves | None = None

    @property
    def kinds(self) -> dict[str, tuple[list[float], Exits]]:
        """Bounds and exits of each kind that is there, by its name."""
        found = {name: (getattr(self, name), getattr(self.wand, name)) for name in Wand.model_fields}
        return {name: (bounds, exits) for name, (bounds, exits) in found.items() if None not in (bounds, exits)}


class Measured(Part):
    """A mode beside plain decoding: `equal` of `prompts` gave the very text; times of one machine at one moment."""

    prompts: Count
    equal: Count
    agreement: Share
    predicted_speedup: Amount | None = None
    measured_speedup: Amount | None = None
    tokens_per_s: Amount | None = None
    plain_tokens_per_s: Amount | None = None


class MeasuredDrafts(Measured):
    rounds: Count
    accepted: Count
    drafted: Count
    drafts: int | str | None = None
    prefix: int | None = None

    @property
    def acceptance(self) -> float | None:
        return self.accepted / self.drafted if self.drafted else None

    @property
    def mean_accepted(self) -> float | None:
        return self.accepted / self.rounds if self.rounds else None


class MeasuredDepth(Measured):
    tokens: Count
    exits: list[Count]
    mean_depth: Amount


class Modes(Part):
    speculative: MeasuredDrafts | None = None
    speculative_auto: MeasuredDrafts | None = None
    wand_p99: MeasuredDepth | None = None
    wand_max: MeasuredDepth | None = None
    wand_lead_p99: MeasuredDepth | None = None
    wand_lead: MeasuredDepth | None = None
    routed: MeasuredDepth | None = None
    prompts: Count | None = None
    tokens: Count | None = None
    threads: Count | None = None
    device: str | None = None

    @property
    def ran(self) -> dict[str, MeasuredDrafts | MeasuredDepth]:
        """The modes that ran, by name."""
        found = {name: getattr(self, name) for name in MODE_NAMES}
        return {name: mode for name, mode in found.items() if mode is not None}


class Probe(Part):
    prompt: str
    answers: dict[str, str]


class Record(Part):
    """One evaluated step. `n_stages` is 1 for BP, which has no stages, calibration or modes.

    Of a specialist's run bpb, accuracy and n_stages are the base's; `trained` is always of what was trained.
    """

    step: Count
    poe_mode: Literal["none", "flat", "hier"]
    n_stages: Annotated[int, Field(ge=1)] = 1
    bpb: Bpb
    accuracy: ByView[Share]
    specialists: Specialists | None = None
    sources: dict[str, SourceScore] | None = None
    tokens: Count
    bytes: Annotated[int, Field(ge=1)]
    crossover_gap: float | None = None
    diversity: Diversity | None = None
    seconds: Amount | None = None
    truncated: Count = 0
    config_hash: str | None = None
    asked: Literal["text", "question"] = "text"
    probes: list[Probe] | None = None
    calibration: Calibration | None = None
    modes: Modes | None = None

    @property
    def trained(self) -> Score:
        """Of the last specialist, or of the full pool."""
        return next(iter(self.views.values()))

    @property
    def views(self) -> dict[str, Score]:
        """Of a specialist's run: specialist, dual, base, and the specialists it stands on by number; else full."""
        full, found = Score(bpb=self.bpb.full, accuracy=self.accuracy.full), self.specialists
        if found is None:
            return {"full": full}
        own = [Score(bpb=bpb, accuracy=hits)
               for bpb, hits in zip(found.bpb.specialist, found.accuracy.specialist, strict=True)]
        dual = Score(bpb=found.bpb.dual[-1], accuracy=found.accuracy.dual[-1])
        below = {f"specialist {i}": score for i, score in enumerate(own[:-1])}
        return {"specialist": own[-1], "dual": dual, "base": full, **below}

    @model_validator(mode="after")
    def _lengths(self) -> Record:
        for name, values, wanted in self._lists():
            if values is not None and len(values) != wanted:
                raise ValueError(f"{name} holds {len(values)} values, {wanted} are needed for {self.n_stages} stages")
        return self

    def _lists(self) -> Iterator[tuple[str, list[Any] | None, int]]:
        """(key, values, how many there must be) of everything that is per stage or per transition."""
        K = self.n_stages
        yield "bpb.stages", self.bpb.stages, K
        yield "bpb.prefixes", self.bpb.prefixes, K
        yield "accuracy.stages", self.accuracy.stages, K
        yield "accuracy.prefixes", self.accuracy.prefixes, K
        if self.specialists is not None:
            S = len(self.specialists.bpb.specialist)
            yield "specialists.bpb.dual", self.specialists.bpb.dual, S
            yield "specialists.accuracy.specialist", self.specialists.accuracy.specialist, S
            yield "specialists.accuracy.dual", self.specialists.accuracy.dual, S
        if self.calibration is not None:
            for name, (bounds, exits) in self.calibration.kinds.items():
                yield f"calibration: the {name} bounds", bounds, K - 1
                yield f"calibration: {name}: exits", exits.exits, K
            curves = self.calibration.curves or Curves()
            for point in (*curves.wand, *curves.lead):
                yield "calibration: curves: exits", point.exits, K
        for name, mode in self.modes.ran.items() if self.modes else ():
            if isinstance(mode, MeasuredDepth):
                yield f"modes: {name}: exits", mode.exits, K


def record_of(data: Mapping[str, Any], where: Path) -> Record:
    """A checked record. DataError names `where` and the first key that is wrong."""
    try:
        return Record.model_validate(dict(data))
    except ValidationError as error:
        raise DataError(f"not an evaluation of nanopoe ({first_problem(error)})", where,
                        "run scripts.evaluate again, or remove the file") from error


def first_problem(error: ValidationError) -> str:
    """The first wrong key, and what is wrong with it."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    return f"{key}: {first['msg']}" if key else first["msg"].removeprefix("Value error, ")
