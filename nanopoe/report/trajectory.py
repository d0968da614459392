"""The cells of a trajectory, a row per evaluated step (SPEC 7), and of what the newest one says. Text only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from nanopoe.report.cells import MODE_NAMES, Rows, Table, number, percent, times
from nanopoe.report.record import Measured, MeasuredDepth, Record
from nanopoe.report.tables import SPECIALIST_NOTE, source_rows, stage_rows

# -- what the stages know -----------------------------------------------------------------------------------------

def score_tables(records: Sequence[Record]) -> Iterator[Table]:
    """Bits per byte and accuracy of every view, also by source if that is known; what was read, where it differs."""
    if not records:
        return
    yield from (_specialist_tables if any(r.specialists for r in records) else _view_tables)(records)
    yield from _source_tables(records)
    if len({(r.tokens, r.bytes) for r in records}) > 1:
        yield Table("What was read", ["step", "tokens", "bytes"],
                    [[str(r.step), f"{r.tokens:,}", f"{r.bytes:,}"] for r in records],
                    "Steps that read other bytes do not compare.")


def _specialist_tables(records: Sequence[Record]) -> Iterator[Table]:
    """Specialist, dual and base over the steps; of the newest what the base's own views are."""
    names = list(dict.fromkeys(name for r in records for name in r.views))
    yield Table("Bits per byte", ["step", *names, "against base"], [
        [str(r.step), *(number(r.views[name].bpb if name in r.views else None, 6) for name in names),
         number(r.trained.bpb - r.bpb.full, 6, "+")] for r in records], f"Less is better. {SPECIALIST_NOTE}")
    yield Table("Accuracy", ["step", *names], [
        [str(r.step), *(number(r.views[name].accuracy if name in r.views else None, 4) for name in names)]
        for r in records], "Share of targets that are the most probable token.")
    if records[-1].bpb.stages:
        yield Table("The frozen base alone", ["view of the base", "bits per byte", "against its full pool", "accuracy"],
                    stage_rows(records[-1]), "None of it was trained here: the stages of the base, as they read this "
                    "text. What its modes give is in the report of its own run.", folded=True)


def _source_tables(records: Sequence[Record]) -> Iterator[Table]:
    told = [r for r in records if r.sources]
    if not told:
        return
    yield Table(f"By source, step {told[-1].step:,}", *source_rows(told[-1]),
                "Each source of the validation split alone" +
                (", on what the assistant says there." if told[-1].asked == "question" else "."))
    names = list(dict.fromkeys(name for r in told for name in r.sources or {}))
    if len(told) > 1 and len(names) > 1:
        yield Table("Bits per byte by source", ["step", *names], [
            [str(r.step), *(number(r.sources[name].bpb if r.sources and name in r.sources else None, 6)
                            for name in names)] for r in told], "Of what was trained.")


def _view_tables(records: Sequence[Record]) -> Iterator[Table]:
    stages = max((r.n_stages for r in records if r.bpb.stages), default=0)
    inner = range(2, stages)                                 # prefix 1 is stage 0, the longest is full
    columns = [*(f"stage {k}" for k in range(stages)), *(f"prefix {n}" for n in inner)]

    def cells(own: list[float] | None, prefixes: list[float] | None, digits: int) -> list[str]:
        own, prefixes = own or [], (prefixes or [])[:-1]
        return [*(number(own[k] if k < len(own) else None, digits) for k in range(stages)),
                *(number(prefixes[n - 1] if n <= len(prefixes) else None, digits) for n in inner)]

    poe = ["gap", "train-log bpb", "diversity"] if stages else []
    yield Table("Bits per byte", ["step", "full", *columns, *poe], [
        [str(r.step), number(r.bpb.full, 6), *cells(r.bpb.stages, r.bpb.prefixes, 6),
         *([number(r.crossover_gap, 6, "+"), number(r.bpb.renormalise_false, 6),
            number(r.diversity.bits_per_byte if r.diversity else None, 6)] if stages else [])] for r in records],
        "Less is better. The gap is full minus the last stage; train-log is the pool without renormalisation, as the "
        "training log has it; full = mean of the stages - diversity." if stages else "Less is better.")
    yield Table("Accuracy", ["step", "full", *columns], [
        [str(r.step), number(r.accuracy.full, 4), *cells(r.accuracy.stages, r.accuracy.prefixes, 4)]
        for r in records], "Share of targets that are the most probable token.")


