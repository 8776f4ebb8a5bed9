"""The embedded default: a small real chat model, its preferences, the whole job in minutes."""

from qadapter.demo.run import run_demo

__all__ = ["run_demo"]
