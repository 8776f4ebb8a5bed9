"""Fused kernels for preference customisation over large vocabularies.

Needs PyTorch alone; Triton, a GPU and compiled libraries are used where they are there.
"""

from .dispatch import BackendStatus, Serving, backends, serving
from .ops import (
    BradleyTerry,
    SoftValue,
    bradley_terry,
    linear_action_logit,
    linear_logsumexp,
    linear_soft_value,
    soft_value,
)
from .reference import Coefficients, PolicyStatistics
from .scores import StateScores, linear_state_scores

__all__ = [
    "BackendStatus",
    "BradleyTerry",
    "Coefficients",
    "PolicyStatistics",
    "Serving",
    "SoftValue",
    "StateScores",
    "backends",
    "bradley_terry",
    "linear_action_logit",
    "linear_logsumexp",
    "linear_soft_value",
    "linear_state_scores",
    "serving",
    "soft_value",
]