def alpha_tables(records: Sequence[Record]) -> Iterator[Table]:
    alphas = sorted({a for r in records for a in r.bpb.alpha or {}}, key=float)
    if alphas:
        yield Table("Bits per byte by alpha", ["step", *(f"alpha {a}" for a in alphas)], [
            [str(r.step), *(number(r.bpb.alpha.get(a), 6) for a in alphas)] for r in records if r.bpb.alpha],
            "Bits per byte of the pool's scores times K^alpha, renormalised; alpha 0 is the geometric mean.")


# -- what the stages are for --------------------------------------------------------------------------------------

def depth_tables(records: Sequence[Record]) -> Iterator[Table]:
    """Adaptive depth as calibrated, with each kind of bounds."""
    known = [(r, r.calibration) for r in records if r.calibration is not None]
    stages = max((r.n_stages for r, _ in known), default=0)
    for kind, (name, note) in KINDS.items():
        rows = []
        for record, found in known:
            if kind in found.kinds:
                bounds, exits = found.kinds[kind]
                rows.append([str(record.step), *_each(bounds, stages - 1, lambda b: number(b, 4)),
                             *_each(exits.exits, stages, percent), number(exits.mean_depth, 2),
                             number(exits.agreement, 4), times(exits.predicted_speedup)])
        if rows:
            yield Table(f"Adaptive depth, {name}",
                        ["step", *(f"bound {k} to {k + 1}" for k in range(stages - 1)),
                         *(f"exit {k}" for k in range(stages)), "mean depth", "agreement", "predicted speed-up"], rows,
                        f"{note} An exit is the share of calibration positions decided by that stage; the agreement is "
                        "with the pool's top-1 token.")


KINDS = {
    "p99": ("p99 bounds", "They bound the change by the next stage at 99 % of the positions."),
    "max": ("max bounds", "They bound the change by the next stage at every position seen, so there the token is the "
                          "pool's."),
    "lead_p99": ("lead p99 bounds", "They bound what the leading token lost of its lead, at 99 % of the positions."),
    "lead": ("lead bounds", "They bound what the leading token lost of its lead at every position seen, so there the "
                            "token is the pool's."),
}


def routing_tables(records: Sequence[Record]) -> Iterator[Table]:
    rows = [[str(r.step), c.mode, number(c.cap, 3), number(c.threshold, 4), number(c.routed, 4),
             number(c.projected_speedup, 3), number(c.agreement, 4), number(c.regression, 5),
             number(c.regression_held_out, 5)]
            for r in records if r.calibration for c in [r.calibration.routing]]
    if rows:
        yield Table("Routing as calibrated", ["step", "mode", "cap", "threshold", "routed", "projected speed-up",
                                              "agreement", "regression", "held out"], rows,
                    "Stage 0 answers where its confidence reaches the threshold. The agreement is that of stage 0 "
                    "with the pool over all targets; the regression is what routing lost, per target.")


def measured_tables(records: Sequence[Record]) -> Iterator[Table]:
    """The modes as they ran."""
    yield from _speculative(records)
    yield from _depth_ran(records)


def _speculative(records: Sequence[Record]) -> Iterator[Table]:
    rows = [[str(r.step), "auto" if m.drafts is None else str(m.drafts), str(m.prefix), str(m.rounds), str(m.accepted),
             str(m.drafted), number(m.acceptance, 4), number(m.mean_accepted, 2), *_measured(m)]
            for r in records if r.modes for m in (r.modes.speculative, r.modes.speculative_auto) if m]
    if rows:
        yield Table("Speculative decoding", ["step", "drafts", "by stages", "rounds", "accepted", "drafted",
                                             "acceptance", "mean accepted", *MEASURED], rows,
                    "Greedy, batch 1. The first stages draft, the pool verifies. " + SAME_TEXT)


def _depth_ran(records: Sequence[Record]) -> Iterator[Table]:
    found = [(r, name, mode) for r in records if r.modes for name, mode in r.modes.ran.items()
             if isinstance(mode, MeasuredDepth)]
    stages = max((len(mode.exits) for _, _, mode in found), default=0)
    rows = [[str(r.step), MODE_NAMES[name], str(m.tokens),
             *_each([n / max(m.tokens, 1) for n in m.exits], stages, percent),
             number(m.mean_depth, 2), *_measured(m)] for r, name, m in found]
    if rows:
        yield Table("Adaptive depth and routing, measured",
                    ["step", "mode", "tokens", *(f"exit {k}" for k in range(stages)), "mean depth", *MEASURED], rows,
                    "Greedy, batch 1; wand is adaptive depth. " + SAME_TEXT)


MEASURED = ["same text", "agreement", "predicted speed-up", "measured speed-up", "tokens/s", "plain tokens/s"]
SAME_TEXT = ("Same text: prompts whose text is that of plain decoding; agreement: share of such tokens. Times are of "
             "one machine at one moment, in turns with plain decoding.")


