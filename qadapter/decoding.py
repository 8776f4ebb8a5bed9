"""Caches of several streams: ``StreamCache``."""

from qadapter.policy.stream_cache import StreamCache

__all__ = ["StreamCache"]
