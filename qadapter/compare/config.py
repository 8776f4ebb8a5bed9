"""What a comparison is, as dataclasses; ``reading`` makes them from a YAML file."""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qadapter.compare.kinds import AdapterSpec, Method, TrainingSpec

BASE = "base"
"""Name of the row that every comparison has: the base as it is."""
SPLITS = ("validation", "test")
CONFIG_NAME, TOUCHED_NAME = "config.json", "test_touched.jsonl"
FIRST_NAME, ANSWERS_NAME, JUDGES_NAME = "first", "base_answers", "judges"
OTHER_FILES = (
    CONFIG_NAME, TOUCHED_NAME, ANSWERS_NAME, JUDGES_NAME, FIRST_NAME, f"{FIRST_NAME}.json",
    *(f"{kind}-{split}{end}" for split in SPLITS
      for kind, end in (("pictures", ""), ("report", ".html"), ("summary", ".json"))),
)
"""What a results folder holds beside a folder for each row."""


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
class FirstSpec:
    """What the base learns before anything is compared: the old preference, by DPO, through a
    linear head adapter that is then merged into it. The merged model is the base of all rows."""

    beta: float = 0.3
    rank: int = 128
    learning_rate: float = 1e-3
    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 8
    seed: int = 0


@dataclass(frozen=True)
class RetentionTexts:
    """Unrelated texts that retention is measured on."""

    name: str
    file: str
    """.txt (one a line) or .jsonl (key: text); "built-in" for the library's own passages."""
    unseen: bool | None = None
    """Of the built-in passages only the genres that no retention term is held to."""
    max_texts: int | None = None
    preferred: bool = False
    """The file holds preferences instead: the preferred answer of each prompt is scored."""
    domain: str | None = None
    """Of DSP's preferences."""
    max_length: int = 256
    """Most tokens of prompt and preferred answer."""


@dataclass(frozen=True)
class EvaluationSpec:
    """What every finished run is measured by."""

    retention: list[RetentionTexts] = field(
        default_factory=lambda: [RetentionTexts("unrelated text", "built-in")]
    )
    prompts: int = 32
    """Held-out prompts of the new preference that are answered. 0: none are, and there are no
    judges; what is left is accuracy and retention."""
    old_prompts: int | None = None
    """Of the old preference; none for as many as of the new."""
    samples: int = 1
    """Sampled answers a prompt."""
    base_samples: int = 4
    """The base's answers a prompt, that gains and win rates are against."""
    max_new_tokens: int = 64
    temperature: float = 1.0
    strengths: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0])
    """Settings of the dial; 1 is the trained policy and always among them."""
    ask_sweeps: bool = True
    """Whether the rows of sweeps are asked and judged too, or get accuracy and retention alone."""
    dial_seeds: int = 1
    """How many of a method's seeds get the whole dial; the others, and sweeps, strength 1 alone."""
    batch_size: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Sweep:
    """One method at several values of an option; each is a row of its own, drawn as one curve."""

    of: str
    """Name of the method that is varied."""
    option: str
    """Its option; "alpha" sets alpha_0 and alpha_tilde together, "adapter.rank" and the like one
    of its adapter's."""
    values: list[float | str]
    seeds: list[int] | None = None


@dataclass(frozen=True)
class Row:
    """A method under its name; ``sweep`` and ``value``: where it came from, if from a sweep."""

    name: str
    method: Method
    seeds: tuple[int, ...]
    sweep: str | None = None
    value: float | str | None = None


@dataclass(frozen=True)
class CompareConfig:
    """A comparison, as its YAML file says it."""

    data: DataConfig
    methods: dict[str, Method]
    model_name_or_path: str = "smollm2"
    dtype: str = "auto"
    chat_template: str | None = None
    """Instead of the tokenizer's own: a .jinja file, a folder or hub name whose tokenizer has one,
    or plain (roles as words)."""
    title: str = "Comparison"
    seeds: list[int] = field(default_factory=lambda: [0])
    old: DataConfig | None = None
    """What the base had learned before: answered, judged and replayed; no method trains on it."""
    first: FirstSpec | None = None
    """Teach the base the old preference first; none to take the base as it is."""
    adapter: AdapterSpec = field(default_factory=AdapterSpec)
    training: TrainingSpec = field(default_factory=TrainingSpec)
    evaluation: EvaluationSpec = EvaluationSpec()
    sweeps: dict[str, Sweep] = field(default_factory=dict)
    reference: str | None = None
    """Name of the row that all others are compared with, prompt by prompt; none for no such
    table."""
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
                method = self.varied(origin, sweep.option, value)
                if method != origin:
                    seeds = tuple(self.seeds if sweep.seeds is None else sweep.seeds)
                    shown = value if isinstance(value, str) else f"{value:g}"
                    rows.append(Row(f"{sweep.of} {sweep.option}={shown}", method, seeds, name,
                                    value))
        return rows

    def varied(self, method: Method, option: str, value: float | str) -> Method:
        """A method with an option of a sweep at one of its values."""
        _, in_adapter, name = option.rpartition("adapter.")
        if in_adapter:
            spec = method.adapter or self.adapter
            kind = typing.get_type_hints(AdapterSpec)[name]
            spec = dataclasses.replace(spec, **{name: _converted(kind, option, value)})
            return dataclasses.replace(method, adapter=None if spec == self.adapter else spec)
        kinds = typing.get_type_hints(type(method))
        changed = {name: _converted(kinds[name], name, value) for name in swept(option)}
        return dataclasses.replace(method, **changed)

    def as_dict(self) -> dict[str, Any]:
        """JSON types, as written: methods with their kind, names of files not resolved."""
        written = dataclasses.asdict(self)
        del written["folder"]
        if self.chat_template is None:  # as comparisons were written that knew of none
            del written["chat_template"]
        for name, method in self.methods.items():
            written["methods"][name]["method"] = method.kind
        return written


def _converted(kind: Any, name: str, value: float | str) -> float | str:
    """A sweep's value as an option of this type takes it."""
    kinds = typing.get_args(kind) or (kind,)
    kind = str if isinstance(value, str) and str in kinds else kinds[0]
    if isinstance(value, str) != (kind is str):
        raise ValueError(f"{name} must be {'text' if kind is str else 'a number'}")
    if kind is not int:
        return value
    if int(value) != value:
        raise ValueError(f"{name} must be a whole number")
    return int(value)


def folder_name(row: str) -> str:
    """Of a row's folder among the results."""
    return row.replace(" ", "-").replace("/", "-")


def swept(option: str) -> tuple[str, ...]:
    """The fields of a method that an option of a sweep sets."""
    return ("alpha_0", "alpha_tilde") if option == "alpha" else (option,)
