"""How a rank computes: dtype, threads, matmul backend, attention, compiler, allocator, collector, and the peak that MFU
is measured against."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from nanopoe import dist
from nanopoe.config import layout_of, valid_world_sizes
from nanopoe.config.check import divisors
from nanopoe.config.memory import GIB, memory_per_rank
from nanopoe.config.schema import Experiment, RuntimeConfig
from nanopoe.dist import World
from nanopoe.errors import ConfigError
from nanopoe.model.float8 import check_float8
from nanopoe.model.windows import Kernel, choose_kernel

# Dense bf16 FLOP/s of data sheets, by a part of the device's name; what is not listed is measured.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10G": 70e12, "B200": 2250e12}
PEAK_S = 0.3             # seconds that a matmul peak is looked for
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")       # the second is the older name
EXACT = 2e-6             # relative error up to which an fp32 matmul backend counts as fp32


@dataclass(frozen=True)
class Compute:
    dtype: torch.dtype
    reason: str              # one line for the console
    peak_flops: float        # FLOP/s of a large matmul in `dtype` on this rank
    device_name: str
    attention: Kernel        # of layers with a window
    compiled: bool           # whether blocks are, for batches of the training's shape


def choose_compute(runtime: RuntimeConfig, world: World, ranks_here: int, documents: bool = False) -> Compute:
    """Set up this process and say what was chosen, for data.document_mask if `documents`. ConfigError for a dtype the
    device does not compute in, and for a kernel of attention or a compiler that is not there."""
    if runtime.float8:
        check_float8(world.device)
    if world.device.type == "cuda":
        return _choose_cuda(runtime, world.device, documents)
    return _choose_cpu(runtime, world.device, ranks_here)


def _choose_cpu(runtime: RuntimeConfig, device: torch.device, ranks_here: int) -> Compute:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = runtime.threads or max(1, cores // ranks_here)
    torch.set_num_threads(threads)
    keep_freed_memory()
    dtype = torch.bfloat16 if runtime.compute_dtype == "bfloat16" else torch.float32
    reason = "asked for" if runtime.compute_dtype != "auto" else "exact, and every CPU has it"
    matmul = choose_fp32_matmul()
    peak = measured_peak(device, torch.float32)
    if dtype == torch.float32:
        reason += f"; {matmul}"
    else:                                                  # half as fast on some CPUs, and many times as fast on others
        leave_fp32_matmul()
        fp32, peak = peak, measured_peak(device, dtype)
        reason += f"; its products run at {peak / fp32:.1f} times float32's rate here"
    kernel, compiled = choose_kernel(device, dtype, runtime.attention), choose_compiler(runtime, device)
    return Compute(dtype, f"{reason}; {threads} thread{'s' * (threads > 1)}; {_how(runtime, kernel, compiled)}", peak,
                   platform.processor() or platform.machine(), kernel, compiled)


def _choose_cuda(runtime: RuntimeConfig, device: torch.device, documents: bool) -> Compute:
    expand_segments(device)
    supported = torch.cuda.is_bf16_supported(including_emulation=False)
    if runtime.compute_dtype == "bfloat16" and not supported:
        raise ConfigError("this GPU has no bfloat16", "runtime.compute_dtype", "use float32")
    use_bf16 = runtime.compute_dtype == "bfloat16" or (runtime.compute_dtype == "auto" and supported)
    dtype = torch.bfloat16 if use_bf16 else torch.float32
    reason = "the GPU has it" if supported else "no bfloat16 here"
    if runtime.compute_dtype != "auto":
        reason = "asked for"
    name = torch.cuda.get_device_name(device)
    listed = next((peak for part, peak in PEAKS.items() if part in name), None) if use_bf16 else None
    peak = listed or measured_peak(device, dtype)
    known = "listed" if listed else "measured"
    kernel = choose_kernel(device, dtype, runtime.attention, documents)
    compiled = choose_compiler(runtime, device)
    reason += f"; MFU against {peak / 1e12:.0f} TFLOP/s {known}; {_how(runtime, kernel, compiled)}"
    return Compute(dtype, reason, peak, name, kernel, compiled)


def _how(runtime: RuntimeConfig, kernel: Kernel, compiled: bool) -> str:
    blocks = "compiled" if compiled else "not compiled"
    return f"windows by {kernel.name}; blocks {'in float8, ' * runtime.float8}{blocks}"


def choose_compiler(runtime: RuntimeConfig, device: torch.device) -> bool:
    """Whether blocks are compiled. A small function is compiled first: ConfigError if that does not work here."""
    cuda = device.type == "cuda"
    if runtime.compile == "off" or (runtime.compile == "auto" and not (cuda and find_spec("triton") is not None)):
        return False
    try:
        torch.compile(lambda x: x.sin() + 1, dynamic=False)(torch.zeros(8, device=device))
    except Exception as error:                             # of many kinds, from the compiler's own to the linker's
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        needs = "triton and a C compiler" if cuda else "a C++ compiler (g++, or name it in CXX) and Python's headers"
        raise ConfigError(f"torch.compile does not work on this {device.type}: {text}", "runtime.compile",
                          f"install {needs}, or use runtime.compile=off") from error
    return True


def expand_segments(device: torch.device) -> None:
    """Let CUDA's allocator grow its segments instead of taking new ones beside holes, unless the user's environment
    says how it is to work. Call before the first allocation: what it holds already stays as it is."""
    if device.type == "cuda" and not any(os.environ.get(name) for name in ALLOCATOR_VARIABLES):
        # the environment is read when torch first asks it, which may be over by now
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def choose_fp32_matmul() -> str:
    """Route fp32 matmuls to oneDNN where that is still exact, which on some CPUs doubles their rate.

    The switch allows oneDNN to round inputs to bf16. CPUs without AMX do not; this is checked, not assumed, and the
    switch is turned back where the error shows rounding.
    """
    if not torch.backends.mkldnn.is_available():
        return "default matmul"
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    backend: Any = torch.backends.mkldnn                    # its `matmul` is made at run time
    backend.matmul.fp32_precision = "bf16"
    error = float((a @ b - exact).norm() / exact.norm())
    if error <= EXACT:
        return f"oneDNN matmul, relative error {error:.0e}"
    leave_fp32_matmul()
    return f"default matmul (oneDNN would round: relative error {error:.0e})"


def leave_fp32_matmul() -> None:
    """fp32 matmuls by torch's own choice, as before choose_fp32_matmul."""
    backend: Any = torch.backends.mkldnn
    backend.matmul.fp32_precision = "none"


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best square matmul in PEAK_S seconds, of 1024 on a CPU and 8192 on a GPU, after one to warm up."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)

    def seconds() -> float:
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    seconds()
    best, end = seconds(), time.perf_counter() + PEAK_S
    while time.perf_counter() < end:
        best = min(best, seconds())
    return 2 * n**3 / best


