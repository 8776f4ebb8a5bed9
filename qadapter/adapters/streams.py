"""Numbers of the streams that run through one trunk."""

BASE = -1
"""The frozen base's; adapters are numbered from 0."""
