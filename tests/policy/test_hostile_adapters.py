"""Adapters of strangers: whatever their files say, one line tells, and nothing was made of it."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import tracemalloc
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_base

from qadapter import AdapterConfig, ObjectiveConfig, QAdapterError, QAdapterModel
from qadapter.adapters import peft_config
from qadapter.adapters.planning import planned_weights, require_room
from qadapter.policy import storage
from qadapter.policy.composition import compose
from qadapter.system import manifest

ADAPTERS = {
    "head": AdapterConfig(form="mlp", rank=3),
    "block": AdapterConfig(form="block", rank=3),
    "lora": peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 3}),
}
NAMES = {
    "head": storage.CONFIG_NAME, "block": storage.CONFIG_NAME, "lora": storage.PEFT_CONFIG_NAME,
}


@pytest.fixture(params=ADAPTERS)
def saved(tmp_path, request) -> Path:
    return save(tmp_path / "adapter", request.param)


@pytest.fixture
def lora(tmp_path) -> Path:
    return save(tmp_path / "adapter", "lora")


SAVED: dict[str, Path] = {}
"""The adapters on disk, made once."""


@pytest.fixture(scope="module", autouse=True)
def _written(tmp_path_factory):
    for name, adapter in ADAPTERS.items():
        SAVED[name] = tmp_path_factory.mktemp("saved") / name
        QAdapterModel.from_base(tiny_base(), adapter).save_pretrained(SAVED[name])
    models = [QAdapterModel.from_base(tiny_base(), ADAPTERS["lora"]) for _ in range(2)]
    SAVED["composed"] = tmp_path_factory.mktemp("composed") / "adapter"
    compose(models, (0.5, 0.5)).save_pretrained(SAVED["composed"])


def save(folder: Path, name: str) -> Path:
    return Path(shutil.copytree(SAVED[name], folder))


def vouch(folder: Path) -> None:
    """A stranger's manifest is right about the stranger's files."""
    manifest.write(folder, [
        str(path.relative_to(folder)) for path in folder.rglob("*")
        if path.is_file() and path != folder / "manifest.json"
    ])


def refusal(folder: Path, **options) -> str:
    with pytest.raises(QAdapterError) as raised:
        QAdapterModel.from_pretrained(folder, tiny_base(), **options)
    line = str(raised.value)
    assert str(folder) in line and len(line) < 1000
    return line


def edit(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# --- tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, said", [
    (lambda x: x.fill_(math.nan), "holds NaN or infinite numbers"),
    (lambda x: x.index_fill(0, torch.tensor([1]), math.inf), "holds NaN or infinite numbers"),
    (lambda x: x.index_fill(0, torch.tensor([1]), -math.inf).bfloat16(), "holds NaN or infinite"),
    (lambda x: x.double().fill_(1e300), "holds NaN or infinite numbers"),
    (lambda x: (x * 100).to(torch.int8), "int8, but its configuration describes"),
    (lambda x: x.bool(), "bool, but its configuration describes"),
    (lambda x: x.to(torch.complex64), "complex64, but its configuration describes"),
    (lambda x: x[:, :-1].contiguous(), "but its configuration describes"),
    (lambda x: x.T.contiguous(), "but its configuration describes"),
    (lambda x: x[None], "but its configuration describes"),
    (lambda x: x.flatten(), "but its configuration describes"),
    (None, "not there, but its configuration describes"),
])
@pytest.mark.parametrize("which", [0, -1])
def test_tensors_that_are_none_of_this_adapter_s(saved, change, said, which):
    path = saved / storage.WEIGHTS_NAME
    weights = {name: x.clone() for name, x in load_file(path).items()}
    name = sorted(weights)[which]
    tensor = weights.pop(name)
    save_file(weights if change is None else weights | {name: change(tensor)}, path)
    vouch(saved)
    line = refusal(saved)
    assert said in line and name in line and str(path) in line


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_of_real_numbers_are_read(saved, dtype):
    path = saved / storage.WEIGHTS_NAME
    save_file({name: x.to(dtype) for name, x in load_file(path).items()}, path)
    vouch(saved)
    QAdapterModel.from_pretrained(saved, tiny_base())


# --- configurations -------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [10**9, 10**18, 10**30, 3, 0, -1, 2.5, True])
@pytest.mark.parametrize("kind", ["head", "lora", "pattern", "plain"])
def test_sizes_are_held_against_the_file_before_anything_is_made(tmp_path, kind, number):
    folder = save(tmp_path / "adapter", "head" if kind == "head" else "lora")
    ours = folder / storage.CONFIG_NAME
    adapter = json.loads(ours.read_text())["adapter"]
    if kind == "head":
        if number == 3:
            return  # its own
        edit(ours, adapter=adapter | {"rank": number})
    else:
        change = {"rank_pattern": {"q_proj": number}} if kind == "pattern" else {"r": number}
        if kind == "pattern" and number in (3, True):
            return
        edit(folder / storage.PEFT_CONFIG_NAME, **change)
        edit(ours, adapter=adapter | change)
    options = {}
    if kind == "plain":
        ours.unlink()
        options["objective"] = ObjectiveConfig()
    vouch(folder)
    tracemalloc.start()
    refusal(folder, **options)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


@pytest.mark.parametrize("field, value", [
    ("r", 4), ("lora_alpha", 80), ("use_rslora", True), ("target_modules", ["q_proj"]),
    ("rank_pattern", {}), ("alpha_pattern", {"v_proj": 3}), ("fan_in_fan_out", True),
    ("layers_to_transform", [1]), ("use_dora", True), ("peft_type", "LOHA"),
])
def test_two_configurations_that_contradict_each_other(lora, field, value):
    edit(lora / storage.PEFT_CONFIG_NAME, **{field: value})
    vouch(lora)
    line = refusal(lora)
    if field != "peft_type":
        assert f"{field} is " in line and "but qadapter_config.json says" in line
    assert storage.PEFT_CONFIG_NAME in line
    as_before(lora)
    assert refusal(lora) == line


def as_before(folder: Path) -> None:
    """As format 2 was saved."""
    edit(folder / storage.CONFIG_NAME, format_version=2)
    manifest.remove(folder)


def test_a_field_left_out_is_no_default(lora):
    path = lora / storage.PEFT_CONFIG_NAME
    path.write_text(json.dumps({k: x for k, x in json.loads(path.read_text()).items()
                                if k != "r"}))
    vouch(lora)
    assert "r is 8, but qadapter_config.json says 2" in refusal(lora)


ENDLESS = (r"(.*)*(.*)*(.*)*x", r"(([a-z_]+)+\.?)+\d", r"(.|.)*[^a-z_.0-9]", r"(a?)*" * 20 + "b",
           r".*" * 16 + "x!")


@pytest.mark.parametrize("field, pattern", [
    *(("target_modules", pattern) for pattern in ENDLESS), ("exclude_modules", ENDLESS[0]),
    ("rank_pattern", ENDLESS[1]), ("modules_to_save", ENDLESS[4]),
])
def test_a_pattern_that_never_ends_is_stopped(lora, monkeypatch, field, pattern):
    monkeypatch.setattr(peft_config, "MAX_PATTERN_SECONDS", 1)
    value = {"rank_pattern": {pattern: 4}, "modules_to_save": [pattern]}.get(field, pattern)
    edit(lora / storage.PEFT_CONFIG_NAME, **{field: value})
    adapter = json.loads((lora / storage.CONFIG_NAME).read_text())["adapter"]
    edit(lora / storage.CONFIG_NAME, adapter=adapter | {field: value})
    vouch(lora)
    with pytest.raises(QAdapterError, match=r"the pattern .* takes more than 1 s"):
        QAdapterModel.from_pretrained(lora, tiny_base())


def test_patterns_that_end_are_what_they_were(tmp_path):
    config = peft.LoraConfig(
        r=2, target_modules=r"(?:.*\.)?layers\.(?:0|1)\.self_attn\.(q|v)_proj",
        rank_pattern={r"layers\.\d+\.self_attn\.q_proj": 3},
    )
    QAdapterModel.from_base(tiny_base(), config).save_pretrained(tmp_path)
    model = QAdapterModel.from_pretrained(tmp_path, tiny_base())
    weights = model.adapter.state_dict()
    assert {x.shape[0] for name, x in weights.items() if "lora_A" in name} == {2, 3}


@pytest.mark.parametrize("pattern", ["(", "*", "(?P<a>x)(?P<a>y)", "[", "x{99999999999}"])
def test_what_is_no_pattern_is_told_as_before(lora, pattern):
    ours = lora / storage.CONFIG_NAME
    adapter = json.loads(ours.read_text())["adapter"]
    edit(lora / storage.PEFT_CONFIG_NAME, target_modules=pattern)
    edit(ours, adapter=adapter | {"target_modules": pattern})
    vouch(lora)
    with pytest.raises(QAdapterError, match="PEFT can't adapt"):
        QAdapterModel.from_pretrained(lora, tiny_base())


@pytest.mark.parametrize("field, value, said", [
    ("r", "8", "r is '8', not int"), ("r", None, "r is None, not int"),
    ("lora_alpha", math.nan, "lora_alpha is nan"), ("lora_dropout", "x", "lora_dropout is 'x'"),
    ("lora_dropout", 7, "PEFT can't adapt"), ("target_modules", 5, "target_modules is 5"),
    ("target_modules", [5, None], "target_modules is [5, None]"), ("bias", 1, "bias is 1, not"),
    ("use_dora", "yes", "use_dora is 'yes', not bool"), ("peft_type", 3, "peft_type is 3"),
    ("peft_type", ["LORA"], "peft_type is ['LORA']"), ("peft_type", "LORAX", "did you mean 'LORA'"),
    ("task_type", "SING", "Invalid task type"), ("rank_pattern", [1], "rank_pattern is [1]"),
    ("rank_pattern", {"q_proj": "x"}, ""), ("alpha_pattern", {"q_proj": {}}, ""),
    ("layers_to_transform", "first", "layers_to_transform is 'first'"),
    ("use_wonder", True, "knows no such field"), ("wonder_config", {"a": 1}, "knows no such field"),
    ("layer_replication", [[0, 10**6]], "layer_replication"), ("init_lora_weights", "pissa", ""),
    ("init_lora_weights", "loftq", ""),
    ("target_parameters", ["q_proj.weight"] * 3, ""), ("modules_to_save", ["layers"], ""),
    ("megatron_config", {"a": 1}, ""), ("target_modules", [], ""),
])
def test_wrong_values_of_a_plain_peft_adapter(lora, field, value, said):
    (lora / storage.CONFIG_NAME).unlink()
    manifest.remove(lora)
    edit(lora / storage.PEFT_CONFIG_NAME, **{field: value})
    with pytest.raises(QAdapterError) as raised:
        QAdapterModel.from_pretrained(lora, tiny_base(), objective=ObjectiveConfig())
    assert said in str(raised.value) and len(str(raised.value)) < 1000


WRONG = (None, True, -1, 0, 1e400, math.nan, 10**30, "", "x", "\ud800", "a" * 10_000, [], [[]], {},
         {"a": {}}, [10**6] * 10)


def test_no_value_of_any_field_ends_in_anything_else(saved):
    """Every value of both configurations, exchanged for each of a list of wrong ones."""
    path = saved / storage.CONFIG_NAME
    whole = json.loads(path.read_text())
    manifest.remove(saved)
    whole["format_version"] = 2
    places = [(key,) for key in whole] + [
        (key, name) for key in ("adapter", "objective", "base") for name in whole[key]
    ]
    if (saved / storage.PEFT_CONFIG_NAME).exists():
        places = [place for place in places if place[0] != "adapter" or len(place) == 1]
    refused = 0
    for place, wrong in itertools.product(places, WRONG):
        changed = json.loads(json.dumps(whole))
        holder = changed
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = wrong
        path.write_text(json.dumps(changed))
        try:
            read = storage.read(saved)
            read.base.require(storage.BaseIdentity.saved(whole["base"]), saved)
        except QAdapterError as error:
            refused += 1
            assert str(saved) in str(error) and len(str(error)) < 4100
    assert refused > 5 * len(places)


@pytest.mark.parametrize("text", [
    "", "[]", "null", "3", "[" * 100_000, '{"a":' * 100_000, "{" + '"a":1,' * 200_000 + '"b":2}',
    '{"format_version": 3}', '{"format_version": ' + "9" * 5000 + "}", "\ufeff{}", "{}\0",
])
def test_what_is_no_configuration_at_all(saved, text):
    for name in (storage.CONFIG_NAME, storage.PEFT_CONFIG_NAME, "manifest.json"):
        if (path := saved / name).exists():
            content = path.read_bytes()
            path.write_text(text, encoding="utf-8")
            if name != "manifest.json":
                vouch(saved)
            assert name in refusal(saved)
            path.write_bytes(content)
            vouch(saved)


# --- compositions ---------------------------------------------------------------------------------


@pytest.fixture
def composed(tmp_path) -> Path:
    return Path(shutil.copytree(SAVED["composed"], tmp_path / "composed"))


def parts(folder: Path, **fields) -> None:
    path = folder / storage.CONFIG_NAME
    edit(path, adapter=json.loads(path.read_text())["adapter"] | fields)
    vouch(folder)


@pytest.mark.parametrize("name", [
    "../outside", "..", ".", "", "/absolute", "adapter-0/../../outside", "adapter-0/",
    "./adapter-0", "~/x", "a\\b", "adapter-0\n", "\0", "link", 7, None, ["adapter-0"], "~",
])
def test_parts_of_a_composition_lie_inside(composed, tmp_path, name):
    save(tmp_path / "outside", "lora")
    (composed / "link").symlink_to(tmp_path / "outside")
    if name == "/absolute":
        name = str(tmp_path / "outside")
    parts(composed, adapters=["adapter-0", name])
    line = refusal(composed)
    assert "is no name of a folder of its own" in line or "is a link" in line
    as_before(composed)
    assert refusal(composed) == line


@pytest.mark.parametrize("fields", [
    {"adapters": []}, {"adapters": [], "weights": []}, {"adapters": "ab", "weights": [1, 1]},
    {"weights": [1]}, {"weights": ["x", 1]}, {"weights": [None, 1]}, {"weights": [math.nan, 1]},
    {"weights": [1e400, 1]}, {"weights": {"a": 1, "b": 2}}, {"other": 1}, {"adapters": None},
    {"adapters": ["adapter-0", "nowhere"]},
])
def test_compositions_that_are_none(composed, fields):
    parts(composed, **fields)
    with pytest.raises(QAdapterError):
        QAdapterModel.from_pretrained(composed, tiny_base())


def test_parts_of_other_kinds(composed):
    part = composed / "adapter-1"
    kept = (part / storage.CONFIG_NAME).read_text()
    for adapter in ({"kind": "head", "form": "linear", "rank": 2},
                    {"kind": "composition", "adapters": ["adapter-0"], "weights": [1.0]}):
        edit(part / storage.CONFIG_NAME, adapter=adapter)
        save_part = part / "adapter-0"
        if adapter["kind"] == "composition" and not save_part.exists():
            save(save_part, "lora")
        vouch(part)
        vouch(composed)
        refusal(composed)
        (part / storage.CONFIG_NAME).write_text(kept)


# --- plans ----------------------------------------------------------------------------------------

KINDS = {
    "dora": peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
    "norms": peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]),
    "linear": peft.LoraConfig(r=2, target_modules="all-linear"),
    "weights": peft.LoraConfig(r=2, target_modules=[], target_parameters=["q_proj.weight"]),
    "loha": peft.LoHaConfig(r=2, target_modules=["q_proj"]),
    "lokr": peft.LoKrConfig(r=2, target_modules=["q_proj"]),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"],
    ),
    "vera": peft.VeraConfig(r=2, target_modules=["q_proj"]),
    "oft": peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"]),
} | ADAPTERS


@pytest.mark.parametrize("name", KINDS)
def test_a_plan_is_what_is_built_and_leaves_the_base_alone(name):
    base = tiny_base()
    before = {key: x.clone() for key, x in base.state_dict().items()}
    modules = [type(m) for m in base.modules()]
    planned = planned_weights(base, KINDS[name])
    assert [type(m) for m in base.modules()] == modules
    assert all(torch.equal(x, before[key]) for key, x in base.state_dict().items())
    built = QAdapterModel.from_base(base, KINDS[name]).adapter.state_dict()
    assert {n: x.shape for n, x in planned.items()} == {n: x.shape for n, x in built.items()}
    assert all(x.is_meta for x in planned.values())


def test_an_adapter_beyond_the_memory_is_refused_before_the_base_is_loaded():
    require_room(tiny_base(), ADAPTERS["lora"])
    with pytest.raises(QAdapterError, match=r"the adapter alone takes .* smaller rank"):
        require_room(tiny_base(), peft.LoraConfig(r=10**12, target_modules=["q_proj"]))
