"""Caches of several streams: ``StreamCache``."""

from qadapter.policy.decoding import StreamCache

__all__ = ["StreamCache"]
