"""``qadapter judge``: how often a model's answers beat its base's, by judges the user names."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from qadapter.commands import arguments as args
from qadapter.commands.contest import (
    ANSWERS,
    JUDGEMENTS,
    Contest,
    draw_answers,
    hear,
    named_judges,
    split_pairs,
    train_judges,
)
from qadapter.commands.options import Group, command
from qadapter.console.environment import devices, quiet_libraries, versions
from qadapter.console.folders import (
    EVALUATION_FILES,
    RUN_FILES,
    output_folder,
    remove_files,
    telling_how_to_go_on,
)
from qadapter.console.terminal import Terminal
from qadapter.data import load_preferences
from qadapter.errors import QAdapterError, shown
from qadapter.evaluation import answer_statistics
from qadapter.evaluation.judges import (
    Judge,
    LengthJudge,
    preference_texts,
)
from qadapter.evaluation.judges.contest import COLUMNS, Verdict, verdict_cells
from qadapter.evaluation.judges.endpoint import EndpointJudge, check_url
from qadapter.evaluation.judges.trained import TrainedJudge, require_enough
from qadapter.evaluation.report import Section, Value, format_value, write_json, write_report
from qadapter.system.documents import read_json
from qadapter.system.hashing import file_sha256
from qadapter.system.markup import markdown_list, markdown_table
from qadapter.trunk.base_dtype import dtype_of

GROUPS = (
    Group(args.AdapterArguments, "Model", (
        "model_name_or_path", "base_model_name_or_path", "strength", "model_revision", "dtype",
        "trust_remote_code", "model_init_kwargs", "chat_template_path",
    )),
    Group(args.OpponentArguments, "Model"),
    Group(args.JudgeDataArguments, "Prompts", (
        "dataset_name", "dataset_config", "dataset_split", "columns", "domain", "rejected_domains",
        "max_rows", "num_prompts",
    )),
    Group(args.DrawArguments, "Answers"),
    Group(args.JudgeArguments, "Judges"),
    Group(args.JudgeDataArguments, "Output", ("output_dir", "overwrite_output_dir")),
)
SETTINGS = "settings.json"
AGAIN = "run it again: answers and judgements so far are kept"
CONTEST_FILES = (SETTINGS, ANSWERS, JUDGEMENTS, "judge.json", "judge.md")
NOTE = (
    "wins: a tie counts one half, and so does a judge without an opinion (a coin: 0.500). gain: in "
    "standard deviations of the opponent's scores. Brackets: 95% intervals, bootstrap over "
    "prompts; the variance over training seeds is not in them."
)


def app(show_hidden: bool = False) -> typer.Typer:
    return command(
        "judge",
        "Draw answers of a model and of its base (or another opponent) to the same prompts, and "
        "let judges compare them. A judge that prefers the longer answer is always among them.",
        GROUPS, run, show_hidden=show_hidden, argument="model_name_or_path",
    )


def run(
    model_args: args.AdapterArguments, opponent: args.OpponentArguments,
    data: args.JudgeDataArguments, draws: args.DrawArguments, judging: args.JudgeArguments,
    given: set[str],
) -> None:
    """Draw, judge, print the table, write the folder."""
    console = Terminal()
    for name in ("model_name_or_path", "dataset_name"):
        if name not in given:
            raise QAdapterError(f"judge needs --{name}")
    _check(opponent, data, draws, judging, given)
    settings = _settings(model_args, opponent, data, draws, judging)
    with _folder(data, settings) as folder:
        _run(model_args, opponent, data, draws, judging, settings, folder, console)


def _run(
    model_args: args.AdapterArguments, opponent: args.OpponentArguments,
    data: args.JudgeDataArguments, draws: args.DrawArguments, judging: args.JudgeArguments,
    settings: dict[str, Any], folder: Path | None, console: Terminal,
) -> None:
    quiet_libraries()
    judges: list[Judge] = [LengthJudge(), *named_judges(judging, folder, draws.batch_size)]
    pairs = load_preferences(data.dataset_name, split=data.dataset_split, **data.load_kwargs())
    asked_pairs, judge_pairs = split_pairs(pairs, data, judging, draws.seed, console)
    if judge_pairs is not None:  # not after all answers are drawn
        require_enough(judge_pairs["prompt_id"])
    with telling_how_to_go_on(folder or ".", AGAIN if folder else "run it again"):
        if folder is not None:  # not before: a name that can't be loaded is no contest
            write_json(folder / SETTINGS, settings)
        contest, model, tokenizer = draw_answers(
            model_args, opponent, asked_pairs, data.num_prompts, draws, folder, console
        )
        if judge_pairs is not None:
            judges += train_judges(
                model, tokenizer, preference_texts(judge_pairs, tokenizer), draws.batch_size,
                console,
            )
        verdicts, accuracies = hear(judges, contest, draws.seed, console)
        console.print(_table(verdicts))
        for line in (facts := _facts(judges, contest, accuracies, judging)):
            console.print(line, highlight=False, markup=False)
        if folder is not None:
            told = settings | asdict(judging) | {"dtype": dtype_of(model)}  # not "auto"
            _write(folder, told, verdicts, accuracies, judges, contest, facts)
            console.print(f"wrote {folder}", highlight=False)


def _check(
    opponent: args.OpponentArguments, data: args.JudgeDataArguments, draws: args.DrawArguments,
    judging: args.JudgeArguments, given: set[str],
) -> None:
    if judging.judge_dataset_name is not None and judging.judge_fraction:
        raise QAdapterError("give either judge_dataset_name or judge_fraction, not both")
    if not 0 <= judging.judge_fraction < 1:
        raise QAdapterError(
            f"judge_fraction must be at least 0 and below 1, got {judging.judge_fraction}"
        )
    named = (judging.judge_model, judging.reward_model, judging.judge_dataset_name)
    if not any(named) and not judging.judge_fraction:
        raise QAdapterError(
            "judge needs a judge: --judge_model, --reward_model, --judge_dataset_name or "
            "--judge_fraction"
        )
    unused = sorted(given & {
        "judge_url", "judge_prompt_file", "judge_concurrency", "judge_input_price",
        "judge_output_price",
    })
    if unused and judging.judge_model is None:
        raise QAdapterError(f"{unused[0]} needs --judge_model")
    if (judging.judge_input_price is None) != (judging.judge_output_price is None):
        raise QAdapterError("judge_input_price and judge_output_price are given together")
    if judging.judge_url is not None:
        check_url(judging.judge_url, "judge_url")
    if opponent.opponent_strength is not None and opponent.opponent is None:
        raise QAdapterError("opponent_strength needs --opponent")
    for arguments, names in (
        (draws, ("draws", "opponent_draws", "max_new_tokens", "batch_size")),
        (judging, ("judge_concurrency",)), (data, ("num_prompts",)),
    ):
        for name in names:
            if getattr(arguments, name) < 1:
                raise QAdapterError(f"{name} must be at least 1, got {getattr(arguments, name)}")
    for name in ("judge_input_price", "judge_output_price"):
        args.require_not_negative(name, getattr(judging, name))
    if not 0 < draws.temperature < math.inf:
        raise QAdapterError(f"temperature must be finite and positive, got {draws.temperature}")
    if not 0 < draws.top_p <= 1:
        raise QAdapterError(f"top_p must be above 0 and at most 1, got {draws.top_p}")
    if not 0 <= draws.seed < 2**63:
        raise QAdapterError(f"seed must be at least 0 and below 2**63, got {draws.seed}")


# --- the folder ---------------------------------------------------------------------------------


def _settings(*arguments: Any) -> dict[str, Any]:
    """All that the answers depend on; judges may come and go."""
    model_args, opponent, data, draws, judging = map(asdict, arguments)
    for name in ("output_dir", "overwrite_output_dir"):
        del data[name]
    del draws["batch_size"]
    settings = model_args | opponent | data | draws
    settings["judge_fraction"] = judging["judge_fraction"]  # its prompts are not asked
    for name in ("model_name_or_path", "opponent"):
        settings[f"{name}_weights"] = _weights_hash(settings[name])
    return settings


def _weights_hash(name: str | None) -> str | None:
    """Of a folder, an adapter's or a checkpoint's: one that was trained again gives other
    answers."""
    files = [] if name is None else sorted(Path(name).expanduser().glob("*.safetensors"))
    hashes = "".join(file_sha256(file) for file in files)
    return hashlib.sha256(hashes.encode()).hexdigest() if hashes else None


@contextlib.contextmanager
def _folder(
    data: args.JudgeDataArguments, settings: dict[str, Any]
) -> Iterator[Path | None]:
    """The folder, if one is named, for this contest alone."""
    if data.output_dir is None:
        yield None
        return
    with output_folder(
        data.output_dir, (*RUN_FILES, *EVALUATION_FILES), False, "choose another folder"
    ) as folder:
        _check_contest(folder, data, settings)
        yield folder


def _check_contest(
    folder: Path, data: args.JudgeDataArguments, settings: dict[str, Any]
) -> None:
    """The folder must hold nothing, or an earlier part of this contest."""
    if data.overwrite_output_dir:
        remove_files(folder, CONTEST_FILES)
    file = folder / SETTINGS
    # Settings of a run that kept nothing (its model could not be loaded) bind nobody.
    if not file.exists() or not any((folder / name).exists() for name in CONTEST_FILES[1:]):
        return
    way_out = "choose another output_dir, or replace it with --overwrite_output_dir"
    try:
        before = read_json(file)
    except QAdapterError as error:
        raise QAdapterError(f"{error}: {way_out}") from error
    if not isinstance(before, dict):
        raise QAdapterError(f"{file} holds no settings: {way_out}")
    changed = [name for name in settings if settings[name] != before.get(name)]
    if changed:
        name = changed[0]
        raise QAdapterError(
            f"output_dir {folder} holds a contest with another {name} "
            f"({shown(before.get(name))}, now {shown(settings[name])}): {way_out}"
        )


# --- what is shown ------------------------------------------------------------------------------


def _table(verdicts: list[Verdict]) -> Table:
    table = Table(caption=NOTE, caption_justify="left")
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if i < 2 else "right")
    for cells in verdict_cells(verdicts):
        table.add_row(*cells)
    return table


def _facts(
    judges: list[Judge], contest: Contest, accuracies: dict[str, Value],
    judging: args.JudgeArguments,
) -> list[str]:
    """Lines below the table: what answers look like, how good the judges are and what they cost."""
    lines = []
    for player, draws in contest.players.items():
        found = answer_statistics([answer for draw in draws for answer in draw])
        # Distinct n-grams fall with the number of answers: one draw of each.
        distinct = answer_statistics(draws[0])["distinct_3"]
        lines.append(
            f"{player}: {len(draws)} draws, {found['words_mean']:.1f} words an answer, "
            f"{found['share_ended']:.3f} end by themselves, distinct word triples of a draw "
            f"{distinct:.3f}"
        )
    lines.append(f"how often judges rank the {len(contest.asked.prompts):,} pairs of the "
                 f"{len(contest.prompts):,} prompts asked right:")
    for judge in judges:
        if judge.name in accuracies:
            line = f"{judge.name}: {format_value(accuracies[judge.name])}"
            if isinstance(judge, TrainedJudge):
                line += (f"; trained on {judge.num_pairs:,} other pairs, "
                         f"{judge.cross_validated_accuracy:.3f} of them in cross-validation")
            lines.append(line)
        if isinstance(judge, EndpointJudge):
            lines.append(_usage(judge, judging))
    return lines


def _usage(judge: EndpointJudge, judging: args.JudgeArguments) -> str:
    usage = judge.usage
    line = (
        f"{judge.name}: {usage.replies:,} replies, {usage.prompt_tokens:,} tokens read, "
        f"{usage.completion_tokens:,} written"
    )
    if judging.judge_input_price is not None:
        cost = usage.cost(judging.judge_input_price, judging.judge_output_price)
        line += f", cost {cost:.4f}"
    share = usage.as_dict()["share_for_first"]
    line += f"; the answer shown first wins {format_value(share)}"
    line += f"; {usage.disagreements:,} pairs judged otherwise in the other order"
    if usage.unread:
        line += f"; {usage.unread:,} verdicts could not be read"
    if usage.without_usage:
        line += f"; {usage.without_usage:,} replies did not say what they cost"
    return line


def _write(
    folder: Path, settings: dict[str, Any], verdicts: list[Verdict], accuracies: dict[str, Value],
    judges: list[Judge], contest: Contest, facts: list[str],
) -> None:
    found: dict[str, Any] = {
        "settings": settings, "verdicts": [verdict.as_dict() for verdict in verdicts],
        "accuracy_on_pairs": {
            name: accuracy.as_dict("accuracy") for name, accuracy in accuracies.items()
        },
        "answers": {
            player: answer_statistics([answer for draw in draws for answer in draw])
            for player, draws in contest.players.items()
        },
        "usage": {
            judge.name: judge.usage.as_dict()
            for judge in judges if isinstance(judge, EndpointJudge)
        },
        "versions": versions(), "devices": devices(),
    }
    write_json(folder / "judge.json", found)
    table = markdown_table(COLUMNS, verdict_cells(verdicts))
    write_report(folder / "judge.md", f"Judged: {settings['model_name_or_path']}", [
        Section("Verdicts", f"{table}\n\n{NOTE}"),
        Section("Answers and judges", markdown_list(facts)),
    ])
