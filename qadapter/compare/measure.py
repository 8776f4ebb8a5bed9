"""What a finished run is measured by: ``qadapter.evaluation``, at every setting of the dial.

Preference accuracy (new and old data), retention on unrelated texts and on the base's own answers,
and, by two judges trained on pairs no policy saw, gain and win rate of sampled answers over the
base's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from qadapter.compare.config import Row
from qadapter.compare.data import Texts
from qadapter.compare.kinds import Interpolated, Prompted
from qadapter.compare.methods import interpolated
from qadapter.compare.workbench import Workbench
from qadapter.data import PromptEncoder
from qadapter.evaluation import (
    answer_statistics,
    evaluate_preferences,
    evaluate_retention,
)
from qadapter.evaluation.answers import with_system
from qadapter.evaluation.judges import judged_gain, score_draws
from qadapter.evaluation.judges.contest import texts as texts_of
from qadapter.policy.model import QAdapterModel

Dial = Callable[[QAdapterModel, float], AbstractContextManager[float]]
"""A model and a setting → inside, the model so turned; gives the strength to decode it with."""
LEAST_ACCURACY = 0.6
"""A judge that ranks fewer of the split's own held-out pairs right is used for no gain and no win
rate: it is too near to a coin."""
_PLAIN = ("reliability_bins",)
"""Of ``PreferenceResult.as_dict``, what is too much for a table of many runs."""


def trusted(judge: dict[str, Any]) -> bool:
    """Whether a judge is used, by its accuracy on the split's own pairs (as JSON types)."""
    accuracy = judge["accuracy"]
    return accuracy is not None and accuracy >= LEAST_ACCURACY


def probe(bench: Workbench, model: QAdapterModel) -> dict[str, Any]:
    """Retention alone, on the first of the texts: what is followed during training."""
    name, texts = next(iter(bench.texts.items()))
    return {"texts": name, **_retention(bench, model, texts, 1.0)}


def evaluate_row(
    bench: Workbench, model: QAdapterModel, row: Row, split: str, seed: int
) -> dict[str, Any]:
    """All measures of one run: the first seeds of a method at every setting of its dial, other
    seeds, controls and the rows of a sweep at their own alone."""
    spec = bench.config.evaluation
    if isinstance(row.method, Prompted):
        return evaluate(bench, model, split, [0.0], seed, system=row.method.system)
    has_dial = row.sweep is None and row.seeds.index(seed) < spec.dial_seeds
    if isinstance(row.method, Interpolated):
        weights = sorted({*row.method.weights, 1.0}) if has_dial else [1.0]
        return evaluate(bench, model, split, weights, seed, dial=interpolated)
    if not (has_dial and row.method.trained):
        kinds = ("new", "old") if row.sweep is None else ("new",) if spec.ask_sweeps else ()
        return evaluate(bench, model, split, [1.0], seed, asked=kinds)
    return evaluate(bench, model, split, sorted({*spec.strengths, 1.0}), seed)


def evaluate(
    bench: Workbench, model: QAdapterModel, split: str, strengths: list[float], seed: int, *,
    asked: Collection[str] = ("new", "old"), system: str | None = None, dial: Dial | None = None,
) -> dict[str, Any]:
    """All measures of one model, as JSON types.

    Args:
        split: "validation" or "test".
        strengths: settings of the dial; 0 is the base.
        seed: of the sampled answers.
        asked: kinds of prompts to sample answers to; old ones only where the model is what was
            trained or the base, since at no other setting of the dial they are shown.
        system: a system message to answer with.
        dial: what a setting is of; none for the strength.
    """
    spec = bench.config.evaluation
    found: dict[str, Any] = {"split": split, "preferences": {}, "dial": []}
    # At strength 1, that of an untrained adapter included: its rewards are 0 to the last digit.
    for kind, data in bench.kinds.items():
        result = evaluate_preferences(
            model, getattr(data, split).tokens, batch_size=spec.batch_size, strength=1.0,
        )
        found["preferences"][kind] = {
            **{k: v for k, v in result.as_dict().items() if k not in _PLAIN},
            "prompt_ids": result.pairs.prompt_id.tolist(),
            "reward_margins": _short(result.pairs.margin("reward")),
        }
        if kind == "old":
            found["preferences"][kind]["policy_margins"] = _short(
                result.pairs.margin("policy_logp", per_token=True)
            )
    for setting in strengths:
        turned = nullcontext(setting) if dial is None else dial(model, setting)
        with turned as strength:
            found["dial"].append({
                "strength": setting,
                "retention": {
                    name: _retention(bench, model, texts, strength)
                    for name, texts in bench.texts.items()
                },
                "answers": {
                    kind: _answers(bench, model, kind, split, strength, seed, system)
                    for kind in bench.kinds if spec.prompts > 0 and kind in asked
                    and (kind == "new" or setting in (0.0, 1.0))
                },
            })
    return found


def _retention(
    bench: Workbench, model: QAdapterModel, texts: Texts, strength: float
) -> dict[str, Any]:
    result = evaluate_retention(
        model, texts.texts, bench.tokenizer, prompt_lengths=texts.prompt_lengths,
        strength=strength, batch_size=bench.config.evaluation.batch_size,
    )
    return {**result.as_dict(), "kl_by_text": _short(result.texts.kl_base_policy)}


def _short(values: np.ndarray) -> list[float | None]:
    """For what is kept pair by pair, to compare two runs with each other: 6 digits will do. None
    for what is no number."""
    return [float(f"{x:.6g}") if math.isfinite(x) else None for x in values]


def _answers(
    bench: Workbench, model: QAdapterModel, kind: str, split: str, strength: float, seed: int,
    system: str | None,
) -> dict[str, Any]:
    """Sampled answers to held-out prompts of one kind, beside the base's."""
    spec = bench.config.evaluation
    count = spec.old_prompts if kind == "old" and spec.old_prompts else spec.prompts
    names, prompts = getattr(bench.kinds[kind], split).prompts(count, spec.seed)
    base = bench.base_answers(f"{split}-{kind}", prompts, spec.base_samples, spec.seed)
    asked = prompts if system is None else with_system(prompts, system, bench.tokenizer, "system")
    own = bench.sample(model, asked, spec.samples, seed=1000 + seed, strength=strength)
    encoded = list(map(PromptEncoder(bench.tokenizer), prompts))

    def divergence(draws: list) -> dict[str, Any]:
        result = evaluate_retention(
            model, [p + a.token_ids for draw in draws
                    for p, a in zip(encoded, draw, strict=True)],
            prompt_lengths=[len(p) for p in encoded] * len(draws), max_length=10**9,
            clusters=names * len(draws), strength=strength, batch_size=spec.batch_size,
        ).as_dict()
        return {k: result[k] for k in result if k.startswith("kl_")}

    judged = {}
    for judge in bench.judges[kind]:
        ours = score_draws(judge, prompts, texts_of(own))
        theirs = bench.base_scores(judge, f"{split}-{kind}", prompts, base)
        result = judged_gain(ours, theirs, clusters=names)
        judged[judge.name] = {**result.as_dict(), "gain_by_prompt": _short(result.gain_P)}
    return {
        "judged": judged,
        # With a system message it is another distribution than any the model is compared with.
        "kl_of_own_answers":
            None if system is not None else divergence(own)["kl_policy_base_per_token"],
        "kl_on_base_answers": divergence(base[:1])["kl_per_token"],
        "statistics": answer_statistics([a for draw in own for a in draw]),
        "statistics_base": answer_statistics([a for draw in base for a in draw]),
    }
