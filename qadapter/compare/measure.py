"""What a finished run is measured by: ``qadapter.evaluation``, at every setting of the dial.

Preference accuracy (new and old data), retention on unrelated texts and on the base's own answers,
and, by two judges trained on pairs no policy saw, gain and win rate of sampled answers over the
base's.
"""

from __future__ import annotations

from typing import Any

from qadapter.compare.config import Row
from qadapter.compare.workbench import Workbench
from qadapter.evaluation import (
    answer_statistics,
    evaluate_preferences,
    evaluate_retention,
)
from qadapter.evaluation.answers import encode_prompt
from qadapter.evaluation.judges import judged_gain, score_draws
from qadapter.model import QAdapterModel

_PLAIN = ("reliability_bins",)
"""Of ``PreferenceResult.as_dict``, what is too much for a table of many runs."""


def probe(bench: Workbench, model: QAdapterModel) -> dict[str, Any]:
    """Retention alone, on the first of the texts: what is followed during training."""
    name, texts = next(iter(bench.texts.items()))
    found = evaluate_retention(
        model, texts, bench.tokenizer, strength=1.0,
        batch_size=bench.config.evaluation.batch_size, num_resamples=200,
    )
    return {"texts": name, **found.as_dict()}


def evaluate(
    bench: Workbench, model: QAdapterModel, split: str, strengths: list[float], seed: int
) -> dict[str, Any]:
    """All measures of one model, as JSON types.

    Args:
        split: "validation" or "test".
        strengths: settings of the dial; 0 is the base.
        seed: of the sampled answers.
    """
    spec = bench.config.evaluation
    found: dict[str, Any] = {"split": split, "preferences": {}, "dial": []}
    # At strength 1, that of an untrained adapter included: its rewards are 0 to the last digit.
    for kind, data in bench.kinds.items():
        result = evaluate_preferences(
            model, getattr(data, split).tokens, batch_size=spec.batch_size,
            strength=1.0,
        ).as_dict()
        found["preferences"][kind] = {k: v for k, v in result.items() if k not in _PLAIN}
    for strength in strengths:
        found["dial"].append({
            "strength": strength,
            "retention": {
                name: evaluate_retention(
                    model, texts, bench.tokenizer, strength=strength, batch_size=spec.batch_size
                ).as_dict()
                for name, texts in bench.texts.items()
            },
            "answers": {
                kind: _answers(bench, model, kind, split, strength, seed) for kind in bench.kinds
            },
        })
    return found


def _answers(
    bench: Workbench, model: QAdapterModel, kind: str, split: str, strength: float, seed: int
) -> dict[str, Any]:
    """Sampled answers to held-out prompts of one kind, beside the base's."""
    spec = bench.config.evaluation
    names, prompts = getattr(bench.kinds[kind], split).prompts(spec.prompts, spec.seed)
    base = bench.base_answers(f"{split}-{kind}", prompts, spec.base_samples, spec.seed)
    own = bench.sample(model, prompts, spec.samples, seed=1000 + seed, strength=strength)
    encoded = [encode_prompt(bench.tokenizer, prompt) for prompt in prompts]

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
        ours = score_draws(judge, prompts, [[a.text for a in draw] for draw in own])
        theirs = bench.base_scores(judge, f"{split}-{kind}", prompts, base)
        judged[judge.name] = judged_gain(ours, theirs, clusters=names).as_dict()
    return {
        "judged": judged,
        "kl_of_own_answers": divergence(own)["kl_policy_base_per_token"],
        "kl_on_base_answers": divergence(base[:1])["kl_per_token"],
        "statistics": answer_statistics([a for draw in own for a in draw]),
        "statistics_base": answer_statistics([a for draw in base for a in draw]),
    }


def strengths_of(bench: Workbench, row: Row, seed: int) -> list[float]:
    """Settings of the dial that a run is measured at: 1 alone for the rows of a sweep, and for all
    but the first seeds of a method."""
    spec = bench.config.evaluation
    if row.sweep is not None or row.seeds.index(seed) >= spec.dial_seeds:
        return [1.0]
    return sorted({*spec.strengths, 1.0})
