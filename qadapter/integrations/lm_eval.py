"""Tasks of lm-evaluation-harness on a customised policy: ``pip install 'qadapter[lm-eval]'``.

The harness takes model objects, and ours decodes its policy in ``forward`` and ``generate`` alike:
likelihood and generative tasks both score the policy, at the strength it is set to.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qadapter.errors import QAdapterError
from qadapter.evaluation.answers import at_strength
from qadapter.evaluation.bootstrap import ClusterBootstrap, Estimate
from qadapter.evaluation.report import Row
from qadapter.evaluation.scoring import evaluating
from qadapter.policy.model import QAdapterModel

_Z95 = 1.959963984540054


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task."""

    task: str
    metric: str
    """The harness's name, with the filter where it has one: ``exact_match (strict-match)``."""
    estimate: Estimate
    """± 1.96 standard errors, the harness's own."""
    num_samples: int | None
    values: dict[tuple[str, int], float]
    """(hash of the example, how often it came before) → the metric there; empty for groups of
    tasks and for metrics that are no mean over examples."""


@dataclass(frozen=True)
class TaskComparison:
    """A metric of the base and of the customised policy on the same examples."""

    task: str
    metric: str
    base: Estimate
    customised: Estimate | None
    change: Estimate | None
    """customised − base; paired by example, bootstrap over examples. None where the metric has no
    value of its own at each example."""
    num_samples: int | None

    def as_dict(self) -> dict[str, Any]:
        """JSON types; intervals under ``<name>_ci``."""
        found: dict[str, Any] = {
            "task": self.task, "metric": self.metric, "num_samples": self.num_samples,
        }
        for name in ("base", "customised", "change"):
            estimate = getattr(self, name)
            found |= {} if estimate is None else estimate.as_dict(name)
        return found


def evaluate_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str], *,
    strength: float | None = None, limit: float | None = None, num_fewshot: int | None = None,
    batch_size: int = 8, include_path: str | Path | None = None,
    apply_chat_template: bool = False, bootstrap_iters: int = 2000,
) -> list[TaskScore]:
    """Run tasks on a model.

    Args:
        model: a ``QAdapterModel``, or a plain causal LM.
        tasks: names, groups or tags that the harness knows or finds in ``include_path``.
        strength: dial of the policy; default: as the model is set.
        limit: examples of each task; below 1: a share of them.
        num_fewshot: worked examples in the prompt; default: the task's.
        include_path: a folder of task files (YAML) of one's own.
        apply_chat_template: put prompts through the chat template; off, as in the harness.
        bootstrap_iters: behind the standard errors of metrics that are no means.

    Raises:
        QAdapterError: lm-eval is not installed; an unknown task; data that can't be loaded.
    """
    harness = import_harness()
    manager = _task_manager(harness, tasks, _folder(include_path))
    with evaluating(model), at_strength(model, strength):
        wrapped = harness.models.huggingface.HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size
        )
        try:
            found = harness.simple_evaluate(
                model=wrapped, tasks=list(tasks), task_manager=manager, limit=_limit(limit),
                num_fewshot=num_fewshot, batch_size=batch_size, bootstrap_iters=bootstrap_iters,
                apply_chat_template=apply_chat_template,
            )
        except OSError as error:  # what datasets and the hub raise is one
            raise QAdapterError(
                f"lm_eval: the data of {', '.join(tasks)} can't be loaded: {error}"
            ) from error
    return _scores(found)


def compare_tasks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str], *,
    num_resamples: int = 2000, seed: int = 0, **options: Any,
) -> list[TaskComparison]:
    """``evaluate_tasks`` of the base beside the customised policy; a plain model is its own base.

    Args:
        num_resamples, seed: of the bootstrap behind ``change``.
        options: of ``evaluate_tasks``, without ``strength``.
    """
    options = {"bootstrap_iters": num_resamples} | options
    if not isinstance(model, QAdapterModel):
        return [
            TaskComparison(s.task, s.metric, s.estimate, None, None, s.num_samples)
            for s in evaluate_tasks(model, tokenizer, tasks, **options)
        ]
    base = evaluate_tasks(model, tokenizer, tasks, strength=0.0, **options)
    customised = evaluate_tasks(model, tokenizer, tasks, **options)
    return [
        TaskComparison(
            before.task, before.metric, before.estimate, after.estimate,
            _change(before, after, num_resamples, seed), before.num_samples,
        )
        for before, after in zip(base, customised, strict=True)
    ]


