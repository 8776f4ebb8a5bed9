"""The whole job on the built-in preferences: train, measure, show, write."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from qadapter.adapters.head_adapter import AdapterConfig
from qadapter.console.environment import devices, peak_rss_bytes, quiet_libraries, versions
from qadapter.console.folders import RUN_FILES, output_folder, remove_files, telling_how_to_go_on
from qadapter.console.progress import TrainingProgress, progress_bar, saying
from qadapter.console.terminal import Terminal
from qadapter.data import tokenize_preferences
from qadapter.data.passages import passages
from qadapter.data.splits import evenly
from qadapter.demo.manner import DESCRIPTION, keeps_manner
from qadapter.errors import QAdapterError
from qadapter.evaluation import (
    Answer,
    PreferenceResult,
    RetentionResult,
    answer_statistics,
    comparison_table,
    evaluate_preferences,
    evaluate_retention,
    generate_answers,
    plot_training_curves,
    write_metrics_jsonl,
    write_report,
)
from qadapter.evaluation.along_dial import STRENGTHS, answer_along_dial
from qadapter.evaluation.report import (
    Row,
    Section,
    answer_rows,
    baseline_note,
    comparison_markdown,
    in_words,
    pictures_markdown,
    preference_rows,
    retention_rows,
    write_json,
)
from qadapter.evaluation.run_page import PAGE_NAME, write_run_page
from qadapter.objective import ObjectiveConfig
from qadapter.policy.model import QAdapterModel
from qadapter.system.documents import read_json
from qadapter.system.markup import markdown_list, markdown_quote, markdown_text, one_line
from qadapter.training import QAdapterConfig, QAdapterTrainer
from qadapter.trunk.base_dtype import dtype_of
from qadapter.trunk.loading import load_base, load_tokenizer

DATA = Path(__file__).parent / "data"
OBJECTIVE = ObjectiveConfig(alpha_0=0.1, alpha_tilde=0.1)
"""The answers written for the project are far from what the base would say: a small α lets the
policy move towards them, and the retention term keeps it where it was everywhere else."""
ADAPTER = AdapterConfig(form="block", rank=128)
UNRELATED = "unrelated text"
SUMMARY_NAME, RUN = "summary.json", "demo"
SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Size:
    """How much of everything; ``fast`` exercises the same code in a fraction of the time."""

    train_pairs: int | None = 270
    test_pairs: int | None = 54
    rejected_tokens: int = 48
    """Of the base's samples, in training and held out: a manner shows at once. On whole samples,
    an adapter trained on these beginnings is as often right as one trained on all 160 tokens."""
    epochs: float = 1.0
    prompts: int = 24
    along_dial: int = 6
    """Of them, those that are answered at all of ``STRENGTHS``."""
    answer_tokens: int = 112
    """No answer in the manner is longer."""


FULL = Size()
FAST = Size(train_pairs=72, test_pairs=18, epochs=1.0, prompts=6, along_dial=3)


class DemoPairs(NamedTuple):
    train: list[dict[str, Any]]
    test: list[dict[str, Any]]


def load_pairs(size: Size = FULL) -> DemoPairs:
    """The built-in pairs; prompts of ``test`` are in no pair of ``train``."""
    pairs = _read_jsonl(DATA / "preferences.jsonl")
    train = [pair for pair in pairs if pair["split"] == "train"]
    test = [pair for pair in pairs if pair["split"] == "test"]
    return DemoPairs(evenly(train, size.train_pairs), evenly(test, size.test_pairs))


def tokenize_pairs(
    pairs: list[dict[str, Any]], tokenizer: Any, max_length: int, rejected_tokens: int
) -> Dataset:
    """Tokenized pairs. A sample that was cut, when it was drawn or here, has no end of turn, and
    none is put there."""
    dataset = tokenize_preferences(
        [_as_conversation(pair) for pair in pairs], tokenizer, max_length=max_length
    ).dataset

    def cut(example: dict[str, Any]) -> dict[str, Any]:
        ids = example["rejected_ids"]
        ids = ids[:-1] if pairs[example["row"]]["rejected_cut"] else ids
        return {"rejected_ids": ids[:rejected_tokens]}

    return dataset.map(cut, desc=None)


def run_demo(
    output_dir: str | Path = "runs/demo", *, fast: bool = False,
    model_name_or_path: str = "smollm2", seed: int = 0,
) -> dict[str, Any]:
    """Customise a small real chat model to the built-in preferences and show what it did.

    Args:
        output_dir: gets the adapter, ``summary.json``, ``metrics.jsonl``, pictures, ``report.md``
            and ``report.html``.
        fast: a fraction of the data; to see that everything works, not how well.
        model_name_or_path: another base than SmolLM2-135M-Instruct. (The answers that count as
            rejected stay that model's own.)

    Returns:
        What ``summary.json`` holds.
    """
    with _demo_folder(output_dir) as folder:
        return _run(folder, FAST if fast else FULL, fast, model_name_or_path, seed)


def _run(
    folder: Path, size: Size, fast: bool, model_name_or_path: str, seed: int
) -> dict[str, Any]:
    start, console = time.monotonic(), Terminal()
    quiet_libraries()
    say = saying(console)
    loaded = load_base(model_name_or_path, say=say)
    console.print(f"base: {loaded.name} — {loaded.reason}", highlight=False)
    started = time.monotonic()  # downloads and conversions are not the demo's own time
    tokenizer = load_tokenizer(loaded.name)
    set_seed(seed)  # the adapter's start is random too
    model = QAdapterModel.from_base(loaded, ADAPTER, OBJECTIVE)

    pairs = load_pairs(size)
    retention_texts, unrelated = passages(held_to=True), passages(held_to=False)
    console.print(
        f"{len(pairs.train)} training pairs, {len(pairs.test)} held-out pairs, over "
        f"{len({p['kind'] for p in pairs.train})} kinds of task; preferred: {DESCRIPTION}",
        highlight=False,
    )
    arguments = _arguments(folder, size, seed)
    train, test = (
        tokenize_pairs(part, tokenizer, arguments.max_length, size.rejected_tokens)
        for part in pairs
    )
    trainer = QAdapterTrainer(
        model, arguments, train_dataset=train, processing_class=tokenizer,
        retention_dataset=retention_texts, say=say,
        reporter=functools.partial(progress_bar, console),
    )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    progress = TrainingProgress(console)
    trainer.add_callback(progress)
    with telling_how_to_go_on(folder, "run it again"):
        _claim(folder)
        try:
            trainer.train()
        finally:
            progress.stop()

    with progress_bar(console, "held-out pairs", "pairs") as advance:
        preferences = evaluate_preferences(model, test, progress=advance, seed=seed)
    with progress_bar(console, UNRELATED, "texts") as advance:
        retention = evaluate_retention(model, unrelated, tokenizer, progress=advance, seed=seed)
    asked = evenly(list(test), size.prompts)
    prompts = [pairs.test[row["row"]]["prompt"] for row in asked]
    dialled = evenly(range(len(asked)), size.along_dial)
    wanted = [
        (i, s) for s in STRENGTHS
        for i in (range(len(asked)) if s in (0.0, 1.0) else dialled)
    ]
    with progress_bar(console, "greedy answers of both", "answers") as advance:
        # In one batch: a CPU reads the weights once for all of them.
        found = generate_answers(
            model, tokenizer, [prompts[i] for i, _ in wanted], strength=[s for _, s in wanted],
            batch_size=len(wanted), max_new_tokens=size.answer_tokens, progress=advance,
        )
    given = dict(zip(wanted, found, strict=True))
    answers = {
        name: [given[i, s] for i in range(len(asked))]
        for name, s in (("base", 0.0), ("customised", 1.0))
    }
    along = answer_along_dial(
        model, tokenizer, [asked[i] for i in dialled], [prompts[i] for i in dialled],
        known={s: [given[i, s] for i in dialled] for s in STRENGTHS},
    )
    rows = _rows(preferences, retention, answers["base"], answers["customised"])
    console.print(
        comparison_table(rows, title="base beside customised", note=baseline_note(preferences))
    )
    for prompt, before, after in _shown(prompts, answers):
        console.print(_side_by_side(prompt, before, after))

    summary = {
        "run": RUN, "fast": fast, "base": loaded.name, "dtype": dtype_of(model),
        "adapter": dataclasses.asdict(ADAPTER), "objective": dataclasses.asdict(OBJECTIVE),
        "retention_coef": arguments.retention_coef, "rejected_tokens": size.rejected_tokens,
        "train_pairs": len(train), "test_pairs": len(test),
        **preferences.as_dict(), **retention.as_dict(),
        "manner": DESCRIPTION,
        "manner_share": _share(answers["customised"]), "manner_share_base": _share(answers["base"]),
        "answers": {name: answer_statistics(a) for name, a in answers.items()},
        "seconds": time.monotonic() - started,
        "seconds_with_downloads": time.monotonic() - start,
        "peak_rss_bytes": peak_rss_bytes(), "seed": seed,
        "versions": versions(), "devices": devices(),
    }
    with telling_how_to_go_on(folder, "run it again"):
        history = trainer.state.log_history
        write_metrics_jsonl(folder / "metrics.jsonl", history)
        write_json(folder / SUMMARY_NAME, summary)
        curves = plot_training_curves(history, folder)
        report, title, facts = folder / "report.md", "Demo: a customised SmolLM2", _facts(summary)
        write_report(report, title, [
            Section("What was done", markdown_list(f"{k}: {v}" for k, v in facts.items())),
            Section("Base beside customised",
                    comparison_markdown(rows, note=baseline_note(preferences))),
            Section("Greedy answers to held-out prompts",
                    "\n\n".join(_markdown(*x) for x in _shown(prompts, answers))),
            Section("Training", pictures_markdown(curves, report)),
        ])
        write_run_page(
            folder / PAGE_NAME, title, facts, history, preferences=preferences,
            retentions={UNRELATED: retention}, rows=rows, note=baseline_note(preferences),
            along=along,
        )
    console.print(f"to look at: {folder / PAGE_NAME}", highlight=False)
    console.print(
        f"wrote {folder} in {summary['seconds']:.0f} s, peak memory "
        f"{summary['peak_rss_bytes'] / 2**30:.2f} GiB; talk to it: "
        f"qadapter generate {folder}, or on a page: qadapter serve {folder}; a plain checkpoint of "
        f"it: qadapter export {folder} --output_dir {folder}-merged", highlight=False,
    )
    return summary


def _arguments(folder: Path, size: Size, seed: int) -> QAdapterConfig:
    return QAdapterConfig(
        output_dir=str(folder), seed=seed, learning_rate=4e-4, num_train_epochs=size.epochs,
        per_device_train_batch_size=4, max_length=512, retention_coef=10.0, retention_states=128,
        logging_steps=2, save_strategy="epoch", save_total_limit=1, feature_batch_tokens=2048,
        **dataclasses.asdict(OBJECTIVE),
    )


@contextlib.contextmanager
def _demo_folder(output_dir: str | Path) -> Iterator[Path]:
    """An earlier demo in the folder is replaced; any other run is left alone."""
    folder = Path(output_dir).expanduser()
    summary = folder / SUMMARY_NAME
    earlier = False
    if summary.is_file():
        try:
            earlier = read_json(summary).get("run") == RUN
        except (QAdapterError, AttributeError):
            earlier = False
    with output_folder(folder, RUN_FILES, earlier, "choose another with --output_dir"):
        yield folder


def _claim(folder: Path) -> None:
    """From here on the folder is known for a demo's, however far this one gets."""
    remove_files(folder, [name for name in RUN_FILES if name != SUMMARY_NAME])
    write_json(folder / SUMMARY_NAME, {"run": RUN, "finished": False})


def _rows(
    preferences: PreferenceResult, retention: RetentionResult, base: list[Answer],
    customised: list[Answer],
) -> list[Row]:
    return [
        *preference_rows(preferences),
        *retention_rows(retention, UNRELATED),
        Row(f"greedy answers that are {DESCRIPTION}", _share(base), _share(customised), 2),
        *answer_rows(answer_statistics(base), answer_statistics(customised)),
    ]


def _share(answers: list[Answer]) -> float:
    return sum(map(keeps_manner, answers)) / max(1, len(answers))


def _shown(
    prompts: list[str], answers: dict[str, list[Answer]]
) -> list[tuple[str, str, str]]:
    step = max(1, len(prompts) // SHOWN)
    return [
        (prompts[i], answers["base"][i].text, answers["customised"][i].text)
        for i in range(step // 2, len(prompts), step)
    ][:SHOWN]


def _side_by_side(prompt: str, before: str, after: str) -> Panel:
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(ratio=1)
    table.add_column(ratio=1)
    table.add_row(Text("base", style="bold"), Text("customised", style="bold"))
    table.add_row(before, after)
    return Panel(table, title=Text(one_line(prompt)), title_align="left")


def _markdown(prompt: str, before: str, after: str) -> str:
    return (
        f"**{markdown_text(prompt)}**\n\nBase:\n\n{markdown_quote(before)}\n\n"
        f"Customised:\n\n{markdown_quote(after)}"
    )


def _facts(summary: dict[str, Any]) -> dict[str, str]:
    return {
        "base": summary["base"],
        "adapter": in_words(summary["adapter"]),
        "objective": f"{in_words(summary['objective'])}, retention_coef "
        f"{summary['retention_coef']:g}",
        "pairs": f"{summary['train_pairs']} for training, {summary['test_pairs']} held out",
        "preferred": f"{summary['manner']}; the other answer is the base's own sample, its first "
        f"{summary['rejected_tokens']} tokens",
        "took": f"{summary['seconds']:.0f} s, peak memory "
        f"{summary['peak_rss_bytes'] / 2**30:.2f} GiB",
    }


def _as_conversation(pair: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": pair["prompt"]}],
        "chosen": [{"role": "assistant", "content": pair["chosen"]}],
        "rejected": [{"role": "assistant", "content": pair["rejected"]}],
    }


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]
