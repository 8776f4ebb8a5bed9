"""``qadapter generate``: one prompt, a file of prompts, or a chat."""

from __future__ import annotations

import json
import sys
from typing import Any

import typer
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from qadapter.commands import arguments as args
from qadapter.commands.loading import load_model, say_left_out
from qadapter.commands.options import Group, command
from qadapter.console.environment import quiet_libraries
from qadapter.console.folders import check_output_file, telling_how_to_go_on
from qadapter.console.progress import progress_bar
from qadapter.console.terminal import Terminal
from qadapter.data import Prompt, read_prompts
from qadapter.errors import QAdapterError
from qadapter.evaluation.answers import generate_answers, with_system
from qadapter.evaluation.report import write_text
from qadapter.evaluation.token_rewards import best_of_n
from qadapter.policy.model import QAdapterModel
from qadapter.system.markup import visible

GROUPS = (
    Group(args.AdapterArguments, "Model", (
        "model_name_or_path", "base_model_name_or_path", "strength", "model_revision", "dtype",
        "trust_remote_code", "model_init_kwargs", "chat_template_path",
    )),
    Group(args.GenerateArguments, "Prompts", (
        "prompt", "prompts_file", "output_file", "system", "base_only",
    )),
    Group(args.GenerateArguments, "Sampling"),
)
_HELP = "/reset forgets the conversation, /quit ends it"


def app(show_hidden: bool = False) -> typer.Typer:
    return command(
        "generate", "Answer one prompt or a file of prompts, or chat.", GROUPS, run,
        show_hidden=show_hidden, argument="model_name_or_path",
    )


def run(
    model_args: args.AdapterArguments, options: args.GenerateArguments, given: set[str]
) -> None:
    """Answer, in one of three ways."""
    # Answers go to stdout, all else to stderr, so that answers can be piped.
    console = Terminal(stderr=True)
    if options.prompt is not None and not options.prompt.strip():
        raise QAdapterError("the prompt is empty")
    if options.prompt is not None and options.prompts_file is not None:
        raise QAdapterError("give either prompt or prompts_file, not both")
    if options.output_file is not None:
        if options.prompts_file is None:
            raise QAdapterError("output_file is for the answers to a prompts_file")
        options.output_file = str(check_output_file(options.output_file))
    sampling = _sampling(options, given)
    if options.best_of < 1:
        raise QAdapterError(f"best_of must be at least 1, got {options.best_of}")
    if options.best_of > 1 and (options.prompt is None or not options.do_sample):
        raise QAdapterError("best_of needs --prompt and --do_sample: it chooses among samples")
    prompts = read_prompts(options.prompts_file) if options.prompts_file is not None else []
    quiet_libraries()
    model, tokenizer = load_model(model_args, console)
    if options.base_only:
        if model_args.strength is not None:
            raise QAdapterError("give either base_only or strength, not both")
        if isinstance(model, QAdapterModel):
            model.set_policy(strength=0.0)
    if options.prompts_file is not None:
        _answer_file(model, tokenizer, prompts, options, sampling, console)
    elif options.prompt is not None:
        [prompt] = _asked([options.prompt], options, tokenizer)
        if options.best_of > 1:
            _best(model, tokenizer, prompt, options, sampling, console)
        else:
            _stream(model, tokenizer, prompt, options.seed, sampling)
    else:
        _chat(model, tokenizer, options, sampling, console)


def _sampling(options: args.GenerateArguments, given: set[str]) -> dict[str, Any]:
    """Arguments of ``generate``; sampling flags without sampling are refused, not ignored."""
    if options.max_new_tokens < 1:
        raise QAdapterError(f"max_new_tokens must be at least 1, got {options.max_new_tokens}")
    shared = {
        "max_new_tokens": options.max_new_tokens, "repetition_penalty": options.repetition_penalty,
    }
    names = ("temperature", "top_p", "top_k")
    if not options.do_sample:
        if unused := [name for name in names if name in given]:
            raise QAdapterError(f"{unused[0]} needs --do_sample: greedy answers do not use it")
        return shared
    if options.temperature <= 0:
        raise QAdapterError(f"temperature must be positive, got {options.temperature}")
    if not 0 < options.top_p <= 1:
        raise QAdapterError(f"top_p must lie in (0, 1], got {options.top_p}")
    return {**shared, "do_sample": True, **{name: getattr(options, name) for name in names}}


def _asked(
    prompts: list[Prompt], options: args.GenerateArguments, tokenizer: PreTrainedTokenizerBase
) -> list[Prompt]:
    if options.system is None:
        return prompts
    return with_system(prompts, options.system, tokenizer, "system")


def _stream(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, seed: int,
    sampling: dict[str, Any],
) -> str:
    """Print an answer as it comes; returns it whole."""
    streamer = Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    [answer] = generate_answers(
        model, tokenizer, [prompt], seed=seed, streamer=streamer, **sampling
    )
    return answer.text


class Streamer(TextStreamer):
    """Prints text as it comes. A terminal shows what is in an answer and obeys none of it."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(_for_stdout(text), stream_end)


def _for_stdout(text: str) -> str:
    """As it is, where it is piped."""
    return visible(text) if sys.stdout.isatty() else text


def _best(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt,
    options: args.GenerateArguments, sampling: dict[str, Any], console: Console,
) -> None:
    """Print the best of several answers, and what all of them are worth."""
    found = best_of_n(
        model, tokenizer, prompt, options.best_of, batch_size=options.batch_size,
        seed=options.seed, **sampling,
    )
    worth = ", ".join(f"{candidate.reward:+.2f}" for candidate in found)
    console.print(f"R of {len(found)} answers, the best is printed: {worth}", highlight=False)
    print(_for_stdout(found[0].answer.text))


def _answer_file(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt],
    options: args.GenerateArguments, sampling: dict[str, Any], console: Console,
) -> None:
    asked = _asked(prompts, options, tokenizer)
    say_left_out(tokenizer, asked, console)
    with progress_bar(console, "answering", "answers") as progress:
        answers = generate_answers(
            model, tokenizer, asked,
            batch_size=options.batch_size, seed=options.seed, progress=progress, **sampling,
        )
    lines = [
        json.dumps({**(prompt if isinstance(prompt, dict) else {"prompt": prompt}),
                    "answer": answer.text, "ended": answer.ended,
                    "tokens": len(answer.token_ids)}, ensure_ascii=False)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    text = "".join(line + "\n" for line in lines)
    if options.output_file is None:
        sys.stdout.write(_for_stdout(text))
    else:
        with telling_how_to_go_on(options.output_file, "run it again"):
            write_text(options.output_file, text)
        console.print(f"wrote {len(lines):,} answers to {options.output_file}", highlight=False)


def _chat(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: args.GenerateArguments,
    sampling: dict[str, Any], console: Console,
) -> None:
    if not tokenizer.chat_template:
        raise QAdapterError(
            "the base has no chat template: pass --prompt or --prompts_file, or --chat_template"
        )
    console.print(_HELP)
    messages: list[dict] = []
    seed = options.seed
    while True:
        try:
            line = console.input(Text("> ", style="bold")).strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line == "/reset":
            messages = []
        elif line.startswith("/"):
            console.print(_HELP)
        elif line:
            messages.append({"role": "user", "content": line})
            [prompt] = _asked([messages], options, tokenizer)
            answer = _stream(model, tokenizer, prompt, seed, sampling)
            messages.append({"role": "assistant", "content": answer})
            seed += 1  # a turn does not repeat the draws of the one before
