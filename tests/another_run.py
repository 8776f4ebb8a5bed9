"""Other processes: one that holds something until it is killed, one that a lock names."""

import contextlib
import dataclasses
import fcntl
import json
import subprocess
import sys
from pathlib import Path

from qadapter.system.locking import RUN_LOCK_NAME, Owner


@contextlib.contextmanager
def another_run(folder, *, beside=False):
    """Inside, the folder is locked as by process 123 on a machine called elsewhere."""
    folder = Path(folder)
    (folder.parent if beside else folder).mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock") if beside else folder / RUN_LOCK_NAME
    owner = dataclasses.replace(Owner.this_process(), pid=123, host="elsewhere")
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(dataclasses.asdict(owner)))
        file.flush()
        yield
    path.unlink()


@contextlib.contextmanager
def holding(script, place):
    """A process that runs a script with a path as its argument, and the line that it has printed
    when it holds what it is to hold; killed in the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()