def _measured(mode: Measured) -> list[str]:
    return [f"{mode.equal} of {mode.prompts}", number(mode.agreement, 4), times(mode.predicted_speedup),
            times(mode.measured_speedup), number(mode.tokens_per_s, 1), number(mode.plain_tokens_per_s, 1)]


def _each(values: Sequence[float], count: int, show: Callable[[float], str]) -> list[str]:
    """A cell for every value, "-" for those that only runs with more stages have."""
    return [show(values[k]) if k < len(values) else "-" for k in range(count)]


# -- what it writes -----------------------------------------------------------------------------------------------

def probe_tables(records: Sequence[Record]) -> Iterator[Table]:
    """The newest continuations by view side by side; of every prompt, what the pool, or the specialist that is
    trained, made of it over the steps."""
    asked = [r for r in records if r.probes]
    if not asked:
        return
    newest = asked[-1].probes or []
    views = list(dict.fromkeys(view for probe in newest for view in probe.answers))
    yield Table(f"Step {asked[-1].step}, by view", ["prompt", *(_view(view) for view in views)],
                [[probe.prompt, *(probe.answers.get(view, "-") for view in views)] for probe in newest],
                f"Greedy, the newest step with probes{ASKED[asked[-1].asked]}.", numbers=False)
    if len(asked) < 2:
        return
    trained = next(iter(asked[-1].views))
    for prompt in (probe.prompt for probe in newest):
        rows: Rows = []
        for record in asked:
            answer = next((p.answers.get(trained) for p in record.probes or [] if p.prompt == prompt), None)
            if answer is not None and (not rows or rows[-1][1] != answer):
                rows.append([str(record.step), answer])
        yield Table(prompt, ["from step", f"the {'pool' if trained == 'full' else trained} goes on"], rows,
                    numbers=False, folded=True)


ASKED = {"text": "", "question": "; each prompt is a user's turn, and the assistant answers"}


def _view(name: str) -> str:
    return name.replace(":", " ")


# -- in a nutshell ------------------------------------------------------------------------------------------------

def key_figures(record: Record) -> list[tuple[str, str, str]]:
    """(what, figure, what to know of it) of one step."""
    full, stages, trained = record.bpb.full, record.bpb.stages, record.trained
    found = [("bits per byte", number(trained.bpb, 4), f"{record.tokens:,} tokens of held-out text"),
             ("accuracy", percent(trained.accuracy), "most probable token, next token")]
    if record.specialists:
        dual = record.views["dual"].bpb
        return [*found, ("against its base", number(trained.bpb - full, 4, "+"), f"bits per byte; base has {full:.4f}"),
                ("pooled with its base", number(dual, 4), f"bits per byte; {number(dual - full, 4, '+')} against base")]
    if stages:
        best = stages.index(min(stages))
        found.append(("pool against its best stage", number(full - stages[best], 4, "+"),
                      f"bits per byte; stage {best} has {stages[best]:.4f}"))
        found.append(("stage 0 alone", number(stages[0] - full, 4, "+"), "bits per byte against the pool"))
    modes = record.modes
    if modes and modes.speculative:
        m = modes.speculative
        found.append(("speculative decoding", times(m.measured_speedup),
                      f"measured; {percent(m.acceptance)} of drafts accepted, {m.equal} of {m.prompts} texts equal"))
    for names in (("wand_lead", "wand_max"), ("wand_lead_p99", "wand_p99")):
        found += _depth_figure(record, names)
    if record.calibration:
        routing = record.calibration.routing
        found.append(("routing", times(routing.projected_speedup),
                      f"projected; {percent(routing.routed)} of tokens to stage 0 at cap {routing.cap:g}"))
    return found


def _depth_figure(record: Record, names: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """Adaptive depth with the first of these bounds there is: as it ran, or else as predicted."""
    ran = record.modes.ran if record.modes else {}
    kinds = record.calibration.kinds if record.calibration else {}
    for name in names:
        mode = ran.get(name)
        if mode is not None and mode.measured_speedup is not None:
            return [(f"adaptive depth, {MODE_NAMES[name]}", times(mode.measured_speedup),
                     f"measured; {percent(mode.agreement)} of tokens are those of plain decoding")]
        if name.removeprefix("wand_") in kinds:
            exits = kinds[name.removeprefix("wand_")][1]
            return [(f"adaptive depth, {MODE_NAMES[name]}", times(exits.predicted_speedup),
                     f"predicted; {percent(exits.agreement)} of top-1 tokens are the pool's")]
    return []
