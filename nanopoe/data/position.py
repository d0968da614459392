"""Positions in the data, as JSON types: made by the packer with each step, merged over ranks, checked, told in short.

{"fingerprint": what the order depends on, "step": steps made, "sources": {name: {stream, documents, repeat, weight}},
 "lanes": {number: {"cursors": {stream: [epoch, index]}, "tokens": {stream: n}, "placed": {source: n},
                    "counts": {rows, documents, pieces, read, placed, cropped, padded, truncated},
                    "rest": [source, epoch, ordinal, tokens placed] or null, "buffer": [[source, epoch, ordinal], ..]}}}

With `replay_steps` in the fingerprint the lanes are those of the pass that `step` ends or lies in.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NoReturn

from nanopoe.data.lanes import Counts, Strand
from nanopoe.errors import DataError

Position = dict[str, Any]
LaneState = dict[str, Any]


def sources_of(strands: Sequence[Strand]) -> dict[str, dict[str, Any]]:
    """What a position says of the sources, by name."""
    return {source.name: {"stream": strand.name, "documents": source.n_documents, "repeat": source.repeat,
                          "weight": source.weight} for strand in strands for source in strand.sources}


def empty_state(strands: Sequence[Strand]) -> LaneState:
    """A lane at the beginning."""
    return {"cursors": {strand.name: [0, 0] for strand in strands}, "tokens": {strand.name: 0 for strand in strands},
            "placed": {source.name: 0 for strand in strands for source in strand.sources}, "counts": vars(Counts()),
            "rest": None, "buffer": []}


def merge_positions(positions: Sequence[Position]) -> Position:
    """The union over ranks of the positions of one step: free of the world size."""
    first = positions[0]
    lanes: dict[str, Any] = {}
    for position in positions:
        assert position["step"] == first["step"] and position["fingerprint"] == first["fingerprint"], "not one step"
        assert not lanes.keys() & position["lanes"].keys(), "a lane on two ranks"
        lanes.update(position["lanes"])
    return {**first, "lanes": {key: lanes[key] for key in sorted(lanes, key=int)}}


def summary(position: Position) -> dict[str, Any]:
    """What the lanes of a position have done, in short.

    utilisation: share of the places in rows that hold tokens; cropped: tokens lost of those that left the buffers;
    padded: share of the places; documents, pieces, rows; truncated: documents that had lost their front, being longer
    than a row; cropped_tokens: theirs and those lost in packing; passes: over the same rows, null without replay_steps,
    with which all else is of the last pass; sources: {name: {share: of the tokens placed, since the mixture was last
    changed; weight: the share that was asked for (of conversations: of their number); epochs: read}}.
    """
    lanes, sources = position["lanes"], position["sources"]
    replay_steps = position["fingerprint"]["replay_steps"]
    counts = {key: sum(lane["counts"][key] for lane in lanes.values()) for key in vars(Counts())}
    places = counts["rows"] * (position["fingerprint"]["sequence_len"] + 1)
    placed = {name: sum(lane["placed"][name] for lane in lanes.values()) for name in sources}
    weights = {name: source["weight"] if source["stream"] == name else source["documents"] * source["repeat"]
               for name, source in sources.items()}
    return {
        "utilisation": 1 - counts["padded"] / places if places else 1.0,
        "cropped": counts["cropped"] / max(1, counts["placed"] + counts["cropped"]),
        "padded": counts["padded"] / places if places else 0.0,
        "rows": counts["rows"], "documents": counts["documents"], "pieces": counts["pieces"],
        "truncated": counts["truncated"], "cropped_tokens": counts["cropped"],
        "passes": None if replay_steps is None else position["step"] / replay_steps,
        "sources": {name: {"share": placed[name] / max(1, sum(placed.values())),
                           "weight": weights[name] / sum(weights.values()),
                           "epochs": _epochs(position, source["stream"]) * source["repeat"]}
                    for name, source in sources.items()}}


def _epochs(position: Position, stream: str) -> float:
    """How often the lanes of this position have read their part of a stream."""
    n_lanes = position["fingerprint"]["lanes"]
    size = sum(s["documents"] * s["repeat"] for s in position["sources"].values() if s["stream"] == stream)
    read = own = 0
    for number, lane in position["lanes"].items():
        part = len(range(int(number), size, n_lanes))
        epoch, index = lane["cursors"][stream]
        read, own = read + epoch * part + index, own + part
    return read / own


def rebase_position(position: Position, fingerprint: dict[str, Any], strands: Sequence[Strand],
                    may_change: Collection[str], recount: bool) -> Position:
    """The position for data that was changed on purpose; `may_change` of the fingerprint: "sources", "seed".

    Streams that are as they were go on where they stopped, new ones begin at their start, documents of others leave
    the buffers. Then, and with `recount` (other weights), the shares of the mixture are counted anew, else a source
    that is now due more would be all that is read until it had caught up. Another seed permutes the documents anew,
    so some of this epoch come again and some not at all.
    """
    try:
        then = position["fingerprint"]
        changed = {key for key in may_change if then.get(key) != fingerprint[key]}
        if not changed and not recount:
            return position
        recount = recount or "sources" in changed
        kept = _kept(position, fingerprint, strands)
        empty = empty_state(strands)
        lanes = {number: {**lane, "cursors": {name: lane["cursors"][name] if name in kept else [0, 0]
                                              for name in empty["cursors"]},
                          "tokens": empty["tokens"] if recount else lane["tokens"],
                          "placed": empty["placed"] if recount else lane["placed"],
                          "rest": lane["rest"] if _is_of(lane["rest"], kept.values()) else None,
                          "buffer": [ref for ref in lane["buffer"] if _is_of(ref, kept.values())]}
                 for number, lane in position["lanes"].items()}
        return {**position, "fingerprint": {**then, **{key: fingerprint[key] for key in changed}}, "lanes": lanes}
    except (KeyError, TypeError, AttributeError, IndexError):
        return position                                          # malformed: refused by name with the others


def _kept(position: Position, fingerprint: dict[str, Any], strands: Sequence[Strand]) -> dict[str, set[str]]:
    """The streams that are as they were, with their sources."""
    then, now = position["fingerprint"]["sources"], fingerprint["sources"]
    kept = {}
    for strand in strands:
        names = {source.name for source in strand.sources}
        before = {name for name, source in position["sources"].items() if source["stream"] == strand.name}
        if names == before and all(then[name] == now[name] for name in names):
            kept[strand.name] = names
    return kept


def _is_of(ref: Any, sources: Collection[set[str]]) -> bool:
    return ref is not None and any(ref[0] in names for names in sources)


def check_position(position: Position, fingerprint: dict[str, Any], start_step: int, own: Collection[int],
                   strands: Sequence[Strand]) -> dict[int, LaneState]:
    """The states of the lanes `own`; a DataError that names the field if the position is of other data."""
    def refuse(what: str, do: str) -> NoReturn:
        raise DataError(what, "data position", do)

    try:
        for key, now in fingerprint.items():
            then = position["fingerprint"].get(key)
            if then != now:
                asked = {"sources": "data.train", "seed": "seed"}.get(key)
                refuse(f"'{key}' was {_short(then)}, now it is {_short(now)}", "resume with the data it was saved with"
                       + (f", or resume.allow=[{asked}] if it is meant" if asked else ""))
        if position["step"] != start_step:
            refuse(f"is of step {position['step']}, not {start_step}", "resume with the position of that step")
        states = {lane: position["lanes"][str(lane)] for lane in own}
        for state in states.values():
            if not _same_keys(state, empty_state(strands)):
                refuse("is of other sources", "resume with the data it was saved with")
            if not all(type(n) is int and n >= 0 for n in _numbers(state, strands)):
                refuse("has a number that is no count", "the checkpoint is damaged")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"not in the form a loader writes ({type(error).__name__}: {error})", "data position",
                        "resume from a checkpoint of this program") from error
    return states


def check_replay(saved: Position, position: Position, start_step: int, rows_per_step: int) -> None:
    """DataError if a pass of `replay_steps` would go on with other data than it began with, or in other batches.

    `position` is the saved one, or that for data that were changed on purpose.
    """
    replay_steps = position["fingerprint"]["replay_steps"]
    if replay_steps is None or start_step % replay_steps == 0:
        return
    rows = sum(lane["counts"]["rows"] for lane in position["lanes"].values())
    if position is not saved or rows != start_step % replay_steps * rows_per_step:
        raise DataError(f"step {start_step} is within a pass of {replay_steps} steps, whose data and batches must stay "
                        "as they are", "data.replay_steps",
                        f"go on from a multiple of {replay_steps} with resume.step, or use another run_dir")


def _same_keys(state: LaneState, empty: LaneState) -> bool:
    return state.keys() == empty.keys() and all(
        state[key].keys() == empty[key].keys() for key in ("cursors", "tokens", "placed", "counts"))


def _numbers(state: LaneState, strands: Sequence[Strand]) -> list[int]:
    """Everything that must be an integer of 0 or more."""
    sizes = {source.name: source.n_documents for strand in strands for source in strand.sources}
    numbers = [n for epoch, index in state["cursors"].values() for n in (epoch, index)]
    for key in ("placed", "counts"):
        numbers += state[key].values()
    numbers += [abs(n) for n in state["tokens"].values()]    # below 0 by what is cropped, if counted anew
    for name, epoch, ordinal in state["buffer"]:
        numbers += [epoch, ordinal, sizes[name] - 1 - ordinal]
    if state["rest"] is not None:
        name, epoch, ordinal, offset = state["rest"]
        numbers += [epoch, ordinal, sizes[name] - 1 - ordinal, offset - 1]
    return numbers


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
