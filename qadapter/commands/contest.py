"""The two halves of ``qadapter judge``: drawing answers, and letting judges compare them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qadapter.commands import arguments as args
from qadapter.commands.loading import load_model, say_left_out
from qadapter.console.progress import progress_bar, saying
from qadapter.data import (
    Prompt,
    load_preferences,
    set_chat_template,
    split_by_prompt,
    without_prompts,
)
from qadapter.data.templates import default_of
from qadapter.errors import QAdapterError
from qadapter.evaluation.answers import with_system
from qadapter.evaluation.judges import (
    HiddenStateJudge,
    Judge,
    PreferenceTexts,
    RewardJudge,
    WordPresenceJudge,
    pair_accuracy,
    preference_texts,
)
from qadapter.evaluation.judges.contest import AnswerStore, Draws, Verdict, hold_contests
from qadapter.evaluation.judges.endpoint import EndpointJudge
from qadapter.evaluation.judges.endpoint_prompt import PROMPT_FILE, JudgePrompt
from qadapter.evaluation.judges.reward_model import SequenceClassificationJudge
from qadapter.evaluation.report import Value
from qadapter.policy.model import QAdapterModel

ANSWERS, JUDGEMENTS = "answers.jsonl", "judgements.jsonl"
NUM_RESAMPLES = 2000


class Contest(NamedTuple):
    """What the judges see."""

    asked: PreferenceTexts
    """Pairs whose prompts are answered."""
    prompts: list[Prompt]
    prompt_ids: list[str]
    players: dict[str, Draws]
    """The opponent comes last."""


def split_pairs(
    pairs: Dataset, data: args.JudgeDataArguments, judging: args.JudgeArguments, seed: int,
    console: Console,
) -> tuple[Dataset, Dataset | None]:
    """(pairs whose prompts are asked, pairs to train judges on); they share no prompt."""
    if judging.judge_fraction:
        return split_by_prompt(pairs, float(judging.judge_fraction), seed)
    if judging.judge_dataset_name is None:
        return pairs, None
    judge_pairs = load_preferences(
        judging.judge_dataset_name, split=data.dataset_split, **data.load_kwargs()
    )
    kept = without_prompts(judge_pairs, pairs["prompt_id"])
    if len(kept) == 0:
        raise QAdapterError("every prompt of judge_dataset_name is also asked: no judge is fair")
    if len(kept) < len(judge_pairs):
        console.print(
            f"left out of the judges' training: {len(judge_pairs) - len(kept):,} pairs whose "
            "prompt is asked", highlight=False,
        )
    return pairs, kept


def _load_opponent(
    model_args: args.AdapterArguments, opponent: args.OpponentArguments,
    tokenizer: PreTrainedTokenizerBase, console: Console,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Asked with the template of the model (`tokenizer`'s), where it has none."""
    model, own = load_model(args.AdapterArguments(
        model_name_or_path=opponent.opponent, strength=opponent.opponent_strength,
        dtype=model_args.dtype, trust_remote_code=model_args.trust_remote_code,
        chat_template_path=model_args.chat_template_path,
    ), console)
    template = default_of(tokenizer.chat_template)
    if template and not own.chat_template:
        saying(console)(set_chat_template(own, template, "the model's own"))
    return model, own


