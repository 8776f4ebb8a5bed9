"""Who may read what is written: whoever may read a file that its user writes there."""

from __future__ import annotations

import stat
from pathlib import Path

_PROBE = ".new-file"


def give_usual_modes(folder: str | Path) -> None:
    """Give every file in a folder of ours the mode of a plain new one there, as the umask has it.
    Some libraries' writers leave theirs to their owner alone.

    Raises:
        OSError: the folder can't be written.
    """
    folder = Path(folder)
    probe = folder / _PROBE
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)
