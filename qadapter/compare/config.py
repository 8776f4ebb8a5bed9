"""What a comparison is: one YAML file, read strictly."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import yaml

from qadapter.errors import QAdapterError
from qadapter.objective import ObjectiveConfig

BASE = "base"
"""Name of the row that every comparison has: the base as it is."""
SPLITS = ("validation", "test")


@dataclass(frozen=True)
class DataConfig:
    """Preference pairs and how they are cut, by prompt; sizes are counts of prompts."""

    dataset_name: str
    dataset_split: str = "train"
    columns: dict[str, str] | None = None
    domain: str | None = None
    rejected_domains: list[str] | None = None
    max_rows: int | None = None
    max_length: int = 512
    """Most tokens of prompt and answer."""
    train: int | None = None
    """Prompts to train on (of the old data: to replay); none for all that are not held out."""
    validation: int = 50
    test: int = 50
    judge: int = 50
    """Prompts whose pairs only the judges see."""
    pairs_per_prompt: int | None = None
    """Most pairs of one prompt in any part; none for all."""
    split_seed: int = 0


@dataclass(frozen=True)
class AdapterSpec:
    """The trainable parameters, the same for all methods: a head adapter, or LoRA in the trunk."""

    kind: str = "head"
    form: str = "mlp"
    rank: int = 128
    r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])


@dataclass(frozen=True)
class TrainingSpec:
    """What all methods share. The budget is the tokens, prompts included, of both answers of all
    training pairs, times ``num_train_epochs``; every method stops when it has seen as many."""

    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 8
    """Pairs; a method without pairs gets twice as many sequences."""
    learning_rate: float = 1e-3
    lr_scheduler_type: str = "linear"
    warmup_steps: float = 0.1
    max_grad_norm: float = 1.0
    curve_points: int = 4
    """Steps at which retention is measured during training, the last one included."""


@dataclass(frozen=True)
class RetentionTexts:
    """Unrelated texts that retention is measured on."""

    name: str
    file: str
    """.txt (one a line) or .jsonl (key: text); "built-in" for the passages of the demo."""
    max_texts: int | None = None


@dataclass(frozen=True)
class EvaluationSpec:
    """What every finished run is measured by."""

    retention: list[RetentionTexts] = field(
        default_factory=lambda: [RetentionTexts("unrelated text", "built-in")]
    )
    prompts: int = 32
    """Held-out prompts, of the new and of the old preference each, that are answered."""
    samples: int = 1
    """Sampled answers a prompt."""
    base_samples: int = 4
    """The base's answers a prompt, that gains and win rates are against."""
    max_new_tokens: int = 64
    temperature: float = 1.0
    strengths: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0])
    """Settings of the dial; 1 is the trained policy and always among them."""
    dial_seeds: int = 1
    """How many of the seeds get the whole dial; the others get strength 1 alone."""
    batch_size: int = 8
    seed: int = 0


# --- methods ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """One row of the comparison."""

    kind: ClassVar[str]
    seeds: list[int] | None = None
    """Instead of the comparison's own."""
    learning_rate: float | None = None
    """Instead of the one all methods share."""


@dataclass(frozen=True)
class SFT(Method):
    """Supervised fine-tuning on the preferred answers."""

    kind: ClassVar[str] = "sft"


@dataclass(frozen=True)
class Replay(Method):
    """SFT on the preferred answers, mixed with the base's own answers to the old data's prompts."""

    kind: ClassVar[str] = "replay"
    replay_fraction: float = 0.5
    """Share of the sequences that are the base's own."""


@dataclass(frozen=True)
class DPO(Method):
    """Direct preference optimization, sigmoid loss."""

    kind: ClassVar[str] = "dpo"
    beta: float = 0.1
    retention_coef: float = 0.0


@dataclass(frozen=True)
class RLOO(Method):
    """Reinforcement learning on a reward model with a KL penalty: what stands in for PPO."""

    kind: ClassVar[str] = "rloo"
    beta: float = 0.05
    num_generations: int = 4
    max_completion_length: int = 64


@dataclass(frozen=True)
class QAdapter(Method):
    """Q-Adapter; all fields of ``ObjectiveConfig``."""

    kind: ClassVar[str] = "q_adapter"
    alpha_0: float = ObjectiveConfig.alpha_0
    alpha_tilde: float = ObjectiveConfig.alpha_tilde
    gamma: float = ObjectiveConfig.gamma
    chi2_coef: float = ObjectiveConfig.chi2_coef
    parametrization: str = ObjectiveConfig.parametrization
    bootstrap: str = ObjectiveConfig.bootstrap
    length_normalization: str = ObjectiveConfig.length_normalization
    mask_alignment: str = ObjectiveConfig.mask_alignment
    retention_coef: float = 0.0

    def objective(self) -> ObjectiveConfig:
        names = [f.name for f in dataclasses.fields(ObjectiveConfig)]
        return ObjectiveConfig(**{name: getattr(self, name) for name in names})


