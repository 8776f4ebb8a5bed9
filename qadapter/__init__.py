"""Customize a frozen LLM to new human preferences without making it forget."""
