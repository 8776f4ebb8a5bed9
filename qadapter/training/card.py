"""The model card of what a trainer trained: with its data, its options and what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import EvalResult

from qadapter.policy.card import adapter_card, table, write_card
from qadapter.system.markup import markdown_list, markdown_text

if TYPE_CHECKING:
    from qadapter.training.trainer import QAdapterTrainer

HELD_OUT = "held-out pairs"
_PACKAGES = ("qadapter", "transformers", "torch", "datasets")
_ARGUMENTS = (
    "learning_rate", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "seed",
)
_SKIPPED = ("runtime", "per_second", "preparation_time", "epoch", "step")
_RESULTS = {"rewards/accuracies": "accuracy", "rewards/margins": "margin", "loss": "loss"}
"""Numbers of an evaluation that stand in the header, and what kind each is."""


def write(
    trainer: QAdapterTrainer, folder: Path, model_name: str | None = None,
    dataset_name: str | Sequence[str] | None = None, tags: str | Iterable[str] = (),
    license: str | None = None, results: Sequence[EvalResult] | None = None,
) -> bool:
    """Write the card of a trainer's model as it is now; as ``policy.card.write_card``.

    Args:
        results: what was measured; default: the last evaluation's numbers.
    """
    model, history = trainer.model, trainer.state.log_history
    text = adapter_card(
        model_name or folder.resolve().name, model.base_identity, model.described(),
        results=_results(history) if results is None else results, datasets=dataset_name,
        license=license, packages=_PACKAGES,
        # Trackers leave where they are to be found in the model's.
        tags=[*([tags] if isinstance(tags, str) else tags), *(model.model_tags or ())],
        sections=[
            "## Data",
            markdown_list(f"{split}: {r.summary()}" for split, r in trainer.reports.items()),
            "## Training",
            table({key: getattr(trainer.args, key) for key in _ARGUMENTS}),
            *_metrics(history),
        ],
    )
    return write_card(folder, text)


def result(kind: str, name: str, value: float, where: str = HELD_OUT) -> EvalResult:
    """One number for the header.

    Args:
        kind: as hubs name it, such as accuracy. name: as people do. where: what it was measured on.
    """
    return EvalResult(
        task_type="text-generation", task_name="preference", dataset_type="preferences",
        dataset_name=where, metric_type=kind, metric_name=name, metric_value=round(value, 6),
    )


def _results(history: list[dict[str, float]]) -> list[EvalResult]:
    last = next((entry for entry in reversed(history) if "eval_loss" in entry), {})
    return [
        result(kind, name, last[f"eval_{name}"])
        for name, kind in _RESULTS.items() if f"eval_{name}" in last
    ]


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
        sections += [f"## {markdown_text(title)} metrics{step}", table(numbers)]
    return sections