METHODS: dict[str, type[Method]] = {m.kind: m for m in (SFT, Replay, DPO, RLOO, QAdapter)}


@dataclass(frozen=True)
class Sweep:
    """One method at several values of an option; each is a row of its own, drawn as one curve."""

    of: str
    """Name of the method that is varied."""
    option: str
    """Its option; "alpha" sets alpha_0 and alpha_tilde together."""
    values: list[float]
    seeds: list[int] | None = None


@dataclass(frozen=True)
class Row:
    """A method under its name; ``sweep`` and ``value``: where it came from, if from a sweep."""

    name: str
    method: Method
    seeds: tuple[int, ...]
    sweep: str | None = None
    value: float | None = None


@dataclass(frozen=True)
class CompareConfig:
    """A comparison, as its YAML file says it."""

    data: DataConfig
    methods: dict[str, Method]
    model_name_or_path: str = "smollm2"
    dtype: str = "auto"
    title: str = "Comparison"
    seeds: list[int] = field(default_factory=lambda: [0])
    old: DataConfig | None = None
    """What the base had learned before: answered, judged and replayed, never trained on."""
    adapter: AdapterSpec = AdapterSpec()
    training: TrainingSpec = TrainingSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    sweeps: dict[str, Sweep] = field(default_factory=dict)
    folder: Path = field(default=Path("."), metadata={"in_file": False})
    """Of the YAML file; relative names are looked for there first."""

    def find(self, name: str) -> str:
        """A file named in the configuration, where it is; other names (of a hub) as they are."""
        beside = self.folder / Path(name).expanduser()
        return str(beside) if beside.exists() else name

    def rows(self) -> list[Row]:
        """All methods, those of the sweeps last. A sweep's value that a method has already is that
        method's row."""
        rows = [
            Row(name, m, tuple(self.seeds if m.seeds is None else m.seeds))
            for name, m in self.methods.items()
        ]
        for name, sweep in self.sweeps.items():
            origin = self.methods[sweep.of]
            for value in sweep.values:
                method = dataclasses.replace(origin, **swept(sweep, value))
                if method != origin:
                    seeds = tuple(self.seeds if sweep.seeds is None else sweep.seeds)
                    rows.append(Row(f"{sweep.of} {sweep.option}={value:g}", method, seeds, name,
                                    value))
        return rows

    def as_dict(self) -> dict[str, Any]:
        """JSON types, as written: methods with their kind, names of files not resolved."""
        written = dataclasses.asdict(self)
        del written["folder"]
        for name, method in self.methods.items():
            written["methods"][name]["method"] = method.kind
        return written


def swept(sweep: Sweep, value: float) -> dict[str, float]:
    """The options a sweep sets at one of its values."""
    names = ("alpha_0", "alpha_tilde") if sweep.option == "alpha" else (sweep.option,)
    return dict.fromkeys(names, value)


# --- reading ------------------------------------------------------------------------------------


def read_config(path: str | Path) -> CompareConfig:
    """Read and check a YAML file. Paths in it are relative to the file.

    Raises:
        QAdapterError: no such file, not YAML, an unknown key, or a value that can't be; the message
            names the key.
    """
    path = Path(path).expanduser()
    try:
        written = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise QAdapterError(f"{path} can't be read: {error}") from error
    except yaml.YAMLError as error:
        raise QAdapterError(f"{path} is not YAML: {error}") from error
    if not isinstance(written, dict):
        raise QAdapterError(f"{path}: expected keys and values, got {type(written).__name__}")
    config = _build(CompareConfig, written, str(path), "")
    return _check(dataclasses.replace(config, folder=path.parent), str(path))


