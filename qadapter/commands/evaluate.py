"""``qadapter eval``: what a model prefers, and what it kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from qadapter.commands import arguments as args
from qadapter.commands.knowledge import Knowledge, check_knowledge, measure_knowledge
from qadapter.commands.loading import load_model
from qadapter.commands.measuring import Measurements, check_texts, measure, read_measures
from qadapter.commands.options import Group, command
from qadapter.console.environment import devices, quiet_libraries, versions
from qadapter.console.folders import (
    EVALUATION_FILES,
    EVALUATION_NAME,
    output_folder,
    remove_files,
    telling_how_to_go_on,
)
from qadapter.console.terminal import Terminal
from qadapter.data import PreparationReport, check_pairs, load_preferences, tokenize_preferences
from qadapter.errors import QAdapterError
from qadapter.evaluation import PreferenceResult, comparison_table, write_report
from qadapter.evaluation.report import Section, comparison_markdown, write_json, write_json_lines
from qadapter.trunk.base_dtype import dtype_of

NOTE = "Brackets: 95% intervals; change: customised − base on the same examples."
GROUPS = (
    Group(args.AdapterArguments, "Model", (
        "model_name_or_path", "base_model_name_or_path", "strength", "model_revision", "dtype",
        "trust_remote_code", "model_init_kwargs", "chat_template_path",
    )),
    Group(args.EvalDataArguments, "Data", (
        "dataset_name", "dataset_config", "dataset_split", "columns", "domain", "rejected_domains",
        "max_rows", "max_length",
    )),
    Group(args.EvalDataArguments, "Output", ("output_dir", "overwrite_output_dir")),
    Group(args.MeasureArguments, "Measures"),
    Group(args.KnowledgeArguments, "Knowledge"),
)


def app(show_hidden: bool = False) -> typer.Typer:
    return command(
        "eval",
        "Evaluate an adapter, a base or a plain checkpoint on preference pairs: accuracy, "
        "calibration, retention, answers; and on benchmarks. With 95% intervals.",
        GROUPS, run, show_hidden=show_hidden, argument="model_name_or_path",
    )


def run(
    model_args: args.AdapterArguments, data: args.EvalDataArguments,
    measures: args.MeasureArguments, knowledge_args: args.KnowledgeArguments, given: set[str],
) -> None:
    """Evaluate, print the table, write the folder."""
    console = Terminal()
    if "model_name_or_path" not in given:
        raise QAdapterError("eval needs --model_name_or_path")
    check_knowledge(knowledge_args, given)
    asks_knowledge = knowledge_args.lm_eval is not None or knowledge_args.exemplar_probe
    if data.dataset_name is None and not asks_knowledge:
        raise QAdapterError("eval needs --dataset_name, --lm_eval or --exemplar_probe")
    if data.dataset_name is None and measures.retention_file is not None:
        raise QAdapterError("retention_file needs --dataset_name")
    if data.max_length is not None and data.max_length < 2:
        raise QAdapterError(f"max_length must be at least 2, got {data.max_length}")
    texts = read_measures(measures)
    with contextlib.nullcontext() if data.output_dir is None else output_folder(
        data.output_dir, EVALUATION_FILES, data.overwrite_output_dir,
        "choose another, or replace it with --overwrite_output_dir",
        inputs={"dataset_name": data.dataset_name, "retention_file": measures.retention_file},
        known_by=EVALUATION_NAME,
    ) as folder:
        _run(model_args, data, measures, knowledge_args, texts, folder, console)


def _run(
    model_args: args.AdapterArguments, data: args.EvalDataArguments,
    measures: args.MeasureArguments, knowledge_args: args.KnowledgeArguments,
    texts: list[str] | None, folder: Path | None, console: Terminal,
) -> None:
    quiet_libraries()
    pairs = None
    if data.dataset_name is not None:
        pairs = load_preferences(data.dataset_name, split=data.dataset_split, **data.load_kwargs())
    model, tokenizer = load_model(model_args, console)
    check_texts("retention_file", measures.retention_file, texts, tokenizer)
    measured = report = None
    if pairs is not None:
        dataset, report = tokenize_preferences(pairs, tokenizer, max_length=data.max_length)
        check_pairs(dataset, model, tokenizer, data.dataset_name)
        console.print(report.table())
        measured = measure(model, tokenizer, dataset, measures, texts, console, pairs=pairs)
    knowledge = measure_knowledge(model, tokenizer, knowledge_args, measures, console)
    note = NOTE if measured is None else measured.note
    rows = ([] if measured is None else measured.rows) + knowledge.rows
    console.print(comparison_table(rows, title=model_args.model_name_or_path, note=note))
    if folder is None:
        return
    with telling_how_to_go_on(folder, "run it again"):
        remove_files(folder, EVALUATION_FILES)
        _write(folder, model_args, dtype_of(model), data, measured, knowledge, report)
    console.print(f"wrote {folder}", highlight=False)


def _write(
    folder: Path, model_args: args.AdapterArguments, dtype: str, data: args.EvalDataArguments,
    measured: Measurements | None, knowledge: Knowledge, report: PreparationReport | None,
) -> None:
    found: dict[str, Any] = {
        "model": model_args.model_name_or_path, "strength": model_args.strength,
        "dtype": dtype,
    }
    if measured is not None and report is not None:
        found |= {"dataset": data.dataset_name, **measured.summary(), "data": report.as_dict()}
    # First: by it the other files are known for an evaluation's.
    write_json(folder / EVALUATION_NAME, {
        **found, **knowledge.summary(), "versions": versions(), "devices": devices(),
    })
    report_path = folder / "report.md"
    title, sections = model_args.model_name_or_path, []
    if measured is not None:
        write_json_lines(folder / "pairs.jsonl", _pairs(measured.preferences))
        title, sections = f"{title} on {data.dataset_name}", measured.sections(report_path)
    if knowledge.rows:
        sections.append(Section("Knowledge", comparison_markdown(knowledge.rows, note=NOTE)))
    write_report(report_path, title, sections)


def _pairs(result: PreferenceResult) -> Iterator[dict[str, Any]]:
    columns = {name: column.tolist() for name, column in vars(result.pairs).items()}
    if result.preference_accuracy is None:  # a plain model has no rewards
        columns = {name: column for name, column in columns.items() if "reward" not in name}
    for row in zip(*columns.values(), strict=True):
        yield dict(zip(columns, row, strict=True))