def task_rows(comparisons: Sequence[TaskComparison]) -> list[Row]:
    """Rows for the tables of a report."""
    rows = []
    for found in comparisons:
        name = f"{found.task}: {found.metric}"
        rows.append(Row(name, found.base, found.customised))
        if found.change is not None:
            rows.append(Row(f"{name}, change", None, found.change))
    return rows


def import_harness() -> Any:
    """The module ``lm_eval``, with less to say.

    Raises:
        QAdapterError: it is not installed.
    """
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise QAdapterError(
            f"lm_eval needs lm-evaluation-harness: pip install 'qadapter[lm-eval]' ({error})"
        ) from error
    # It warns about every default that it sets.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return lm_eval


def _task_manager(harness: Any, tasks: Sequence[str], folder: str | None) -> Any:
    if not tasks:
        raise QAdapterError("lm_eval: no task was named")
    # Reading the harness's own 15,000 files takes seconds; one's own tasks need none of them.
    for include_defaults in (False, True):
        manager = harness.tasks.TaskManager(
            include_path=folder, include_defaults=include_defaults
        )
        unknown = [name for name in tasks if not manager.match_tasks([name])]
        if not unknown:
            return manager
    raise QAdapterError(f"lm_eval: no task called {unknown[0]!r}; `lm_eval ls tasks` lists them")


def _folder(include_path: str | Path | None) -> str | None:
    if include_path is None:
        return None
    folder = Path(include_path).expanduser()
    if not folder.is_dir():
        raise QAdapterError(f"lm_eval_include_path {folder} is no folder")
    return str(folder)


def _limit(limit: float | None) -> float | None:
    if limit is None:
        return None
    if not limit > 0 or (limit > 1 and limit != int(limit)):
        raise QAdapterError(
            f"lm_eval_limit must be a number of examples, or a share below 1, got {limit}"
        )
    return int(limit) if limit >= 1 else limit


def _scores(found: dict[str, Any]) -> list[TaskScore]:
    """The harness's ``results``: task → {"metric,filter": value, "metric_stderr,filter": …}."""
    scores = []
    for task, results in found["results"].items():
        for key, value in results.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = results.get(f"{metric}_stderr,{filter_name}")
            width = _Z95 * error if isinstance(error, int | float) else float("nan")
            samples = [
                sample for sample in found["samples"].get(task, ())
                if sample["filter"] == filter_name
            ]
            scores.append(TaskScore(
                task=results.get("alias", task).strip(" -"),
                metric=metric if filter_name == "none" else f"{metric} ({filter_name})",
                estimate=Estimate(*map(float, (value, value - width, value + width))),
                num_samples=found["n-samples"].get(task, {}).get("effective"),
                values=_values(samples, metric, value),
            ))
    return scores


def _values(
    samples: Sequence[dict[str, Any]], metric: str, reported: float
) -> dict[tuple[str, int], float]:
    """Of every example; none for a metric that is no mean over them (a perplexity's are
    log-likelihoods)."""
    values: dict[tuple[str, int], float] = {}
    seen: Counter[str] = Counter()
    for sample in samples:
        value, name = sample.get(metric), sample["doc_hash"]
        if not isinstance(value, int | float):
            return {}
        values[name, seen[name]] = float(value)
        seen[name] += 1
    if not values or not math.isclose(
        sum(values.values()) / len(values), reported, rel_tol=1e-6, abs_tol=1e-9
    ):
        return {}
    return values


def _change(
    before: TaskScore, after: TaskScore, num_resamples: int, seed: int
) -> Estimate | None:
    if not before.values or before.values.keys() != after.values.keys():
        return None
    names = list(before.values)
    bootstrap = ClusterBootstrap(
        [name for name, _ in names], num_resamples=num_resamples, seed=seed
    )
    return bootstrap.mean([after.values[name] - before.values[name] for name in names])
