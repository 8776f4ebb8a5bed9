"""The model card: README.md beside every saved adapter."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCardData

from qadapter.policy import storage
from qadapter.system.markup import markdown_code, markdown_list, markdown_table, markdown_text

if TYPE_CHECKING:
    from qadapter.training.trainer import QAdapterTrainer

TAGS = ("qadapter", "q-adapter", "preference-optimization")
_VERSIONS = ("qadapter", "transformers", "torch", "datasets")
_ARGUMENTS = (
    "learning_rate", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "seed",
)
_SKIPPED = ("runtime", "per_second", "preparation_time", "epoch", "step")


def write(
    trainer: QAdapterTrainer, folder: Path, model_name: str | None = None,
    dataset_name: str | None = None, tags: str | list[str] | None = None,
) -> None:
    """Write the card of a trainer's model as it is now."""
    model = trainer.model
    more_tags = [tags] if isinstance(tags, str) else list(tags or ())
    base = model.base_identity.name
    data = ModelCardData(
        base_model=base if base.count("/") == 1 and not Path(base).exists() else None,
        library_name="qadapter", pipeline_tag="text-generation", datasets=dataset_name,
        tags=list(dict.fromkeys([*TAGS, *more_tags])),
    )
    name = model_name or folder.resolve().name
    sections = [
        f"---\n{data.to_yaml()}\n---",
        f"# {markdown_text(name)}",
        "A [Q-Adapter](https://arxiv.org/abs/2407.03856) for "
        f"{markdown_code(Path(base).name)}: a residual "
        "Q-function learned from preference pairs. Together with the frozen base it is the "
        "customised policy; what the base knew, it keeps.",
        "```python\nfrom qadapter import QAdapterModel\n\n"
        f"model = QAdapterModel.from_pretrained({_python(name)})  # loads its base too\n"
        "model.set_policy(strength=1.0)  # 0 is the base, more than 1 goes further\n```",
        "## Data",
        markdown_list(f"{split}: {r.summary()}" for split, r in trainer.reports.items()),
        "## Adapter and objective",
        _table(
            {
                **storage.describe(model.adapter_config), **dataclasses.asdict(model.objective)
            }
        ),
        "## Training",
        _table({key: getattr(trainer.args, key) for key in _ARGUMENTS}),
        *_metrics(trainer.state.log_history),
        "## Versions",
        _table({package: importlib.metadata.version(package) for package in _VERSIONS}),
    ]
    text = "\n\n".join(sections) + "\n"
    (folder / "README.md").write_text(text, encoding="utf-8", errors="backslashreplace")


def _metrics(history: list[dict[str, float]]) -> list[str]:
    """The last entry of training and of each evaluation set."""
    last: dict[str, dict[str, float]] = {}
    for entry in history:
        # transformers puts the loss of the run or of the evaluation set first.
        key = next((name for name in entry if name.endswith("loss")), "")
        if key == "loss" or key.startswith("eval_"):
            last[key] = entry
    sections = []
    for key, entry in last.items():
        numbers = {
            name: f"{value:.6g}" if isinstance(value, int | float) else value
            for name, value in entry.items()
            if not any(part in name for part in _SKIPPED)
        }
        title = "Training" if key == "loss" else f"Evaluation ({key.removesuffix('_loss')})"
        step = f", step {entry['step']}" if "step" in entry else ""
        sections += [f"## {markdown_text(title)} metrics{step}", _table(numbers)]
    return sections


def _table(entries: dict[str, object]) -> str:
    return markdown_table(("", ""), entries.items())


def _python(text: str) -> str:
    """As a string of Python on one line."""
    plain = text.isprintable() and not set(text) & set('"\\')
    return f'"{text}"' if plain else repr(text)
