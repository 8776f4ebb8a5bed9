"""Several methods on the same pairs under equal budgets: what each learns and what it forgets."""

from qadapter.compare.config import CompareConfig
from qadapter.compare.page import write_report
from qadapter.compare.reading import read_config
from qadapter.compare.results import Comparison, read_results
from qadapter.compare.run import run_comparison

__all__ = [
    "CompareConfig",
    "Comparison",
    "read_config",
    "read_results",
    "run_comparison",
    "write_report",
]
