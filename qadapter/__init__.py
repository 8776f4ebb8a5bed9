"""Customise a frozen pre-trained LLM to new human preferences without making it forget.

Q-Adapter (Li et al., ICLR 2025, arXiv 2407.03856): a residual Q-function learned from preference
pairs alone, combined with the frozen base into the customised policy π̃ ∝ exp((q + α₀·log π)/α̃).

Names are imported on first use: ``import qadapter`` itself is quick.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # importing typing takes longer than all else here
if TYPE_CHECKING:
    from typing import Any

    from qadapter.adapters.head_adapter import AdapterConfig
    from qadapter.errors import QAdapterError
    from qadapter.objective import (
        ObjectiveConfig,
        QAdapterLossOutput,
        linear_q_adapter_loss,
        q_adapter_loss,
    )
    from qadapter.policy.model import QAdapterModel
    from qadapter.training import QAdapterConfig, QAdapterTrainer

    __version__: str

_HOMES = {
    "AdapterConfig": "qadapter.adapters.head_adapter",
    "ObjectiveConfig": "qadapter.objective",
    "QAdapterConfig": "qadapter.training",
    "QAdapterError": "qadapter.errors",
    "QAdapterLossOutput": "qadapter.objective",
    "QAdapterModel": "qadapter.policy.model",
    "QAdapterTrainer": "qadapter.training",
    "linear_q_adapter_loss": "qadapter.objective",
    "q_adapter_loss": "qadapter.objective",
}

__all__ = [
    "AdapterConfig",
    "ObjectiveConfig",
    "QAdapterConfig",
    "QAdapterError",
    "QAdapterLossOutput",
    "QAdapterModel",
    "QAdapterTrainer",
    "linear_q_adapter_loss",
    "q_adapter_loss",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module 'qadapter' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("qadapter")
    except metadata.PackageNotFoundError:  # a checkout on the path that nobody installed
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
