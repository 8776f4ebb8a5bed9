"""Several methods on the same pairs under equal budgets: what each learns and what it forgets."""

from qadapter.compare.config import CompareConfig, read_config
from qadapter.compare.run import run_comparison

__all__ = ["CompareConfig", "read_config", "run_comparison"]
