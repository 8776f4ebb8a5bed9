"""Several adapters on one base: ``compose``."""

from qadapter.policy.composition import compose

__all__ = ["compose"]
