"""An output folder that another run is writing to."""

import contextlib
import dataclasses
import fcntl
import json
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
