"""What ``eval`` asks about knowledge: benchmarks, the exemplar probe; base beside policy."""

from __future__ import annotations

from typing import Any, NamedTuple

from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qadapter.commands.arguments import KnowledgeArguments, MeasureArguments
from qadapter.console.progress import progress_bar
from qadapter.errors import QAdapterError
from qadapter.evaluation import RetentionResult, evaluate_retention
from qadapter.evaluation.report import Row, retention_rows
from qadapter.integrations.exemplars import evaluate_exemplars, load_exemplars, worked_solutions
from qadapter.integrations.lm_eval import (
    TaskComparison,
    compare_tasks,
    import_harness,
    task_rows,
)

SOLUTIONS = "the exemplars' solutions"


class Knowledge(NamedTuple):
    """What was asked for; the rest is empty."""

    tasks: list[TaskComparison]
    probe: list[TaskComparison]
    solutions: RetentionResult | None
    """Retention on the probe's worked solutions."""

    @property
    def rows(self) -> list[Row]:
        rows = task_rows(self.tasks) + task_rows(self.probe)
        return rows if self.solutions is None else rows + retention_rows(self.solutions, SOLUTIONS)

    def summary(self) -> dict[str, Any]:
        """JSON types."""
        found: dict[str, Any] = {}
        if self.tasks:
            found["lm_eval"] = [task.as_dict() for task in self.tasks]
        if self.solutions is not None:
            found["exemplar_probe"] = {
                "measures": [measure.as_dict() for measure in self.probe],
                "solutions": self.solutions.as_dict(),
            }
        return found


def check_knowledge(arguments: KnowledgeArguments, given: set[str]) -> None:
    """Before any model is loaded.

    Raises:
        QAdapterError: an option without the one it belongs to; lm-eval is not installed.
    """
    unused = sorted(name for name in given if name.startswith("lm_eval_"))
    if arguments.lm_eval is None and unused:
        raise QAdapterError(f"{unused[0]} needs --lm_eval TASKS")
    if arguments.lm_eval_batch_size < 1:
        raise QAdapterError(
            f"lm_eval_batch_size must be at least 1, got {arguments.lm_eval_batch_size}"
        )
    if arguments.lm_eval is not None or arguments.exemplar_probe:
        import_harness()


def measure_knowledge(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: KnowledgeArguments,
    measures: MeasureArguments, console: Console,
) -> Knowledge:
    """Run what was asked for."""
    resampling = {"num_resamples": measures.bootstrap_resamples, "seed": measures.measure_seed}
    tasks, probe, solutions = [], [], None
    if arguments.lm_eval is not None:
        tasks = compare_tasks(
            model, tokenizer, [name.strip() for name in arguments.lm_eval.split(",")],
            limit=arguments.lm_eval_limit, num_fewshot=arguments.lm_eval_num_fewshot,
            batch_size=arguments.lm_eval_batch_size, include_path=arguments.lm_eval_include_path,
            apply_chat_template=arguments.lm_eval_apply_chat_template, **resampling,
        )
    if arguments.exemplar_probe:
        exemplars = load_exemplars()
        resampling["batch_size"] = measures.measure_batch_size
        with progress_bar(console, "exemplar probe", "questions") as progress:
            probe = evaluate_exemplars(model, tokenizer, exemplars, progress=progress, **resampling)
        texts, starts = worked_solutions(tokenizer, exemplars)
        with progress_bar(console, SOLUTIONS, "texts") as progress:
            solutions = evaluate_retention(
                model, texts, prompt_lengths=starts, max_length=1024, progress=progress,
                clusters=[exemplar.group for exemplar in exemplars], **resampling,
            )
    return Knowledge(tasks, probe, solutions)
