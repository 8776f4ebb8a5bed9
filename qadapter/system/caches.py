"""Where qadapter keeps what can be made again."""

import os
import tempfile
from pathlib import Path


def cache_dir() -> Path:
    """``$XDG_CACHE_HOME/qadapter``, else ``~/.cache/qadapter``; for a user without a home, a folder
    of temporary files."""
    if named := os.environ.get("XDG_CACHE_HOME"):
        return Path(named) / "qadapter"
    try:
        return Path.home() / ".cache" / "qadapter"
    except RuntimeError:  # no HOME, and a user that the system does not know: a container's
        return Path(tempfile.gettempdir()) / f"qadapter-{os.getuid()}"
