"""The ``qadapter`` command: ready for an interrupt before anything else is imported."""

from __future__ import annotations

import sys

from qadapter.console.early import LeavingAtOnce


def main(argv: list[str] | None = None) -> None:
    """Errors that a person can act on end in one line on stderr and exit code 2, an interrupt in
    130, SIGTERM in 143."""
    with LeavingAtOnce():
        from qadapter.commands import root
    sys.exit(root.run(list(sys.argv[1:] if argv is None else argv)))


if __name__ == "__main__":
    main()
