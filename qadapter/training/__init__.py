"""Training: QAdapterConfig, QAdapterTrainer, and the cache of the frozen base's features."""

from qadapter.training.config import QAdapterConfig
from qadapter.training.features import FeatureSet
from qadapter.training.trainer import QAdapterTrainer

__all__ = ["FeatureSet", "QAdapterConfig", "QAdapterTrainer"]
