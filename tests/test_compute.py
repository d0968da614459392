"""How a rank computes: activation checkpointing, compiled blocks, the choice of attention, allocator and collector."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nanopoe.config import Experiment, config_hash, load_experiment
from nanopoe.config.schema import ModelConfig, ObjectiveConfig, RuntimeConfig, SpecialistShape
from nanopoe.dist import World
from nanopoe.errors import ConfigError
from nanopoe.model import GPT, windows
from nanopoe.model.attention import attend
from nanopoe.model.gpt import enter_block
from nanopoe.model.loss import split_rows
from nanopoe.model.specialist import backward
from nanopoe.model.windows import choose_kernel, windowed_kernel
from nanopoe.train import compute, loop
from nanopoe.train.bench_specialist import SavedMemory
from nanopoe.train.build import Run, build_model
from nanopoe.train.compute import Collector, choose_compute, expand_segments
from nanopoe.train.loop import train
from tests.commands import write_yaml
from tests.models import live_model
from tests.ranks import experiment_dict, model_config
from tests.test_train import interrupted_at

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
OBJECTIVE = ObjectiveConfig(kind="ce", alpha=0.0, rho=None)
ROWS = torch.randint(0, 300, (2, 33), generator=torch.Generator().manual_seed(3))
KINDS: dict[str, dict[str, Any]] = {
    "flat": {"poe_every": 3}, "hier": {"poe_mode": "hier", "poe_every": 3},
    "none": {"poe_mode": "none", "poe_every": None},
    "specialist": {"poe_every": 3, "specialists": (SpecialistShape(n_layer=4, parent=None),)}}


def small(kind: str) -> ModelConfig:
    """6 layers with windows of 16 of 32 tokens, some with value embeddings."""
    return model_config(**{"n_layer": 6, "window_sizes": (16, 16, 32, 16, 16, 32), **KINDS[kind]})


def gradients(model: GPT, rows: Tensor = ROWS) -> dict[str, Tensor]:
    model.zero_grad()
    backward(model, *split_rows(rows), OBJECTIVE, 1 / 64)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def calls_of(model: GPT, part: str) -> Callable[[], int]:
    """How often blocks whose names begin with `part` have run, or begun to: what is run again ends where it can."""
    seen: list[str] = []
    for name, module in model.named_modules():
        if name.startswith(part) and name.endswith(".mlp"):
            module.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
    return lambda: len(seen)


# -- activation checkpointing -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_run_again_give_the_same_bits_and_keep_little(kind: str, dtype: torch.dtype) -> None:
    model = live_model(small(kind))
    model.compute_dtype = dtype
    trained, depth = ("specialists.0.h.", 4) if kind == "specialist" else ("transformer.h.", 6)
    calls, found, peaks, counts = calls_of(model, trained), [], [], []
    for model.recompute in (False, True):
        before = calls()
        with SavedMemory(model) as memory:
            found.append(gradients(model))
        peaks.append(memory.peak)
        counts.append(calls() - before)
    assert counts == [depth, 2 * depth]                                # control: nothing else ran blocks twice
    assert found[0].keys() == found[1].keys() and len(found[0]) > depth
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert peaks[1] < 0.2 * peaks[0]                                   # beside it, one block at a time in the backward


def test_what_is_frozen_or_evaluated_is_not_run_again() -> None:
    model = live_model(small("specialist"))
    model.recompute, calls = True, calls_of(model, "transformer.h.")
    gradients(model)
    assert calls() == 6
    with torch.no_grad():
        model(ROWS)
    assert calls() == 12


# -- compiled blocks --------------------------------------------------------------------------------------------------

def graphs_of(model: GPT, backend: str) -> list[Any]:
    """Compile the blocks of `model` for ROWS with a backend; the list of graphs, which grows as they are made."""
    import torch._dynamo as dynamo

    made: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        made.append(graph)
        return dynamo.lookup_backend(backend)(graph, inputs)

    dynamo.reset()
    model.compiled = torch.compile(enter_block, dynamic=False, fullgraph=True, backend=count)
    model.compiled_for = (2, 32)
    return made


def test_a_block_is_one_graph_and_equal_blocks_share_it() -> None:
    model = live_model(model_config(n_layer=12, window_sizes=(16, 32) * 6, poe_every=6, ve_layers=(1, 3, 5, 7, 9, 11)))
    names, plain = list(model.state_dict()), gradients(model)
    hooked: list[Tensor] = []
    model.get_parameter("transformer.h.3.mlp.c_fc.weight").register_post_accumulate_grad_hook(hooked.append)
    made = graphs_of(model, "eager")
    for model.recompute in (False, True):
        compiled = gradients(model)
        assert all(torch.equal(plain[name], compiled[name]) for name in plain)
        # as many for 12 blocks: (16, no ve) where x is x0, where the stage begins, and elsewhere; (32, ve)
        assert len(made) == 4
    assert len(hooked) == 2 and list(model.state_dict()) == names


def test_other_shapes_run_as_they_are() -> None:
    model, seen = live_model(small("flat")), []

    def spy(*inputs: Any) -> Tensor:
        seen.append(1)
        return enter_block(*inputs)

    model.compiled, model.compiled_for = spy, (2, 32)
    for rows, times in ((ROWS, 6), (ROWS[:1], 0), (ROWS[:, :20], 0)):
        seen.clear()
        gradients(model, rows)
        assert len(seen) == times
        with torch.no_grad():
            model(rows[:, :-1])
        assert len(seen) == 2 * times


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_on_a_cpu_the_gradients_agree(dtype: torch.dtype) -> None:
    """In fp32 within 1e-5; in bf16, where code that rounds less often is further from code that does, both are as near
    to those of fp32."""
    import torch._dynamo as dynamo

    model = live_model(small("flat"))
    exact = gradients(model)

    def worst(found: dict[str, Tensor]) -> float:
        return max(float((found[name] - e).norm() / e.norm()) for name, e in exact.items())

    model.compute_dtype = dtype
    limit = max(1e-5, 1.2 * worst(gradients(model)))
    dynamo.reset()
    model.compiled, model.compiled_for = torch.compile(enter_block, dynamic=False, fullgraph=True), (2, 32)
    assert worst(gradients(model)) <= limit
    model.compiled = lambda *inputs: enter_block(*inputs) * 1.5        # control: it is what runs
    assert worst(gradients(model)) > limit


@pytest.mark.slow
def test_a_run_with_compiled_blocks_ends_with_the_same_weights(data: Path, tmp_path: Path) -> None:
    """From a checkpoint on: at a fresh start many gradients are rounding alone, and AdamW steps by their sign."""
    def run(folder: str, **changes: Any) -> Run:
        path = write_yaml(tmp_path / "tiny.yaml", experiment_dict(data, tmp_path / folder, **changes))
        return train(load_experiment(path), World(0, 1, CPU))

    source = run("source", **{"runtime.compile": "off"}).folder
    runs = []
    for how in ("off", "on"):
        interrupted_at(source, 3, tmp_path / how)
        runs.append(run(how, **{"runtime.compile": how, "runtime.activation_checkpointing": how == "on"}))
        assert runs[-1].resumed_from is not None
    plain, compiled = (run.model.state_dict() for run in runs)
    assert [run.compute.compiled for run in runs] == [False, True]
    assert runs[1].compute.reason.endswith("blocks compiled") and runs[1].model.compiled_for == (4, 32)
    assert plain.keys() == compiled.keys()
    errors = {name: float((compiled[name] - p).norm() / p.norm().clamp(min=1e-9)) for name, p in plain.items()}
    assert 0 < max(errors.values()) < 1e-3, errors                     # not the same code, the same training


def test_no_compiler_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._dynamo as dynamo
    import torch._inductor.config as inductor

    dynamo.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))       # nothing is compiled there yet
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))    # as CXX says before torch is there
    with pytest.raises(ConfigError) as raised:
        choose_compute(RuntimeConfig(compile="on"), World(0, 1, CPU), 1)
    line = str(raised.value)
    assert "torch.compile does not work on this cpu: " in line and "runtime.compile=off" in line
    assert "no-such-compiler" in line and "\n" not in line
    assert not choose_compute(RuntimeConfig(), World(0, 1, CPU), 1).compiled     # control: auto asks no compiler here


# -- the experiment's options -----------------------------------------------------------------------------------------

def test_options_reach_their_place_and_are_not_learned(data: Path, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "_taken", {})
    hashes = set()
    for again in (False, True):
        changes = {"runtime.activation_checkpointing": again, "runtime.attention": "blocks", "runtime.compile": "off"}
        experiment = load_experiment(write_yaml(tmp_path / "tiny.yaml", experiment_dict(data, tmp_path, **changes)))
        world = World(0, 1, CPU)
        chosen = choose_compute(experiment.runtime, world, 1)
        model = build_model(experiment, world, chosen, None)
        assert (model.recompute, model.compiled, chosen.compiled) == (again, None, False)
        assert chosen.reason.endswith("1 thread; windows by blocks for a CPU; blocks not compiled")
        hashes.add(config_hash(experiment))
    assert len(hashes) == 1


# -- the choice of attention ------------------------------------------------------------------------------------------

@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """gpu(capability, *packages): what choose_kernel is told of a GPU and of what is installed. None is used."""
    def pretend(capability: int, *packages: str) -> None:
        monkeypatch.setattr(windows, "_taken", {})
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
        monkeypatch.setattr(windows, "find_spec", lambda name: name if name in packages else None)
        monkeypatch.setattr(windows, "import_module", lambda name: SimpleNamespace(flash_attn_func=name))

    return pretend


def test_the_first_kernel_that_fits_is_taken(gpu: Callable[..., None]) -> None:
    flash = "flash_attn_interface", "flash_attn", "triton"
    for capability, packages, dtype, name in (
            (9, flash, torch.bfloat16, "FlashAttention 3"), (8, flash, torch.bfloat16, "FlashAttention 2"),
            (9, flash, torch.float32, "FlexAttention"), (9, ("triton",), torch.bfloat16, "FlexAttention"),
            (9, (), torch.bfloat16, "blocks of SDPA")):
        gpu(capability, *packages)
        kernel = windowed_kernel(CUDA, dtype)
        assert (kernel.name, kernel.whole) == (name, "Flash" not in name)
        assert windowed_kernel(CUDA, dtype) is kernel                  # once per process


def test_a_kernel_can_be_forced(gpu: Callable[..., None]) -> None:
    gpu(9, "flash_attn", "triton")
    for name, wanted in (("flash", "FlashAttention 2"), ("flex", "FlexAttention"), ("blocks", "blocks of SDPA"),
                         ("auto", "FlashAttention 2")):
        assert choose_kernel(CUDA, torch.bfloat16, name).name == wanted
        assert windowed_kernel(CUDA, torch.bfloat16).name == wanted
    assert choose_kernel(CUDA, torch.bfloat16, documents=True).name == "FlexAttention"     # flash knows no documents


@pytest.mark.parametrize("name", ["flash", "flex"])
def test_a_kernel_that_is_not_there_is_refused(name: str, gpu: Callable[..., None]) -> None:
    gpu(9)
    for device in (CPU, CUDA):
        with pytest.raises(ConfigError, match=r"runtime\.attention.*install"):
            choose_kernel(device, torch.bfloat16, name)
    with pytest.raises(ConfigError, match=r"runtime\.attention"):
        choose_compute(RuntimeConfig(attention=name), World(0, 1, CPU), 1)       # type: ignore[arg-type]


def test_attend_uses_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "_taken", {("cpu", torch.float32): windows.Kernel("zeros", lambda q, *_: 0 * q)})
    q = torch.ones(1, 2, 40, 8)
    assert not attend(q, q, q, 5).any()
    choose_kernel(CPU, torch.float32)
    assert attend(q, q, q, 5).all()


# -- attention in compiled graphs -------------------------------------------------------------------------------------

def heads(n: int, *kv: int, length: int = 150) -> list[Tensor]:
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(1, h, length, 16, generator=generator).requires_grad_() for h in (n, *kv)]


@pytest.mark.parametrize("documents", [False, True])
def test_the_operator_in_a_graph_is_the_function_outside(documents: bool) -> None:
    q, k, v = (x[0] for x in heads(2, 2, 2))
    starts = torch.arange(150).floor_divide(60).mul(60).unsqueeze(0) if documents else None
    torch.library.opcheck(windows._opaque_blocks, (q.detach(), k.detach().requires_grad_(), v.detach(), 70, starts))
    outputs = [run(q, k, v, 70, starts) for run in (windows._opaque_blocks, windows._Blocks.apply)]
    assert torch.equal(*outputs)
    for mine, other in zip(*(torch.autograd.grad(y.sin().sum(), (q, k, v)) for y in outputs), strict=True):
        assert torch.equal(mine, other) and mine.any()


@pytest.mark.parametrize("kernel", [windows._flex, windows._sdpa_in_blocks], ids=lambda k: k.__name__)
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_kernels_of_a_gpu_fit_into_one_graph(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and run on a CPU, where FlexAttention has no gradient."""
    q, k, v = (x.detach() for x in heads(4, 2, 2, length=256))
    expected = attend(q, k, v, 100)
    chosen = windows.Kernel("in a graph", kernel)
    monkeypatch.setattr(windows, "_taken", {("cpu", torch.float32): chosen})
    windows.prepare(chosen, 256, [100, 256], CPU)
    torch._dynamo.reset()
    whole = torch.compile(attend, dynamic=False, fullgraph=True, backend="eager")
    torch.testing.assert_close(whole(q, k, v, 100), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(whole(q, k, v, 99), expected, atol=1e-3)           # control
    ids = torch.ones(1, 256, dtype=torch.int64)
    ids[:, [0, 100, 130]] = 0                                                    # where documents begin
    for window in (100, 256):
        documents = windows.find_documents(ids, 0, [100, 256], torch.float32)
        cut = torch.cat([attend(*(x[:, :, a:b] for x in (q, k, v)), window)
                         for a, b in ((0, 100), (100, 130), (130, 256))], dim=2)
        torch.testing.assert_close(whole(q, k, v, window, None, documents), cut, rtol=1e-5, atol=1e-6)


# -- the collector ----------------------------------------------------------------------------------------------------

@pytest.fixture
def experiment(data: Path, tmp_path: Path) -> Experiment:
    changes = {"checkpoint.every": None, "evaluation.every": None}
    return load_experiment(write_yaml(tmp_path / "tiny.yaml", experiment_dict(data, tmp_path / "run", **changes)))


@pytest.fixture
def enabled() -> Iterator[None]:
    assert gc.isenabled() and gc.get_freeze_count() == 0
    yield
    gc.unfreeze()
    gc.enable()


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("fails", [False, True])
def test_steps_are_not_stopped_by_the_collector(fails: bool, experiment: Experiment,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    real, found = loop.train_step, []

    def step(*args: Any, **named: Any) -> Any:
        found.append((gc.isenabled(), gc.get_freeze_count() > 0))
        if fails and len(found) == 4:
            raise ConfigError("no", "step 4", "stop")
        return real(*args, **named)

    monkeypatch.setattr(loop, "train_step", step)
    if fails:
        with pytest.raises(ConfigError):
            train(experiment, World(0, 1, CPU))
    else:
        train(experiment, World(0, 1, CPU))
    assert found == [(True, False)] + [(False, True)] * (3 if fails else 7)
    assert gc.isenabled() and gc.get_freeze_count() == 0


@pytest.mark.usefixtures("enabled")
def test_garbage_goes_when_asked_for_and_all_is_left_as_found() -> None:
    class Ring:
        gone = 0

        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            Ring.gone += 1

    with Collector() as collector:
        collector.start()
        for _ in range(5000):
            Ring()
        assert Ring.gone == 0                                          # control: nobody else collects
        collector.collect()
        assert Ring.gone == 5000
    gc.disable()
    with Collector() as collector:
        collector.start()
    assert not gc.isenabled()


@pytest.mark.usefixtures("enabled")
@pytest.mark.parametrize("again", [False, True])
def test_a_backward_leaves_no_tensors_to_the_collector(again: bool) -> None:
    """Or activations would pile up while it is off."""
    def tensors(act: Callable[[], object]) -> int:
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        act()
        gc.collect()
        gc.set_debug(0)
        found = sum(isinstance(x, Tensor) for x in gc.garbage)
        gc.garbage.clear()
        return found

    def ring() -> None:
        loose: list[Any] = [torch.ones(1)]
        loose.append(loose)

    model = live_model(small("flat"))
    model.recompute = again
    gradients(model)
    assert (tensors(lambda: gradients(model)), tensors(ring)) == (0, 1)            # the second is the control


# -- the allocator ----------------------------------------------------------------------------------------------------

def test_segments_grow_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    def settings(device: torch.device, **environment: str) -> str:
        torch._C._accelerator_setAllocatorSettings("expandable_segments:False")
        for name in compute.ALLOCATOR_VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        expand_segments(device)
        told: str = torch._C._accelerator_getAllocatorSettings()
        torch._C._accelerator_setAllocatorSettings("expandable_segments:False")
        return told

    assert settings(CUDA) == "expandable_segments:True"
    assert settings(CPU) == "expandable_segments:False"
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        assert settings(CUDA, **{name: "max_split_size_mb:64"}) == "expandable_segments:False"


def test_bfloat16_on_a_cpu_says_what_it_is_worth() -> None:
    """And leaves products in fp32, as those of the optimizer, as torch makes them."""
    matmul: Any = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    try:
        reason = choose_compute(RuntimeConfig(compute_dtype="bfloat16"), World(0, 1, CPU), 1).reason
        assert re.search(r"asked for; its products run at \d+\.\d times float32's rate here;", reason)
        assert matmul.fp32_precision == "none"
        assert "times" not in choose_compute(RuntimeConfig(), World(0, 1, CPU), 1).reason        # control
    finally:
        matmul.fp32_precision = before
