"""What ``train`` ends with and ``eval`` consists of: all measures of one model."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from huggingface_hub import EvalResult
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qadapter.commands.arguments import MeasureArguments
from qadapter.console.progress import progress_bar
from qadapter.data import read_texts
from qadapter.data.splits import evenly
from qadapter.errors import QAdapterError
from qadapter.evaluation import (
    Answer,
    PreferenceResult,
    RetentionResult,
    answer_statistics,
    evaluate_preferences,
    evaluate_retention,
    generate_answers,
)
from qadapter.evaluation.along_dial import AlongDial, answer_along_dial
from qadapter.evaluation.report import (
    Row,
    Section,
    answer_rows,
    baseline_note,
    comparison_markdown,
    pictures_markdown,
    plot_calibration,
    preference_rows,
    retention_rows,
)
from qadapter.policy.model import QAdapterModel
from qadapter.system.markup import markdown_quote
from qadapter.training import card

OWN_ANSWERS = "the base's own answers"
SHOWN_ANSWERS = 3


class Comparison(NamedTuple):
    """Both models' answers to one prompt; ``customised`` is None for a plain model."""

    prompt: str
    base: Answer
    customised: Answer | None


class Measurements(NamedTuple):
    preferences: PreferenceResult
    retentions: dict[str, RetentionResult]
    """By what the texts are; those the user named first."""
    comparisons: list[Comparison]
    along: list[AlongDial]

    @property
    def rows(self) -> list[Row]:
        rows = preference_rows(self.preferences)
        for where, result in self.retentions.items():
            rows += retention_rows(result, where)
        if self.comparisons:
            rows += answer_rows(*self._answer_statistics())
        return rows

    @property
    def note(self) -> str:
        return baseline_note(self.preferences)

    def summary(self) -> dict[str, Any]:
        """JSON types. The retention numbers at the top are those of ``retention_texts``."""
        summary = self.preferences.as_dict()
        if self.retentions:
            first = next(iter(self.retentions))
            summary |= self.retentions[first].as_dict() | {"retention_texts": first}
            summary["retention"] = {name: r.as_dict() for name, r in self.retentions.items()}
        if self.comparisons:
            base, customised = self._answer_statistics()
            summary["answers"] = {"base": base, "customised": customised}
        return summary

    def results(self) -> list[EvalResult]:
        """What a model card's header says."""
        accuracy = self.preferences.preference_accuracy
        found = [] if accuracy is None else [
            card.result("accuracy", "accuracy by reward", accuracy.value)
        ]
        return found + [
            card.result("kl", "KL(base‖customised), nats a token", kept.kl_per_token.value, where)
            for where, kept in self.retentions.items() if kept.kl_per_token is not None
        ]

    def shown(self) -> dict[str, Any]:
        """What ``run_page`` takes of it."""
        return {
            "preferences": self.preferences, "retentions": self.retentions, "rows": self.rows,
            "note": self.note, "along": self.along,
        }

    def sections(self, report: Path) -> list[Section]:
        """The numbers, the calibration's picture (drawn here) and some answers."""
        sections = [Section("Base beside customised",
                            comparison_markdown(self.rows, note=self.note))]
        if self.preferences.calibration is not None:
            picture = plot_calibration(
                self.preferences.calibration, report.parent / "calibration.png"
            )
            sections.append(Section("Calibration", pictures_markdown([picture], report)))
        if self.comparisons:
            shown = "\n\n".join(_comparison_markdown(c) for c in self.comparisons[:SHOWN_ANSWERS])
            sections.append(Section("Greedy answers to held-out prompts", shown))
        return sections

    def _answer_statistics(self) -> tuple[dict[str, float], dict[str, float] | None]:
        base = answer_statistics([c.base for c in self.comparisons])
        customised = [c.customised for c in self.comparisons if c.customised is not None]
        return base, answer_statistics(customised) if customised else None


def read_measures(arguments: MeasureArguments) -> list[str]:
    """The texts to measure retention on; before any model is loaded.

    Raises:
        QAdapterError: a number that can't be; texts that can't be read.
    """
    for name, least in (
        ("answer_prompts", 0), ("answer_tokens", 1), ("measure_batch_size", 1),
        ("bootstrap_resamples", 1), ("measure_seed", 0),
    ):
        if getattr(arguments, name) < least:
            raise QAdapterError(
                f"{name} must be at least {least}, got {getattr(arguments, name)}"
            )
    return [] if arguments.retention_file is None else read_texts(arguments.retention_file)


