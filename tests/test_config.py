"""Experiment files: what is read is what is written, everything wrong is listed at once, nothing is adjusted."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopoe.config import config_hash, dump_experiment, experiment_from_dict, load_experiment, make_plan, yaml_subset
from nanopoe.config.load import NOT_LEARNED, read_yaml
from nanopoe.config.plan import valid_world_sizes
from nanopoe.config.schema import Experiment
from nanopoe.errors import ConfigError

ROOT = Path(__file__).parents[1]
SMALL = ROOT / "configs" / "small_poe.yaml"
# A valid experiment whose numbers the tests below count with: not those of the file, which are there to be tuned.
BASE = read_yaml(SMALL)
BASE["model"] |= {"n_layer": 8, "n_embd": 256, "n_head": 4, "n_kv_head": 4, "sequence_len": 512}
BASE["batch"] = {"tokens_per_step": 8192, "device_batch_size": 8}
BASE["schedule"]["cycles"][0] |= {"steps": 300, "warmup_steps": 10, "warmdown_ratio": 0.65, "momentum_warmup_steps": 50}
BASE["data"] |= {"train": [{"name": "corpus", "path": "data/corpus", "files": "shard_0000[0-5].parquet"}],
                 "val": [{"name": "corpus", "path": "data/corpus", "files": "shard_00006.parquet"}]}


def problems_of(changes: dict[str, Any] | None = None, overrides: tuple[str, ...] = ()) -> list[str]:
    """Problem lines of the small PoE with `changes` (dotted key -> value) or overrides; [] if it is valid."""
    try:
        if changes is None:
            load_experiment(SMALL, overrides)
        else:
            experiment_from_dict(changed(**changes), "test")
    except ConfigError as error:
        return lines_of(error)
    return []


def lines_of(error: ConfigError | yaml_subset.Refused) -> list[str]:
    """Its problems, which must be there, one printable line each."""
    assert error.problems
    assert all(p and "\n" not in p and len(p) < 400 for p in error.problems)
    if isinstance(error, ConfigError):
        assert error.render().count("\n") == len(error.problems)
    return error.problems


def changed(**changes: Any) -> dict[str, Any]:
    data = copy.deepcopy(BASE)
    for key, value in changes.items():
        here: Any = data
        *groups, last = key.split(".")
        for part in groups:
            here = here[int(part)] if isinstance(here, list) else here.setdefault(part, {})
        here[int(last) if isinstance(here, list) else last] = value
    return data


# -- YAML -------------------------------------------------------------------------------------------------------------

def test_scalars_are_what_they_look_like() -> None:
    read = yaml_subset.parse(
        "{a: 1e-3, b: .5, c: 2e-2, d: no, e: on, f: true, g: null, h: '1', i: 010, j: 1:30, k: 0x10, l: 2024-01-01,"
        " m: -3, n: 1., o: ~, p: 1_000, q: +1.5E+2, r: =, s: y, t: False, u: 1e5, v: .e5, w: '<<'}")
    assert read == {
        "a": 1e-3, "b": 0.5, "c": 2e-2, "d": "no", "e": "on", "f": True, "g": None, "h": "1", "i": "010", "j": "1:30",
        "k": "0x10", "l": "2024-01-01", "m": -3, "n": 1.0, "o": None, "p": "1_000", "q": 150.0, "r": "=", "s": "y",
        "t": False, "u": 1e5, "v": ".e5", "w": "<<"}
    assert type(read["m"]) is int
    assert type(read["n"]) is float
    assert type(read["u"]) is float


@pytest.mark.parametrize(("text", "line", "what"), [
    ("a: 1\nb: 2\na: 3", 3, "duplicate key 'a', first on line 1"),
    ("a: &x 1\nb: *x", 2, "alias"),
    ("a: &x 1", 1, "anchor"),
    ("a: 1\n<<: {b: 2}", 2, "merge key"),
    ("a: !!python/object/apply:os.system [ls]", 1, "tag"),
    ("a: !!float 3", 1, "tag"),
    ("a: !x 3", 1, "tag"),
    ("a: 1\nb: .nan", 2, "not a finite"),
    ("a: -.inf", 1, "not a finite"),
    ("a: 1e999", 1, "not a finite"),
    ("a: 1\n---\nb: 2", 2, "second document"),
    ("a: 1\n1: 2", 2, "not a string"),
    ("a: 1\n? [x]\n: 2", 2, "not a string"),
    ("a: [1,", 1, "not valid YAML"),
    ("a: b: c", 1, "not valid YAML"),
    ("\ta: 1", 1, "not valid YAML"),
    ("a: " + "[" * 100_000, 1, "nested deeper"),
    ("a: [" + "1," * 100_000 + "]", 1, "more than"),
    ("a: " + "9" * 10_000, 1, "over 100 digits"),
    ("", None, "empty"),
    ("# nothing\n", None, "empty"),
])
def test_yaml_is_refused_with_its_line(text: str, line: int | None, what: str) -> None:
    with pytest.raises(yaml_subset.Refused) as caught:
        yaml_subset.parse(text)
    first = next(p for p in caught.value.problems if what in p)
    assert line is None or first.startswith(f"line {line}: ")


def test_all_yaml_problems_are_listed() -> None:
    with pytest.raises(yaml_subset.Refused) as caught:
        yaml_subset.parse("a: 1\na: 2\nb: !t 1\nc: .inf\nd: &x 1\ne: *x\n")
    assert len(caught.value.problems) == 5


def test_alias_bomb_is_small_and_fast() -> None:
    bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    start = time.perf_counter()
    with pytest.raises(yaml_subset.Refused):
        yaml_subset.parse(bomb)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize(("raw", "what"), [
    (b"name: \xff\xfe", "not UTF-8"), (b"- 1\n- 2\n", "got a list"), (b"just text", "got str"), (b"", "empty"),
    (b"a: " + b"x" * 1_000_001, "over 1 MB"), (b"\xff\xfea\x00:\x00", "not UTF-8"), (b"a: \x00", "not valid YAML"),
])
def test_bad_files_are_one_clear_error(tmp_path: Path, raw: bytes, what: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(raw)
    with pytest.raises(ConfigError, match=what) as caught:
        load_experiment(path)
    assert str(path) in caught.value.render()
    with pytest.raises(ConfigError, match="cannot be read"):
        load_experiment(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_experiment(tmp_path)


def test_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + SMALL.read_bytes())
    assert load_experiment(path) == load_experiment(SMALL)


# -- fields -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("changes", "line"), [
    ({"model.stage_layer": 3}, "model.stage_layer: unknown key; did you mean 'poe_stage_layers'?"),
    ({"matrix_lr": 0.02}, "matrix_lr: unknown key; did you mean 'optim.matrix_lr'?"),
    ({"final_frac": 0.02}, "final_frac: unknown key; did you mean 'schedule.cycles.0.final_frac'?"),
    ({"data.train.0.pth": "x"}, "data.train.0.pth: unknown key; did you mean 'path'?"),
    ({"seed": True}, "seed: expected int, got bool"),
    ({"seed": 1.0}, "seed: expected int, got float 1.0"),
    ({"seed": "3"}, "seed: expected int, got '3'"),
    ({"seed": None}, "seed: expected int, got null"),
    ({"seed": -1}, "seed: must be >= 0, got -1"),
    ({"seed": 10**30}, "seed: an integer of over 64 bits"),
    ({"seed": 10**6000}, "seed: an integer of over 64 bits"),
    ({"optim.matrix_lr": "2e-2x"}, "optim.matrix_lr: expected a number, got '2e-2x'"),
    ({"optim.matrix_lr": True}, "optim.matrix_lr: expected a number, got bool"),
    ({"optim.matrix_lr": 0}, "optim.matrix_lr: must be > 0, got 0"),
    ({"optim.matrix_lr": float("nan")}, "optim.matrix_lr: expected a finite number, got nan"),
    ({"data.case_aug_prob": 1.5}, "data.case_aug_prob: must be <= 1, got 1.5"),
    ({"model.stage_heads": "no"}, "model.stage_heads: expected true or false, got 'no'"),
    ({"model.stage_heads": 1}, "model.stage_heads: expected true or false, got int"),
    ({"model.poe_mode": "flatt"},
     "model.poe_mode: expected 'none', 'flat' or 'hier', got 'flatt'; did you mean 'flat'?"),
    ({"model.poe_stage_layers": 4}, "model.poe_stage_layers: expected a list, got int"),
    ({"model.poe_stage_layers": [4, "4"]}, "model.poe_stage_layers.1: expected int, got '4'"),
    ({"model.window_pattern": "SX"}, "model.window_pattern: 'SX' does not match ^[SL]+$"),
    ({"model": 3}, "model: expected a group of keys, got int"),
    ({"data.train": []}, "data.train: needs at least 1 item, got 0"),
    ({"name": "a/b"}, "name: 'a/b' does not match ^[A-Za-z0-9._-]+$"),
    ({"name": "a\nb"}, "name: control characters in 'a\\nb'"),
    ({"tokenizer": "\ud800"}, "tokenizer: control characters in '\\ud800'"),
    ({"clé\n": 1}, "'cl\\xe9\\n': unknown key; the keys here are name, run_dir, seed, tokenizer, task, init_from, "
                   "specialist, model, objective, data, batch, schedule, optim, runtime, parallel, checkpoint, "
                   "evaluation, logging, resume"),
    ({"tokenizer": {1, 2}}, "tokenizer: cannot be set"),
    ({"model.n_layer": 10**9}, "model.n_layer: must be <= 4096, got 1000000000"),
])
def test_a_wrong_field_is_one_line(changes: dict[str, Any], line: str) -> None:
    assert line in problems_of(changes)
    assert problems_of({}) == []


def test_missing_keys_are_named_and_ints_serve_as_floats() -> None:
    data = changed(**{"optim.matrix_lr": 1})
    assert experiment_from_dict(data, "x").optim.matrix_lr == 1.0
    del data["seed"], data["model"]["n_head"], data["optim"]
    with pytest.raises(ConfigError) as caught:
        experiment_from_dict(data, "x")
    assert caught.value.problems == ["seed: missing key", "model.n_head: missing key", "optim: missing key"]
    assert caught.value.render().startswith("error[config] x\n  seed: missing key")


# -- rules between fields ---------------------------------------------------------------------------------------------

CROSS: list[tuple[dict[str, Any], str]] = [
    ({"model.n_head": 3, "model.n_kv_head": 3}, "model.n_head: 3 does not divide n_embd 256"),
    ({"model.n_embd": 260}, "model.n_head: head dim 65 is odd"),
    ({"model.n_embd": 16}, "model.n_embd: 16 is too narrow"),
    ({"model.n_kv_head": 3}, "model.n_kv_head: 3 does not divide n_head 4; use one of 1, 2, 4"),
    ({"model.poe_mode": "none"}, "model.poe_every: must be null with poe_mode none"),
    ({"model.poe_mode": "none", "model.poe_every": None, "model.stage_heads": True},
     "model.stage_heads: must be false"),
    ({"model.poe_mode": "none", "model.poe_every": None, "model.detach_x0": True}, "model.detach_x0: must be false"),
    ({"model.poe_every": None}, "either poe_every or poe_stage_layers"),
    ({"model.poe_stage_layers": [4, 4]}, "either poe_every or poe_stage_layers"),
    ({"model.poe_every": 3}, "model.poe_every: 3 does not divide n_layer 8; use one of 1, 2, 4, 8"),
    ({"model.poe_every": None, "model.poe_stage_layers": [4, 3]}, "[4, 3] sums to 7, n_layer is 8"),
    ({"objective.kind": "residual_logop"}, "objective.rho: residual_logop needs it"),
    ({"objective.rho": 0.5}, "objective.rho: must be null"),
    ({"objective.kind": "residual_logop", "objective.rho": 0.5, "model.poe_mode": "hier"}, "needs poe_mode flat"),
    ({"model.vocab_size": 264}, "model.vocab_size: 264 is below 265"),
    ({"batch.tokens_per_step": 10000}, "nearest 8192 or 12288"),
    ({"batch.tokens_per_step": 100}, "nearest 4096"),
    ({"schedule.cycles.0.warmup_steps": 106}, "106 + warm-down 195 exceed the cycle's 300 steps"),
    ({"schedule.cycles.0.momentum_warmup_steps": 106}, "momentum_warmup_steps: 106 + warm-down 195 exceed"),
    ({"data.val.0.files": None}, "data.val.0: reads the same files as data.train.0"),
    ({"data.val.0.files": "shard_00005.parquet", "data.val.0.path": "./data/corpus/"}, "must not overlap"),
    ({"data.train": BASE["data"]["train"] * 2}, "data.train: 2 sources named 'corpus'"),
    ({"data.train.0.files": "../*.parquet"}, "data.train.0.files"),
    ({"data.train.0.path": ""}, "data.train.0.path: empty"),
    ({"run_dir": "../x"}, "run_dir: '../x' is not a safe folder"),
    ({"run_dir": "/"}, "run_dir"), ({"run_dir": ""}, "run_dir"), ({"run_dir": "."}, "run_dir"),
    ({"run_dir": "~/x"}, "run_dir"), ({"run_dir": "data/corpus/"}, "is also read from"),
    ({"name": ".."}, "name: '..' is not a name"),
    ({"model.ve_layers": [9]}, "model.ve_layers"), ({"model.window_sizes": [128]}, "model.window_sizes"),
]


@pytest.mark.parametrize(("changes", "what"), CROSS)
def test_rules_between_fields(changes: dict[str, Any], what: str) -> None:
    assert any(what in line for line in problems_of(changes))


@pytest.mark.parametrize("changes", [
    {"model.n_kv_head": 1}, {"model.poe_mode": "hier"}, {"model.vocab_size": 265}, {"batch.tokens_per_step": 4096},
    {"schedule.cycles.0.warmup_steps": 105}, {"model.poe_every": None, "model.poe_stage_layers": [1, 7]},
    {"objective.kind": "residual_logop", "objective.rho": 0.0}, {"optim.matrix_lr": 1e3}, {"run_dir": "/scratch/x"},
    {"schedule.cycles.0.warmdown_ratio": 1.0, "schedule.cycles.0.warmup_steps": 0,
     "schedule.cycles.0.momentum_warmup_steps": 0},
])
def test_odd_but_legal_values_are_kept_as_they_are(changes: dict[str, Any]) -> None:
    exp = dump_experiment(experiment_from_dict(changed(**changes), "x"))
    for key, value in changes.items():
        here: Any = exp
        for part in key.split("."):
            here = here[int(part)] if isinstance(here, list) else here[part]
        assert here == value


def test_all_rules_are_reported_together() -> None:
    found = problems_of({"model.n_kv_head": 3, "model.poe_every": 3, "objective.rho": 0.5, "batch.tokens_per_step": 1,
                         "run_dir": ".."})
    assert [p.split(":")[0] for p in found] == ["model.n_kv_head", "model.poe_every", "objective.rho",
                                                "batch.tokens_per_step", "run_dir"]


# -- overrides --------------------------------------------------------------------------------------------------------

def test_overrides_set_values_of_every_kind() -> None:
    exp = load_experiment(SMALL, ["seed=7", "optim.matrix_lr=1e-3", "model.poe_every=null",
                                  "model.poe_stage_layers=[5, 3]", "schedule.cycles.0.steps=400", "run_dir=out/x=y",
                                  "data.train.0.path=x", "checkpoint.every=null", "resume.step=3", "name=no"])
    assert (exp.seed, exp.optim.matrix_lr, exp.model.poe_every, exp.model.poe_stage_layers) == (7, 1e-3, None, (5, 3))
    assert (exp.schedule.cycles[0].steps, exp.run_dir, exp.data.train[0].path) == (400, "out/x=y", "x")
    assert (exp.checkpoint.every, exp.resume.step, exp.name) == (None, 3, "no")
    assert load_experiment(SMALL).seed == 42


@pytest.mark.parametrize(("override", "line"), [
    ("seed", "'seed': an override is key.sub=value (null for nothing)"),
    ("seed=", "'seed=': an override is key.sub=value (null for nothing)"),
    ("=3", "'=3': an override is key.sub=value (null for nothing)"),
    ("seed.x=1", "seed.x: cannot be set; seed is int, not a group of keys"),
    ("schedule.cycles.1.steps=3", "schedule.cycles.1: no item '1'; the list has 1, counted from 0"),
    ("schedule.cycles.-1.steps=3", "schedule.cycles.-1: no item '-1'; the list has 1, counted from 0"),
    ("schedule.cycles.steps=3", "schedule.cycles.steps: no item 'steps'; the list has 1, counted from 0"),
    ("modle.n_layer=3", "modle: unknown key; did you mean 'model'?"),
    ("model.n_layers=3", "model.n_layers: unknown key; did you mean 'n_layer'?"),
    ("seed=[1", None), ("seed=*x", None), ("seed=.nan", "seed: .nan is not a finite number"),
    ("seed=!!int 3", "seed: tag 'tag:yaml.org,2002:int'; tags are refused"),
    ("seed=yes", "seed: expected int, got 'yes'"),
    ("..=3", None), ("\x00=1", None), ("seed=#", "seed: empty: nothing to read"),
])
def test_wrong_overrides_are_one_line(override: str, line: str | None) -> None:
    found = problems_of(overrides=(override,))
    assert found
    assert (line is None or line in found)


def test_an_override_twice_is_refused_and_everything_else_still_listed() -> None:
    found = problems_of(overrides=("seed=1", "seed=2", "model.n_head=x", "model.foo=1"))
    assert found[0] == "seed: given twice on the command line"
    assert len(found) == 3


# -- hash, dump, plan -------------------------------------------------------------------------------------------------

def test_dump_is_json_and_reads_back() -> None:
    exp = load_experiment(SMALL, ["model.poe_every=null", "model.poe_stage_layers=[5,3]"])
    data = json.loads(json.dumps(dump_experiment(exp), allow_nan=False))
    assert experiment_from_dict(data, "x") == exp
    assert set(data) == set(Experiment.model_fields)


def test_hash_follows_the_learned_weights_only() -> None:
    base = config_hash(load_experiment(SMALL))
    assert len(base) == 12
    assert int(base, 16) >= 0
    same = ["name=x", "run_dir=y", "runtime.threads=2", "parallel.stages=2", "checkpoint.every=7",
            "evaluation.tokens=5", "logging.every=9", "resume.step=1"]
    assert {s.split("=")[0].split(".")[0] for s in same} == set(NOT_LEARNED)
    assert all(config_hash(load_experiment(SMALL, [s])) == base for s in same)
    other = ["seed=1", "optim.matrix_lr=.021", "model.poe_mode=hier", "data.lanes=24", "schedule.cycles.0.peak=.9",
             "tokenizer=x", "batch.tokens_per_step=4096", "objective.alpha=.5"]
    hashes = {config_hash(load_experiment(SMALL, [s])) for s in other}
    assert len(hashes) == len(other)
    assert base not in hashes
    assert config_hash(load_experiment(SMALL, ["optim.matrix_lr=2e-2"])) == base


def test_plan_of_the_published_runs() -> None:
    plan = make_plan(load_experiment(ROOT / "configs/poe_3b.yaml"), 12)
    assert (plan.rows_per_step, plan.micro_batches, plan.micro_steps) == (384, 12, 1)
    assert (plan.total_steps, plan.total_tokens) == (83_923, 65_999_732_736)
    plan = make_plan(load_experiment(ROOT / "configs/bp_1p3b.yaml"), 4)
    assert (plan.rows_per_step, plan.micro_batches, plan.micro_steps) == (512, 16, 4)
    assert (plan.total_steps, plan.total_tokens) == (26_430, 27_713_863_680)
    assert make_plan(load_experiment(ROOT / "configs/poe_3b_cycle2.yaml"), 1).total_steps == 134_723


def test_world_size_must_divide_lanes_and_micro_batches() -> None:
    exp = load_experiment(ROOT / "configs/poe_3b.yaml")
    naive = [w for w in range(1, 100) if exp.data.lanes % w == 0 and 12 % w == 0]
    assert valid_world_sizes(exp) == naive == [1, 2, 3, 4, 6, 12]
    assert valid_world_sizes(load_experiment(ROOT / "configs/poe_3b.yaml", ["data.lanes=10"])) == [1, 2]
    for world_size in (0, -1, 5, 8, 24, 48):
        with pytest.raises(ConfigError, match="use 1, 2, 3, 4, 6, 12 ranks"):
            make_plan(exp, world_size)
    for world_size in naive:
        plan = make_plan(exp, world_size)
        assert plan.micro_steps * world_size * plan.device_batch_size * plan.sequence_len == plan.tokens_per_step


# -- fuzz: an Experiment or a ConfigError with lines, whatever comes ---------------------------------------------------

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-10, 10**4), st.integers(), st.floats(), st.text(max_size=20),
    st.sampled_from(["none", "flat", "hier", "1e-3", "..", "/", "", "\ud800", "\x00", "*", "NaN", 10**400, -(10**400),
                     float("inf"), 1e308, 5e-324, 2**63, "SL" * 100, b"bytes", 1j]))
values = st.recursive(scalars, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=8), v, max_size=4),
                      max_leaves=8)


def leaves(data: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(p for key, value in items for p in leaves(value, (*path, key)))]


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(leaves(BASE)), st.text(max_size=6) | st.none() | st.integers(), values),
                min_size=1, max_size=3))
def test_fuzz_data(mutations: list[tuple[tuple[str | int, ...], Any, Any]]) -> None:
    data: Any = {"root": copy.deepcopy(BASE)}
    for path, new_key, value in mutations:
        here: Any = data
        try:
            for part in ("root", *path[:-1]):
                here = here[part]
            if isinstance(new_key, str) and isinstance(here, dict):
                here[new_key] = value                        # a key more
            elif new_key is None or not isinstance(here, dict):
                here[path[-1] if path else "root"] = value   # another value
            else:
                here.pop(path[-1], None)                     # a key less
        except (KeyError, TypeError, IndexError, AttributeError):
            continue                                         # an earlier mutation removed the place
    outcome(data["root"])


def outcome(data: Any) -> bool:
    """True if `data` is a valid experiment; a ConfigError must have one-line problems and be printable."""
    try:
        exp = experiment_from_dict(data, "fuzz")
    except ConfigError as error:
        "\n".join(lines_of(error)).encode("ascii")
        return False
    assert experiment_from_dict(json.loads(json.dumps(dump_experiment(exp))), "x") == exp
    assert 1 in valid_world_sizes(exp)
    assert make_plan(exp, 1).total_steps > 0
    return True


def test_fuzz_has_both_outcomes() -> None:
    assert outcome(changed())
    assert outcome(changed(seed=3))
    assert not outcome(changed(seed="3"))
    assert not outcome(None)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60) | st.text("ab:-[]{}&*!<>|#'\"\n ,?.e0", max_size=60))
def test_fuzz_yaml_text(text: str) -> None:
    try:
        data = yaml_subset.parse(text)
    except yaml_subset.Refused as refused:
        lines_of(refused)
    else:
        outcome(data)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("abc.=0[]{}:*&!~ \n", max_size=12) | st.sampled_from(["seed=1", "model.n_layer=4"]),
                max_size=4))
def test_fuzz_overrides(overrides: list[str]) -> None:
    problems_of(overrides=tuple(overrides))


# -- the script -------------------------------------------------------------------------------------------------------

def run_script(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-X", "importtime", "-m", "scripts.check_config", *args], cwd=ROOT,
                          capture_output=True, text=True, timeout=60)


def imported(process: subprocess.CompletedProcess[str]) -> set[str]:
    """Modules of `-X importtime`, whose lines are `import time: self | cumulative | name`."""
    return {line.rsplit("|", 1)[1].strip() for line in process.stderr.splitlines() if line.startswith("import time:")}


def test_check_config_answers_fast_and_without_torch() -> None:
    start = time.perf_counter()
    good = run_script("configs/poe_3b.yaml", "seed=7", "--world-size", "12")
    seconds = time.perf_counter() - start
    assert good.returncode == 0
    assert "3,019,900,506" in good.stdout
    assert "15, 21, 26, 31" in good.stdout
    modules = imported(good)
    assert "nanopoe.config.load" in modules
    assert "torch" not in modules
    assert "numpy" not in modules
    assert seconds < 5                                        # 0.3 s on an idle machine; this one may be busy


def test_check_config_exit_code_2_and_a_line_per_problem() -> None:
    bad = run_script("configs/poe_3b.yaml", "model.stage_layer=3", "seed=true", "optim.matrix_lr=2e-2x")
    lines = [line for line in bad.stderr.splitlines() if not line.startswith("import time")]
    assert bad.returncode == 2
    assert bad.stdout == ""
    assert lines == ["error[config] configs/poe_3b.yaml", "  seed: expected int, got bool",
                     "  model.stage_layer: unknown key; did you mean 'poe_stage_layers'?",
                     "  optim.matrix_lr: expected a number, got '2e-2x'"]
    assert run_script("configs/poe_3b.yaml", "--world-size", "7").returncode == 2


def test_check_config_takes_many_files() -> None:
    good = run_script("configs/quickstart.yaml", "configs/small_poe.yaml", "seed=7")
    assert good.returncode == 0
    assert good.stdout.count("ok configs/") == 2
    mixed = run_script("configs/absent.yaml", "configs/small_poe.yaml")
    assert mixed.returncode == 2
    assert "error[config] configs/absent.yaml" in mixed.stderr
    assert "ok configs/small_poe.yaml" in mixed.stdout
