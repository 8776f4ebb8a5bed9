"""The commands of ``qadapter``: one module each, imported when the command runs."""