def check_texts(
    option: str, path: str | None, texts: list[str] | None, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse texts without a token to score as soon as there is a tokenizer to tell.

    Raises:
        QAdapterError: no text has two tokens; names the option and the file.
    """
    if texts and not any(len(tokenizer(text, verbose=False)["input_ids"]) > 1 for text in texts):
        raise QAdapterError(
            f"{option} {path}: no text has two tokens, and a text's first one is never scored"
        )


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, dataset: Dataset,
    arguments: MeasureArguments, texts: list[str], console: Console, *,
    pairs: Dataset | None = None, along_dial: int = 0,
    base_states: Callable[[int], tuple[Tensor, Tensor]] | None = None,
) -> Measurements:
    """Preferences on held-out pairs; retention on texts the user named and on the base's own
    answers to held-out prompts; answers of both models.

    Args:
        dataset: tokenized pairs.
        texts: what ``read_measures`` gave.
        pairs: the same before tokenizing; its prompts are shown as they were written.
        along_dial: so many of the prompts that are answered are answered along the dial, too.
        base_states: as ``evaluate_preferences``'.
    """
    resampling = {
        "num_resamples": arguments.bootstrap_resamples, "seed": arguments.measure_seed,
        "batch_size": arguments.measure_batch_size,
    }
    with progress_bar(console, "held-out pairs", "pairs") as progress:
        preferences = evaluate_preferences(
            model, dataset, progress=progress, base_states=base_states, **resampling
        )
    customised = isinstance(model, QAdapterModel)
    comparisons, along, retentions = [], [], {}
    if texts:
        with progress_bar(console, "retention texts", "texts") as progress:
            retentions[Path(arguments.retention_file).name] = evaluate_retention(
                model, texts, tokenizer, progress=progress, **resampling
            )
    if arguments.answer_prompts:
        rows = _choose_prompts(dataset, arguments.answer_prompts, arguments.measure_seed)
        prompts = [list(row["prompt_ids"]) for row in rows]
        options = {
            "max_new_tokens": arguments.answer_tokens, "batch_size": arguments.measure_batch_size,
        }
        with progress_bar(console, "the base's answers", "answers") as progress:
            base = generate_answers(
                model, tokenizer, prompts, strength=0.0 if customised else None,
                progress=progress, **options,
            )
        answers: list[Answer | None] = [None] * len(prompts)
        if customised:
            with progress_bar(console, "the customised answers", "answers") as progress:
                answers = generate_answers(
                    model, tokenizer, prompts, progress=progress, **options
                )
        written = {} if pairs is None else _written_prompts(pairs)
        shown = [
            written.get(row["prompt_id"])
            or tokenizer.decode(row["prompt_ids"], skip_special_tokens=True) for row in rows
        ]
        comparisons = [Comparison(*x) for x in zip(shown, base, answers, strict=True)]
        with progress_bar(console, OWN_ANSWERS, "texts", closing=False) as progress:
            retentions[OWN_ANSWERS] = evaluate_retention(
                model, [p + a.token_ids for p, a in zip(prompts, base, strict=True)],
                prompt_lengths=[len(p) for p in prompts], max_length=10**9, progress=progress,
                **resampling,
            )
    chosen = evenly(range(len(comparisons)), along_dial) if customised else []
    if chosen:
        known = {0.0: [base[i] for i in chosen],
                 model.policy.strength: [answers[i] for i in chosen]}
        with progress_bar(console, "answers along the dial", "answers") as progress:
            along = answer_along_dial(
                model, tokenizer, [rows[i] for i in chosen],
                [comparisons[i].prompt for i in chosen], known=known, progress=progress, **options,
            )
    return Measurements(preferences, retentions, comparisons, along)


def _choose_prompts(dataset: Dataset, count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of up to ``count`` different prompts."""
    first_row = {name: i for i, name in reversed(list(enumerate(dataset["prompt_id"])))}
    rows = sorted(first_row.values())
    chosen = sorted(random.Random(seed).sample(rows, min(count, len(rows))))
    return list(dataset.select(chosen))


def _written_prompts(pairs: Dataset) -> dict[str, str]:
    """prompt_id → the prompt as it was written; what isn't text is not among them."""
    if "prompt" not in pairs.column_names:
        return {}
    rows = zip(pairs["prompt_id"], pairs["prompt"], strict=True)
    return {name: text for name, prompt in rows if prompt and (text := _written(prompt))}


def _written(prompt: str | list[dict[str, Any]]) -> str:
    """One message's text, or a conversation with who says what."""
    if isinstance(prompt, str):
        return prompt
    texts = [message.get("content") for message in prompt]
    if not all(isinstance(text, str) for text in texts):
        return ""
    if len(prompt) == 1:
        return texts[0]
    roles = [message.get("role", "") for message in prompt]
    return "\n\n".join(f"{role}: {text}" for role, text in zip(roles, texts, strict=True))


def _comparison_markdown(comparison: Comparison) -> str:
    parts = [("Prompt", comparison.prompt), ("Base", comparison.base.text)]
    if comparison.customised is not None:
        parts.append(("Customised", comparison.customised.text))
    return "\n\n".join(f"**{name}**\n\n{markdown_quote(text)}" for name, text in parts)
