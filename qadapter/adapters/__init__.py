"""What is trained: a small function on the frozen base's head, or LoRA in its trunk."""

from qadapter.adapters.head_adapter import AdapterConfig, HeadAdapter

__all__ = ["AdapterConfig", "HeadAdapter"]