def keep_freed_memory() -> None:
    """Tell glibc not to give large freed blocks back: mapping logits anew each step costs a third of a CPU step."""
    if platform.system() == "Linux":
        try:
            mallopt = ctypes.CDLL(None).mallopt
        except (OSError, AttributeError):                  # another libc
            return
        trim_threshold, mmap_threshold = -1, -3            # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
        mallopt(trim_threshold, 1 << 30)
        mallopt(mmap_threshold, 1 << 30)


class Collector:
    """Garbage is collected when asked for in its `with` block, not in the middle of a step, where one rank's collection
    makes all of them wait. At the end all is as it was found, also after an error."""

    def __init__(self) -> None:
        self.under_way = False

    def __enter__(self) -> Collector:
        self._enabled, self._frozen = gc.isenabled(), gc.get_freeze_count()
        return self

    def start(self) -> None:
        """Training is under way: what is there now stays, so later collections need not look at it."""
        if not self.under_way:
            self.under_way = True
            gc.collect()
            gc.freeze()
            gc.disable()

    def collect(self) -> None:
        if self.under_way:
            gc.collect()

    def __exit__(self, *error: object) -> None:
        if self.under_way:
            if not self._frozen:
                gc.unfreeze()
            if self._enabled:
                gc.enable()


@contextmanager
def out_of_memory(experiment: Experiment, device: torch.device) -> Iterator[None]:
    """What does not fit into memory in this block is a ConfigError that names the knobs and their values."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:           # a GPU has its own class, a CPU tells by the text
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        rows, length = experiment.batch.device_batch_size, experiment.model.sequence_len
        raise ConfigError(f"out of memory at a peak of {size_text(memory_bytes(device))} with "
                          f"batch.device_batch_size={rows}, model.sequence_len={length}", str(device),
                          knobs(experiment, device, dist.size())) from error


def knobs(experiment: Experiment, device: torch.device, ranks: int) -> str:
    """What makes a step need less memory, with values and what is planned with them: a smaller micro-batch, activation
    checkpointing, and stages on different ranks or, where they cannot be, a shorter sequence."""
    def changed(group: str, **values: Any) -> Experiment:
        return here.model_copy(update={group: getattr(here, group).model_copy(update=values)})

    here = planned_on(experiment, device)
    rows, length, now = here.batch.device_batch_size, here.model.sequence_len, memory_per_rank(here, ranks).total
    tries: list[tuple[str, str, Experiment]] = []
    if rows > 1:
        fewer = max(d for d in divisors(rows) if d < rows)
        tries.append((f"batch.device_batch_size={fewer}", ", only rounding depends on it",
                      changed("batch", device_batch_size=fewer)))
    if not here.runtime.activation_checkpointing:
        tries.append(("runtime.activation_checkpointing=true", "", changed("runtime", activation_checkpointing=True)))
    apart = here.model.poe_mode == "flat" and here.objective.kind == "ce" and here.task != "specialist" and \
        here.runtime.numerics == "fast"
    stages = range(layout_of(here.model).n_stages, here.parallel.stages, -1) if apart else ()
    parted = [(p, e) for p in stages if ranks in valid_world_sizes(e := changed("parallel", stages=p))]
    if parted:
        tries.append((f"parallel.stages={parted[0][0]}", "", parted[0][1]))
    elif length % 2 == 0 and here.model.window_sizes is None:
        tries.append((f"model.sequence_len={length // 2}", ", another experiment",
                      changed("model", sequence_len=length // 2)))
    planned = [(name, note, memory_per_rank(e, ranks).total) for name, note, e in tries]
    found = [f"{name} ({size_text(total)}{note})" for name, note, total in planned if total < now]
    if not found:
        return "use a smaller model or more memory"
    return f"of {size_text(now)} planned, try {', '.join(found[:-1])}{' or ' * (len(found) > 1)}{found[-1]}"


def size_text(size: int) -> str:
    """Bytes as people read them: "1.25 GiB", and below that "33.0 MiB"."""
    return f"{size / GIB:,.2f} GiB" if size >= GIB else f"{size / 2**20:,.1f} MiB"


def planned_on(experiment: Experiment, device: torch.device) -> Experiment:
    """As the memory planner wants it, which knows no device but by its name."""
    return experiment.model_copy(update={"runtime": experiment.runtime.model_copy(update={"device": device.type})})


def memory_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024