def draw_answers(
    model_args: args.AdapterArguments, opponent: args.OpponentArguments, pairs: Dataset,
    num_prompts: int, draws: args.DrawArguments, folder: Path | None, console: Console,
) -> tuple[Contest, PreTrainedModel, PreTrainedTokenizerBase]:
    """Answers of all players, and the model and its tokenizer.

    Args:
        pairs: whose prompts may be asked.
        folder: where draws are kept.
    """
    model, tokenizer = load_model(model_args, console)
    other = None
    if opponent.opponent is not None:
        other = _load_opponent(model_args, opponent, tokenizer, console)
    if other is None and not isinstance(model, QAdapterModel):
        raise QAdapterError(
            f"{model_args.model_name_or_path} is no adapter and has no base to beat: name an "
            "--opponent"
        )
    asked, chosen = _choose(preference_texts(pairs, tokenizer), num_prompts, draws.seed)
    prompts = [asked.prompts[i] for i in chosen]
    say_left_out(tokenizer, prompts, console)
    store = AnswerStore(None if folder is None else folder / ANSWERS, prompts)
    options = {
        "max_new_tokens": draws.max_new_tokens, "temperature": draws.temperature,
        "top_p": draws.top_p, "top_k": 0, "batch_size": draws.batch_size,
    }

    def draw(player: str, count: int, model_and_tokenizer: tuple, strength: float | None,
             asked: list[Prompt], seed: int) -> Draws:
        with progress_bar(console, f"answers: {player}", "answers") as progress:
            return store.draw(player, count, *model_and_tokenizer, asked, seed=seed,
                              strength=strength, progress=progress, **options)

    name, rival = "customised", "base"
    rival_strength: float | None = 0.0
    if other is not None:
        name, rival = model_args.model_name_or_path, f"{opponent.opponent} (opponent)"
        rival_strength = None
    rivals = other or (model, tokenizer)
    players = {name: draw(name, draws.draws, (model, tokenizer), None, prompts, draws.seed)}
    # Seeds of their own, far apart: else equal policies would draw equal answers.
    if draws.control_system is not None:
        player = f"{rival}, prompted"
        players[player] = draw(
            player, draws.draws, rivals, rival_strength,
            with_system(prompts, draws.control_system, rivals[1], "control_system"),
            draws.seed + 2000,
        )
    players[rival] = draw(
        rival, draws.opponent_draws, rivals, rival_strength, prompts, draws.seed + 1000
    )
    contest = Contest(asked, prompts, [asked.prompt_ids[i] for i in chosen], players)
    return contest, model, tokenizer


def _choose(
    texts: PreferenceTexts, count: int, seed: int
) -> tuple[PreferenceTexts, list[int]]:
    """(pairs on up to ``count`` prompts drawn at random, the first pair of each prompt)."""
    names = sorted(set(texts.prompt_ids))
    drawn = set(random.Random(seed).sample(names, min(count, len(names))))
    kept = [i for i, name in enumerate(texts.prompt_ids) if name in drawn]
    asked = PreferenceTexts(*([column[i] for i in kept] for column in texts))
    first = {name: i for i, name in reversed(list(enumerate(asked.prompt_ids)))}
    return asked, sorted(first.values())


# --- judges -------------------------------------------------------------------------------------


def named_judges(
    judging: args.JudgeArguments, folder: Path | None, batch_size: int
) -> list[Judge]:
    """Those that need no training; made first, so that a wrong name costs no draws."""
    found: list[Judge] = []
    if judging.reward_model is not None:
        found.append(SequenceClassificationJudge(judging.reward_model, batch_size=batch_size))
    if judging.judge_model is not None:
        found.append(EndpointJudge(
            judging.judge_model, base_url=judging.judge_url,
            judgements_file=None if folder is None else folder / JUDGEMENTS,
            prompt=JudgePrompt.read(judging.judge_prompt_file or PROMPT_FILE),
            concurrency=judging.judge_concurrency,
        ))
    return found


def train_judges(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: PreferenceTexts,
    batch_size: int, console: Console,
) -> list[Judge]:
    """Both judges that learn from preference pairs."""
    found = [HiddenStateJudge(model, tokenizer, batch_size=batch_size), WordPresenceJudge()]
    for judge in found:
        with progress_bar(console, f"training: {judge.name}", "answers") as progress:
            judge.fit(texts, progress)
    return found


def hear(
    judges: list[Judge], contest: Contest, seed: int, console: Console
) -> tuple[list[Verdict], dict[str, Value]]:
    """(what the judges say, how often those that give scores rank the asked pairs right)."""
    verdicts, accuracies = [], {}
    for judge in judges:
        with progress_bar(console, f"judging: {judge.name}", "answers") as progress:
            verdicts += hold_contests(
                judge, contest.prompts, contest.players, num_resamples=NUM_RESAMPLES, seed=seed,
                clusters=contest.prompt_ids, progress=progress,
            )
            if isinstance(judge, RewardJudge):
                accuracies[judge.name] = pair_accuracy(
                    judge, contest.asked, num_resamples=NUM_RESAMPLES, seed=seed, progress=progress
                )
    return verdicts, accuracies
