"""What was learned and what was kept: numbers with intervals, answers, tables, pictures."""

from qadapter.evaluation.answers import Answer, answer_statistics, generate_answers
from qadapter.evaluation.bootstrap import ClusterBootstrap, Estimate
from qadapter.evaluation.preference import PreferenceResult, evaluate_preferences
from qadapter.evaluation.report import (
    comparison_table,
    plot_training_curves,
    write_metrics_jsonl,
    write_report,
)
from qadapter.evaluation.retention import RetentionResult, evaluate_retention

__all__ = [
    "Answer",
    "ClusterBootstrap",
    "Estimate",
    "PreferenceResult",
    "RetentionResult",
    "answer_statistics",
    "comparison_table",
    "evaluate_preferences",
    "evaluate_retention",
    "generate_answers",
    "plot_training_curves",
    "write_metrics_jsonl",
    "write_report",
]
