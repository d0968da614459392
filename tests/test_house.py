"""The house rules a machine can check: imports point down, nothing dangerous is called, every config is valid."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanopoe.config import dump_experiment, load_experiment, valid_world_sizes
from nanopoe.config.schema import SourceConfig

ROOT = Path(__file__).parents[1]

LAYERS = {
    "": 0, "errors": 0, "dist": 1, "config": 2,
    "schedule": 3, "tokenizer": 3, "model": 3, "optim": 3, "data": 3,
    "checkpoint": 4, "infer": 4,
    "train": 5, "export": 5, "report": 5,
}
WITHOUT_TORCH = ("errors", "config", "schedule")
COPIED_OUT = "nanopoe/export/hub_code/"          # leaves with an export and runs beside transformers, without us

# (file, what): exceptions to the ban, each with its reason.
ALLOWED = {("scripts/try_export.py", "trust_remote_code"),        # they load our own export, with the code we put there
           ("scripts/bench.py", "trust_remote_code"),
           ("nanopoe/checkpoint/foreign.py", "torch.load")}          # nanochat's files, with weights_only


def python_files(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# -- imports ----------------------------------------------------------------------------------------------------------

def imports(tree: ast.AST, module: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported anywhere in the file; relative imports resolved from `module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], *([base] if base else [])])
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def room_of(dotted: str) -> str | None:
    """`nanopoe.model.gpt` -> `model`; None outside of the package, '' for the package itself."""
    parts = dotted.split(".")
    if parts[0] != "nanopoe":
        return None
    return parts[1] if len(parts) > 1 and (parts[1] in LAYERS or not parts[1].startswith("_")) else ""


def layer_faults(source: str, module: str) -> list[str]:
    """Imports of `module` (dotted) that point up, sideways, out to scripts or tests, or to torch where none may."""
    faults, own = [], room_of(module)
    for line, name in imports(ast.parse(source), module):
        top, room = name.split(".")[0], room_of(name)
        if own is None:                                       # a script: may use the package, not other scripts
            if top in ("scripts", "tests"):
                faults.append(f"{module}:{line} imports {name}")
            continue
        if top in ("scripts", "tests") or (top == "torch" and own in WITHOUT_TORCH):
            faults.append(f"{module}:{line} imports {name}")
        if room in (None, own) or (room not in LAYERS and name.startswith("nanopoe.") and name.count(".") == 1
                                   and not (ROOT / "nanopoe" / room).exists()):
            continue                                          # not ours, our own room, or a name of nanopoe/__init__
        if room not in LAYERS or own not in LAYERS:
            faults.append(f"{module}:{line} has no layer or imports what has none: {name}")
        elif LAYERS[room] >= LAYERS[own] and room != "":
            faults.append(f"{module}:{line} (layer {LAYERS[own]}) imports {name} (layer {LAYERS[room]})")
    return faults


def module_name(path: Path) -> str:
    return relative(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def test_imports_point_strictly_down() -> None:
    files = [p for p in python_files("nanopoe", "scripts") if not relative(p).startswith(COPIED_OUT)]
    assert len(files) > 20
    assert [fault for p in files for fault in layer_faults(p.read_text("utf-8"), module_name(p))] == []


def test_every_room_has_a_layer() -> None:
    rooms = {p.stem if p.is_file() else p.name for p in (ROOT / "nanopoe").iterdir()
             if p.suffix == ".py" or (p.is_dir() and not p.name.startswith(("_", ".")))}
    assert rooms - {"__init__"} <= set(LAYERS)


@pytest.mark.parametrize(("module", "source"), [
    ("nanopoe.model.gpt", "from nanopoe.train.step import train_step"),      # up
    ("nanopoe.model.gpt", "import nanopoe.optim.kernels"),                   # sideways
    ("nanopoe.model.gpt", "from nanopoe import optim"),                      # sideways, hidden in a name
    ("nanopoe.model.gpt", "from ..optim import kernels"),                    # sideways, relative
    ("nanopoe.infer.engine", "def f():\n    from nanopoe.checkpoint import store"),   # sideways, inside a function
    ("nanopoe.errors", "from nanopoe.dist import rank"),
    ("nanopoe.config.load", "import torch.nn as nn"),
    ("nanopoe.config.load", "from torch import Tensor"),
    ("nanopoe.train.loop", "from scripts.train import main"),
    ("nanopoe.train.loop", "from tests.ranks import run_ranks"),
    ("nanopoe.attic.x", "import nanopoe.errors"),                            # a room that is not in the table
    ("scripts.train", "from scripts.evaluate import main"),
])
def test_the_import_check_flags_a_bad_module(module: str, source: str) -> None:
    assert len(set(layer_faults(source, module))) >= 1


@pytest.mark.parametrize(("module", "source"), [
    ("nanopoe.model.gpt", "import torch\nfrom nanopoe.model.pool import aggregate\nfrom . import attention"),
    ("nanopoe.train.loop", "from nanopoe import __version__\nfrom nanopoe.checkpoint import store"),
    ("nanopoe.checkpoint.store", "from nanopoe.config import Experiment\nfrom nanopoe.optim import groups"),
    ("scripts.train", "from nanopoe.train.loop import run"),
])
def test_the_import_check_passes_a_good_module(module: str, source: str) -> None:
    assert layer_faults(source, module) == []


def test_config_needs_no_torch_when_it_runs() -> None:
    code = ("import sys, nanopoe.config, nanopoe.config.counts, nanopoe.errors, nanopoe.schedule; "
            "print(sorted({'torch', 'numpy', 'yaml'} & set(sys.modules)))")
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "['yaml']"               # yaml is the control arm


# -- the ban ----------------------------------------------------------------------------------------------------------

BANNED_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
BANNED_CALLS = {"eval", "exec", "os.system", "os.popen", "torch.load", "torch.save", "yaml.load", "yaml.load_all",
                "yaml.unsafe_load", "yaml.full_load"}
BANNED_KEYWORDS = {"shell", "trust_remote_code", "allow_pickle"}        # banned unless the value is literally False


def ban_faults(source: str) -> list[tuple[int, str]]:
    """(line, what) of every banned import, call or keyword in the code; text in strings and comments is free."""
    faults = []
    tree = ast.parse(source)
    for line, name in imports(tree, ""):
        if name.split(".")[0] in BANNED_MODULES or name in BANNED_CALLS:
            faults.append((line, name))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)) and ast.unparse(node) in BANNED_CALLS:
            faults.append((node.lineno, ast.unparse(node)))
        elif isinstance(node, ast.keyword) and node.arg in BANNED_KEYWORDS and ast.unparse(node.value) != "False":
            faults.append((node.value.lineno, str(node.arg)))
    return faults


def test_nothing_dangerous_is_called() -> None:
    found = {(relative(p), what): line for p in python_files("nanopoe", "scripts")
             for line, what in ban_faults(p.read_text("utf-8"))}
    assert {key: line for key, line in found.items() if key not in ALLOWED} == {}
    assert set(found) >= ALLOWED, "an exception that is no longer needed"


@pytest.mark.parametrize("bad", [
    "import pickle", "from pickle import loads", "import torch\ntorch.load('x')", "from torch import load",
    "f = torch.load", "eval('1')", "exec('1')", "yaml.load(x, Loader=L)", "run(x, shell=True)", "run(x, shell=flag)",
    "M.from_pretrained(d, trust_remote_code=True)", "import dill as d", "os.system('ls')",
    "np.load(f, allow_pickle=True)",
])
def test_the_ban_flags_bad_code(bad: str) -> None:
    assert ban_faults(bad)


@pytest.mark.parametrize("good", [
    "model.eval()", "x = 'trust_remote_code=True in a README'", "# eval(x)", "yaml.parse(x)", "run(x, shell=False)",
    "load_dataset(x, trust_remote_code=False)", "re.compile('x').search('exec(')", "safetensors.torch.load_file(x)",
])
def test_the_ban_passes_good_code(good: str) -> None:
    assert ban_faults(good) == []


# -- text -------------------------------------------------------------------------------------------------------------

MACHINE_PATH = re.compile(r"(?<![\w./~$}-])/(home|work|root|Users|mnt|opt|srv)/\w")
REGISTRY_HOST = re.compile(r"\b(py" r"pi\.org|python" r"hosted\.org|index-url)\b")


def text_files() -> list[Path]:
    suffixes = {".py", ".yaml", ".yml", ".md", ".sh", ".toml", ".txt", ".lock", ".json", ".jinja", ""}
    found = [p for p in ROOT.iterdir() if p.is_file() and p.suffix in suffixes]
    for folder in ("nanopoe", "scripts", "configs", "runs", "tests", ".ci"):
        found += [p for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix in suffixes]
    return sorted(p for p in found if "__pycache__" not in p.parts and p != Path(__file__))


def text_faults(text: str) -> list[str]:
    return [m.group() for pattern in (MACHINE_PATH, REGISTRY_HOST) for m in pattern.finditer(text)]


def test_no_machine_paths_and_no_registry_hosts() -> None:
    files = text_files()
    assert len(files) > 30
    assert {relative(p): faults for p in files if (faults := text_faults(p.read_text("utf-8")))} == {}


def test_the_text_check_flags_bad_text() -> None:
    for bad in ("cd /home/me/x", 'path="/work/x"', "https://" + "py" + "pi.org/simple", "--" + "index-url x"):
        assert text_faults(bad)
    for good in ("out/work/x", "../shared", "https://example.org/work/x", "./home/x", "frame/work/x"):
        assert text_faults(good) == []


# -- configs ----------------------------------------------------------------------------------------------------------

CONFIGS = sorted((ROOT / "configs").glob("*.y*ml"))
MIXTURES = sorted((ROOT / "configs" / "data").glob("*.y*ml"))
NEEDED = {"quickstart", "bp_1p3b", "poe_1p3b", "poe_1p5b", "poe_3b", "poe_3b_cycle2", "small_bp", "small_poe"}


def test_no_config_file_is_missed() -> None:
    here = {p for p in (ROOT / "configs").rglob("*") if p.is_file()}
    assert here == {*CONFIGS, *MIXTURES}, "experiments belong into configs/, mixtures into configs/data, nothing else"
    assert {p.stem for p in CONFIGS} >= NEEDED


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_is_valid(path: Path) -> None:
    exp = load_experiment(path)
    assert exp.name == path.stem
    assert 1 in valid_world_sizes(exp)
    assert path.read_text("utf-8").startswith("# "), "an experiment file begins by saying what it is"


def shares(sources: tuple[SourceConfig, ...]) -> dict[str, float]:
    return {s.name: s.weight for s in sources}


def test_configs_hold_the_published_numbers() -> None:
    mix = {"fineweb-edu": 33.5, "dclm-baseline": 24, "stack-v2": 16, "wikipedia": 5, "culturax": 5, "proofpile-2": 4,
           "openwebmath": 4, "gutenberg": 4, "pg-19": 2, "ultrachat": 1, "openhermes-2.5": 0.6}
    for name in ("poe_3b", "poe_3b_cycle2"):
        exp = load_experiment(ROOT / f"configs/{name}.yaml")
        assert shares(exp.data.train) == mix
        assert sum(mix.values()) == pytest.approx(99.1)
        assert [s.name for s in exp.data.train if s.code] == ["stack-v2"]
        assert (exp.data.case_aug_prob, exp.data.lanes, exp.batch.device_batch_size) == (0.15, 48, 32)
        assert (exp.optim.matrix_lr, exp.optim.embedding_lr, exp.optim.unembedding_lr) == (0.015, 0.30, 0.008)
        assert exp.model.poe_stage_layers == (16, 6, 5, 5)
        assert exp.model.stage_heads
    for name in ("bp_1p3b", "poe_1p3b", "poe_1p5b"):
        exp = load_experiment(ROOT / f"configs/{name}.yaml")
        o = exp.optim
        assert (o.matrix_lr, o.embedding_lr, o.unembedding_lr, o.scalar_lr) == (0.02, 0.30, 0.008, 0.5)
        assert (o.weight_decay, o.reference_batch_tokens, o.reference_scaling_params) == (0.28, 2**19, 110_100_912)
        assert exp.batch.tokens_per_step == 1_048_576
        assert exp.data.case_aug_prob == 0
    assert (exp.objective.kind, exp.objective.rho, exp.model.vocab_size) == ("residual_logop", 0.5, 48_000)
    assert exp.model.poe_stage_layers == (12, 5, 4, 3)
    assert exp.model.n_kv_head == 6


@pytest.mark.parametrize("pair", [("small_bp", "small_poe"), ("bp_1p3b", "poe_1p3b")])
def test_the_arms_of_a_pair_differ_in_their_stages_only(pair: tuple[str, str]) -> None:
    bp, poe = (dump_experiment(load_experiment(ROOT / f"configs/{name}.yaml")) for name in pair)
    assert [k for k in bp if bp[k] != poe[k]] == ["name", "model"]
    assert [k for k in bp["model"] if bp["model"][k] != poe["model"][k]] == ["poe_mode", "poe_every"]
