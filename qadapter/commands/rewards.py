"""``qadapter rewards``: what an adapter rewards, token by token, as a page."""

from __future__ import annotations

from dataclasses import dataclass, field

import typer
from transformers import PreTrainedTokenizerBase

from qadapter.commands import arguments as args
from qadapter.commands.loading import load_model
from qadapter.commands.options import Group, command
from qadapter.console.environment import quiet_libraries
from qadapter.console.folders import check_output_file, telling_how_to_go_on
from qadapter.console.progress import progress_bar
from qadapter.console.terminal import Terminal
from qadapter.data import as_preferences, load_preferences, tokenize_preferences
from qadapter.errors import QAdapterError
from qadapter.evaluation.html_page import PAGE_BEGINS
from qadapter.evaluation.rewards_page import write_rewards_page
from qadapter.evaluation.token_rewards import (
    RewardedPair,
    reward_answers,
    reward_pairs,
    summarize,
)
from qadapter.policy.model import QAdapterModel


@dataclass
class RewardsArguments(args.DataArguments):
    """What to score, and the page."""

    prompt: str | None = field(default=None, metadata={
        "help": "One prompt, with --answer; instead of dataset_name."
    })
    answer: str | None = field(default=None, metadata={"help": "Its answer."})
    rejected_answer: str | None = field(default=None, metadata={
        "help": "Another answer to it, to stand beside the first."
    })
    dataset_split: str = field(default="train", metadata={
        "help": "Split to score (a single file is 'train')."
    })
    max_pairs: int = field(default=50, metadata={"help": "Pairs on the page, the first ones."})
    max_length: int | None = field(default=1024, metadata={
        "help": "Most tokens of prompt and answer; none for no limit."
    })
    batch_size: int = field(default=8, metadata={"help": "Answers scored at once."})
    output_file: str = field(default="rewards.html", metadata={"help": "The page."})
    overwrite_output_file: bool = field(default=False, metadata={
        "help": "Replace the page that is there."
    })


GROUPS = (
    Group(args.AdapterArguments, "Model", (
        "model_name_or_path", "base_model_name_or_path", "model_revision", "dtype",
        "trust_remote_code", "model_init_kwargs", "chat_template_path",
    )),
    Group(RewardsArguments, "One prompt", ("prompt", "answer", "rejected_answer")),
    Group(RewardsArguments, "Data", (
        "dataset_name", "dataset_config", "dataset_split", "columns", "domain", "rejected_domains",
        "max_pairs", "max_length", "batch_size",
    )),
    Group(RewardsArguments, "Output", ("output_file", "overwrite_output_file")),
)


def app(show_hidden: bool = False) -> typer.Typer:
    return command(
        "rewards",
        "Score preference pairs or one answer token by token, and write a page that colors every "
        "token by its reward. One file, no network.",
        GROUPS, run, without=("max_rows",), show_hidden=show_hidden, argument="model_name_or_path",
    )


def run(model_args: args.AdapterArguments, options: RewardsArguments, given: set[str]) -> None:
    """Score, write the page, say what it shows."""
    console = Terminal()
    if "model_name_or_path" not in given:
        raise QAdapterError("rewards needs --model_name_or_path")
    _check(options)
    page = (
        check_output_file(options.output_file, replaces=PAGE_BEGINS)
        if options.overwrite_output_file else
        check_output_file(
            options.output_file, way_out="choose another, or --overwrite_output_file"
        )
    )
    quiet_libraries()
    preferences = None
    if options.dataset_name is not None:
        preferences = load_preferences(
            options.dataset_name, split=options.dataset_split,
            **options.load_kwargs() | {"limit": options.max_pairs},
        )
        preferences = preferences.select(range(min(options.max_pairs, len(preferences))))
    model, tokenizer = load_model(model_args, console)
    if not isinstance(model, QAdapterModel):
        raise QAdapterError(f"{model_args.model_name_or_path} is no adapter: it has no rewards")
    if preferences is None:
        pairs = [_one_prompt(model, tokenizer, options)]
    else:
        dataset, report = tokenize_preferences(
            preferences, tokenizer, max_length=options.max_length
        )
        console.print(report.table())
        with progress_bar(console, "scoring", "answers") as progress:
            pairs = reward_pairs(
                model, dataset, tokenizer, batch_size=options.batch_size, progress=progress
            )
    facts = {
        "adapter": model_args.model_name_or_path, "base": model.base_identity.name,
        "data": options.dataset_name or "one prompt",
        "objective": ", ".join(
            f"{name} {getattr(model.objective, name)}"
            for name in ("alpha_0", "alpha_tilde", "gamma", "bootstrap")
        ),
    }
    with telling_how_to_go_on(page, "run it again"):
        write_rewards_page(page, pairs, "Rewards, token by token", facts)
    found = summarize(pairs)
    if found["pairs"] > 1:
        console.print(
            f"{found['pairs']:,} pairs: the chosen answer has the higher R in "
            f"{found['accuracy']:.1%}, by {found['margin']:+.3f} nats on average", highlight=False,
        )
    for name, answer in pairs[0].answers.items() if preferences is None else ():
        console.print(f"{name}: R = {answer.total:+.3f}", highlight=False)
    console.print(f"wrote {page}", highlight=False)


def _check(options: RewardsArguments) -> None:
    if (options.dataset_name is None) == (options.prompt is None):
        raise QAdapterError("rewards needs either --dataset_name, or --prompt and --answer")
    if options.prompt is not None and options.answer is None:
        raise QAdapterError("prompt needs --answer")
    for name in ("answer", "rejected_answer"):
        if options.dataset_name is not None and getattr(options, name) is not None:
            raise QAdapterError(f"{name} is for --prompt")
    for name in ("max_pairs", "batch_size"):
        if getattr(options, name) < 1:
            raise QAdapterError(f"{name} must be at least 1, got {getattr(options, name)}")


def _one_prompt(
    model: QAdapterModel, tokenizer: PreTrainedTokenizerBase, options: RewardsArguments
) -> RewardedPair:
    """Tokenized as training tokenizes a pair, so that the end of turn is scored too."""
    texts = {"chosen": options.answer, "rejected": options.rejected_answer}
    names = ["chosen", "rejected"]
    if options.rejected_answer is None:
        names = ["answer"]
        # Tokenization takes pairs; this partner is not looked at.
        texts["rejected"] = options.answer + " ?"
    if not all(text.strip() for text in texts.values()) or not options.prompt.strip():
        raise QAdapterError("prompt and answers must not be empty")
    if texts["chosen"] == texts["rejected"]:
        raise QAdapterError("answer and rejected_answer are the same")
    role = (lambda role, text: [{"role": role, "content": text}]) if tokenizer.chat_template else (
        lambda role, text: text
    )
    row = {"prompt": role("user", options.prompt)} | {
        side: role("assistant", text) for side, text in texts.items()
    }
    [tokens] = tokenize_preferences(
        as_preferences([row]), tokenizer, max_length=options.max_length
    ).dataset
    answers = reward_answers(
        model, tokenizer, tokens["prompt_ids"],
        [tokens[f"{side}_ids"] for side in ("chosen", "rejected")[: len(names)]],
    )
    return RewardedPair(
        tokenizer.decode(tokens["prompt_ids"]), dict(zip(names, answers, strict=True))
    )
