"""A generation loop whose draw is one kernel: ``fused_sample``, for ``custom_generate``."""

from qadapter.policy.sampling import fused_sample

__all__ = ["fused_sample"]