def _check(config: CompareConfig, path: str) -> CompareConfig:
    def refuse(key: str, why: str) -> typing.NoReturn:
        raise QAdapterError(f"{path}: {key}: {why}")

    if not config.methods:
        refuse("methods", "there is nothing to compare")
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        refuse("seeds", f"expected different whole numbers, got {config.seeds}")
    if config.adapter.kind not in ("head", "lora"):
        refuse("adapter.kind", f"expected head or lora, got {config.adapter.kind!r}")
    for name, method in config.methods.items():
        if name == BASE:
            refuse(f"methods.{name}", "the base is always compared; choose another name")
        if isinstance(method, Replay) and config.old is None:
            refuse(f"methods.{name}", "replay needs old data (the key old)")
        if isinstance(method, QAdapter):
            try:
                method.objective()
            except ValueError as error:
                refuse(f"methods.{name}", str(error))
    for name, sweep in config.sweeps.items():
        if sweep.of not in config.methods:
            refuse(f"sweeps.{name}.of", f"no method is called {sweep.of!r}"
                   + _nearest(sweep.of, config.methods))
        method = config.methods[sweep.of]
        known = {f.name for f in dataclasses.fields(method)} - {"seeds"}
        missing = [n for n in swept(sweep, 0.0) if n not in known]
        if missing:
            refuse(f"sweeps.{name}.option", f"{method.kind} has no {missing[0]!r}"
                   + _nearest(missing[0], known))
    if any(w < 0 for w in config.evaluation.strengths):
        refuse("evaluation.strengths", "a strength must not be negative")
    for name in ("prompts", "samples", "base_samples", "max_new_tokens", "batch_size"):
        if getattr(config.evaluation, name) < 1:
            refuse(f"evaluation.{name}", "must be at least 1")
    return config


def _build(cls: type, written: Any, path: str, key: str) -> Any:
    """A dataclass from a mapping; unknown keys, missing ones and wrong types are named."""
    where = f"{path}: {key}" if key else path
    if not isinstance(written, Mapping):
        raise QAdapterError(f"{where}: expected keys and values, got {written!r}")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.metadata.get("in_file", True)}
    for name in written:
        if name not in fields:
            raise QAdapterError(f"{where}: unknown key {name!r}" + _nearest(str(name), fields))
    missing = [
        name for name, f in fields.items() if name not in written
        and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise QAdapterError(f"{where}: {missing[0]} is missing")
    return cls(**{
        name: _value(hints[name], value, path, f"{key}.{name}" if key else name)
        for name, value in written.items()
    })


def _value(kind: Any, value: Any, path: str, key: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _value(next(a for a in arguments if a is not type(None)), value, path, key)
    if kind is Method:
        return _method(value, path, key)
    if dataclasses.is_dataclass(kind):
        return _build(kind, value, path, key)
    if origin is list and isinstance(value, list):
        return [_value(arguments[0], v, path, f"{key}[{i}]") for i, v in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {str(k): _value(arguments[1], v, path, f"{key}.{k}") for k, v in value.items()}
    plain = origin or kind
    if plain is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:  # YAML reads 1e-3 as text
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, plain) or (isinstance(value, bool) and plain is not bool):
        raise QAdapterError(f"{path}: {key}: expected {plain.__name__}, got {value!r}")
    return value


def _method(value: Any, path: str, key: str) -> Method:
    options = dict(value) if isinstance(value, Mapping) else {}
    kind = options.pop("method", None)
    if kind not in METHODS:
        raise QAdapterError(
            f"{path}: {key}.method: expected one of {', '.join(METHODS)}, got {kind!r}"
            + _nearest(str(kind), METHODS)
        )
    return _build(METHODS[kind], options, path, key)


def _nearest(name: str, known: Any) -> str:
    found = difflib.get_close_matches(name, list(known), 1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


# --- the same comparison? -----------------------------------------------------------------------


def fingerprint_files(config: CompareConfig) -> dict[str, str]:
    """SHA-256 of every local file the comparison reads, by the key that names it."""
    named = {"data.dataset_name": config.data.dataset_name}
    if config.old is not None:
        named["old.dataset_name"] = config.old.dataset_name
    for texts in config.evaluation.retention:
        named[f"evaluation.retention.{texts.name}"] = texts.file
    return {
        key: hashlib.sha256(Path(name).read_bytes()).hexdigest()
        for key, name in ((key, config.find(name)) for key, name in named.items())
        if Path(name).is_file()
    }


def changes(before: Any, now: Any, key: str = "") -> list[str]:
    """What differs between two written configurations, by name: ``methods.dpo.beta: 0.1 → 0.3``.
    Methods, sweeps and seeds may be added to a comparison: finished runs stay what they are."""
    if isinstance(before, dict) and isinstance(now, dict):
        growing = key in ("methods", "sweeps")
        names = before.keys() | (set() if growing else now.keys())
        return [
            line for name in sorted(names) if not (growing and name not in now)
            for line in changes(before.get(name), now.get(name), f"{key}.{name}".strip("."))
        ]
    if key.split(".")[-1] in ("seeds", "title") or before == now:
        return []
    return [f"{key}: {before!r} → {now!r}"]
