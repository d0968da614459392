"""The tables of scripts.bench: one function for each command, which gives a result its line, or lines, of the table.

A line is a dict {column head: cell}. Times and rates are medians; "spread" is (max - min) / median of what was timed,
one figure for each thing timed, in the order of its columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.table import Table

Result = dict[str, Any]
Line = dict[str, str]


def show(what: str, results: list[Result]) -> None:
    """Print the results of the command `what`."""
    lines = [line for result in results for line in LINES[what](result)]
    rows = [list(lines[0]), *(list(line.values()) for line in lines)]
    if what in UPRIGHT:
        rows = [list(column) for column in zip(*rows, strict=True)]
    table = Table(*rows[0])
    for row in rows[1:]:
        table.add_row(*row)
    console = Console()
    console.width = max(console.width, 120 if console.is_terminal else 1000)      # a pipe is no reason to cut columns
    console.print(table)


# -- a line of each command --------------------------------------------------------------------------------------------

def step(r: Result) -> Iterator[Line]:
    yield {"experiment": r["experiment"], "dtype": r["dtype"],
           "first step s": f"{r['first_step']:.2f}", "s / step": f"{r['seconds']:.3f}", "spread": f"{r['spread']:.0%}",
           "backward": f"{r['backward'] / r['seconds']:.0%}", "optimizer": f"{r['optimizer'] / r['seconds']:.0%}",
           "tokens/s": f"{r['tokens_per_s']:,.0f}", "GFLOP/s": f"{r['flops_per_s'] / 1e9:,.0f}",
           "of peak": f"{r['mfu']:.0%}", "memory MiB": mib(r["memory_bytes"], 0)}


def optimizer(r: Result) -> Iterator[Line]:
    yield {"experiment": r["experiment"], "dtype": r["dtype"], "parameters": f"{r['parameters']:,}",
           "sharded ms": ms(r["sharded"]), "plain ms": ms(r["plain"]), "spread": percent(r["spread"].values()),
           "ratio": f"{r['ratio']:.3f}", "largest difference": f"{r['difference']:.1e}"}


def memory(r: Result) -> Iterator[Line]:
    yield {"experiment": r["experiment"], "dtype": r["dtype"], "ranks": f"{r['world_size']} {r['grid']}".strip(),
           "micro-steps": f"{r['micro_steps']} x {r['device_batch_size']}", "MiB weights": mib(r["weights"]),
           "optimizer": mib(r["optimizer"]), "gradients": mib(r["gradients"]), "measured": mib(r["measured"]),
           "spread": f"{r['spread']:.1%}", "planned": mib(r["planned"]), "ratio": f"{r['ratio']:.3f}",
           "fullest at": r["peak"]}


def stages(r: Result) -> Iterator[Line]:
    yield {"experiment": r["experiment"], "ranks": f"{r['ranks']} = {r['grid']}", "micro-steps": str(r["micro_steps"]),
           "s / step alone": f"{r['alone']:.3f}", "with stages": f"{r['stages']:.3f}",
           "spread": percent(r["spread"].values()), "speed-up": f"{r['speedup']:.2f}x",
           "tokens/s": f"{r['tokens_per_s']['stages']:,.0f}",
           "idle by rank": percent(r["idle"], 1), "of the loss": f"{r['loss_difference']:.0e}",
           "of a weight": f"{r['weight_difference']:.0e}", "to share weights ms": ms(r["spread_seconds"])}


def head(r: Result) -> Iterator[Line]:
    fused, held = r["arms"]["fused"], r["arms"]["materialised"]
    yield {"experiment": r["experiment"], "dtype": r["dtype"], "heads": str(r["heads"]),
           "rows x V": f"{r['rows']:,} x {r['vocab_size']:,}", "fused s": f"{fused['seconds']:.3f}",
           "held s": f"{held['seconds']:.3f}", "spread": percent(arm["spread"] for arm in (fused, held)),
           "of held": f"{r['time_ratio']:.3f}", "fused MiB": mib(fused["bytes"], 0), "held MiB": mib(held["bytes"], 0),
           "of held MiB": f"{r['memory_ratio']:.3f}", "of peak": f"{r['mfu']:.0%}", "loss gap": f"{r['loss_gap']:.0e}"}


def attention(r: Result) -> Iterator[Line]:
    yield {"length": f"{r['length']:,}", "window": f"{r['window']:,}", "dtype": r["dtype"], "full ms": ms(r["full"]),
           "windowed ms": ms(r["windowed"]), "of full": f"{r['ratio']:.2f}x", "pairs of full": f"{r['pairs']:.2f}x",
           f"documents of {r['document']:,} ms": ms(r["documents"]),
           "masked ms": "" if r["masked"] is None else ms(r["masked"]), "spread": percent(r["spread"].values())}


def specialist(r: Result) -> Iterator[Line]:
    for name, arm in r["arms"].items():
        yield {"": name, "trained": f"{arm['trained']:,}", "s / step": f"{arm['seconds']:.3f}",
               "spread": f"{arm['spread']:.0%}", "of full, backprop": f"{arm['of_full_time']:.2f}x",
               "activations MiB": mib(arm["activations"], 1), "of its MiB": f"{arm['of_full_activations']:.2f}x"}


def data(r: Result) -> Iterator[Line]:
    yield {"": f"{r['rows']} x {r['seq']} {r['packing']}",
           "million tokens/s of ready batches": f"{r['tokens_per_s'] / 1e6:.2f}",
           "million tokens/s of pure encoding": f"{r['encode_per_s'] / 1e6:.2f}",
           "the one over the other": f"{r['ratio']:.0%}",
           "spread of these three": percent(r["spread"].values()),
           "packing, of the CPU time": f"{r['packing_share']:.1%}",
           "the thread that packs, of the CPU time": f"{r['thread_share']:.1%}",
           "first batch after s": f"{r['first_batch']:.2f}",
           "longest wait of next() at half the rate, ms": ms(r["wait"]),
           "waits over 5 ms": f"{r['stalls']} of {r['steps_paced']}",
           "longest that the consumer woke late, ms": ms(r["late"]),
           "fewest steps ready, of those kept": f"{r['ready_share']:.0%}",
           "cropped": f"{r['cropped']:.1%}", "utilisation": f"{r['utilisation']:.1%}",
           "documents in buffers, mean length over all": f"{r['buffered_length']:.3f}",
           "epochs read": f"{r['epochs']:.2f}"}


def decode(r: Result) -> Iterator[Line]:
    line = {"": r["name"], "tokens/s": f"{r['tokens_per_s']:.1f}", "spread": "", "against plain": "",
            "by weights read": "", "tokens as plain": "", "what": ""}
    if r["name"] == "plain":
        yield line | {"spread": f"{r['spread']:.0%}", "what": f"{r['of_bound']:.0%} of the bound: "
                      f"{r['bytes_per_token'] / 1e6:.1f} MB a token at {r['bandwidth'] / 1e9:.1f} GB/s"}
    elif r["name"] == "transformers":
        yield line | {"tokens/s": f"{r['their_tokens_per_s']:.1f}",
                      "spread": f"{r['spread']['their_tokens_per_s']:.0%}", "against plain": f"{1 / r['ratio']:.2f}x",
                      "tokens as plain": "all" if r["equal"] else "not all",
                      "what": f"plain is {r['ratio']:.2f} times as fast"}
    else:
        yield line | {"spread": f"{r['spread']:.0%}", "against plain": f"{r['measured_speedup']:.2f}x",
                      "by weights read": f"{r['predicted_speedup']:.2f}x", "tokens as plain": f"{r['agreement']:.1%}",
                      "what": f"exits {' '.join(map(str, r['exits']))}" if "exits" in r else
                              f"{r['acceptance']:.1%} accepted, {r['mean_accepted']:.2f} a round"}


LINES: dict[str, Callable[[Result], Iterator[Line]]] = {
    "step": step, "optimizer": optimizer, "memory": memory, "stages": stages, "head": head, "attention": attention,
    "specialist": specialist, "data": data, "decode": decode}
UPRIGHT = ("data",)                                  # a column for each result: it has more measures than fit a line


# -- cells -------------------------------------------------------------------------------------------------------------

def ms(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"


def mib(size: int, digits: int = 2) -> str:
    return f"{size / 2**20:,.{digits}f}"


def percent(shares: Iterable[float], digits: int = 0) -> str:
    return " ".join(f"{share:.{digits}%}" for share in shares)
