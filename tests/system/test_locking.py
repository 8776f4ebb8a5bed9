"""Work that several processes want done is done by one of them; a folder has one run."""

import dataclasses
import errno
import fcntl
import json
import os
import signal
import threading

import filelock
import pytest
from another_run import holding

from qadapter.errors import QAdapterError
from qadapter.system import locking
from qadapter.system.locking import RUN_LOCK_NAME, Owner, exclusive, sole_run


def test_one_at_a_time(tmp_path):
    inside, most, lock, start = 0, 0, threading.Lock(), threading.Barrier(6)

    def work():
        nonlocal inside, most
        start.wait()
        with exclusive(tmp_path / "cache/thing"):
            with lock:
                inside += 1
                most = max(most, inside)
            with lock:
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and inside == 0


def test_a_killed_holder_lets_go(tmp_path):
    script = (
        "import sys\nfrom qadapter.system.locking import exclusive\n"
        "with exclusive(sys.argv[1]):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    with holding(script, tmp_path / "thing") as (holder, told):
        assert told == "held"
        other = filelock.FileLock(tmp_path / "thing.lock")
        with pytest.raises(filelock.Timeout):
            other.acquire(timeout=0)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with exclusive(tmp_path / "thing"):
            pass


def test_waiting_is_said(tmp_path, monkeypatch):
    """The first look finds it held; the second waits until it is free."""
    calls, acquire = [], filelock.FileLock.acquire

    def held_at_first(self, timeout=None, **kwargs):
        calls.append(timeout)
        if timeout == 0:
            raise filelock.Timeout(self.lock_file)
        return acquire(self, **kwargs)

    monkeypatch.setattr(filelock.FileLock, "acquire", held_at_first)
    lines = []
    with exclusive(tmp_path / "thing", lines.append):
        assert calls == [0, None]
    assert len(lines) == 1 and "waiting" in lines[0] and "thing" in lines[0]


def test_an_error_inside_lets_go(tmp_path):
    with pytest.raises(KeyError), exclusive(tmp_path / "thing"):
        raise KeyError
    with exclusive(tmp_path / "thing"):
        pass


def test_where_locks_are_not_supported_the_work_is_done_all_the_same(tmp_path, monkeypatch):
    def unsupported(self, timeout=None, **kwargs):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(filelock.FileLock, "acquire", unsupported)
    with exclusive(tmp_path / "thing"):
        pass


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError), exclusive(tmp_path / "file/thing"):
        raise AssertionError("not reached")


# --- one run a folder ---------------------------------------------------------------------------

RUN = """
import os, sys, time
from qadapter.system.locking import sole_run
with sole_run(sys.argv[1]):
    if os.fork() == 0:  # a worker that outlives the run
        print(os.getpid(), flush=True)
        time.sleep(60)
        os._exit(0)
    sys.stdin.read()
"""


@pytest.fixture
def run(tmp_path):
    with holding(RUN, tmp_path) as (process, worker):
        yield process
        os.kill(int(worker), signal.SIGKILL)  # it has the pipe, too


def test_a_second_run_is_refused_and_a_killed_one_is_not_in_the_way(tmp_path, run):
    with pytest.raises(QAdapterError) as caught, sole_run(tmp_path):
        raise AssertionError("not reached")
    told = str(caught.value)
    assert f"output_dir {tmp_path} is being written by another run (process {run.pid} on" in told
    assert "started 20" in told and "choose another folder" in told and "\n" not in told
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert Owner.read(tmp_path / RUN_LOCK_NAME).lives() is False
    with sole_run(tmp_path):
        assert Owner.read(tmp_path / RUN_LOCK_NAME) == Owner.this_process()
    assert not list(tmp_path.iterdir())


def test_the_run_itself_may_enter_again_by_another_name(tmp_path):
    folder, link = tmp_path / "run", tmp_path / "link"
    folder.mkdir()
    link.symlink_to(folder)
    with sole_run(folder), sole_run(link):
        with sole_run(f"{tmp_path}/link/../run"):
            pass
        assert (folder / RUN_LOCK_NAME).exists()
    assert not (folder / RUN_LOCK_NAME).exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}', "[" * 100_000, "\udc00"])
def test_a_lock_file_that_names_nobody_is_in_nobodys_way(tmp_path, text):
    (tmp_path / RUN_LOCK_NAME).write_bytes(text.encode(errors="surrogatepass"))
    assert Owner.read(tmp_path / RUN_LOCK_NAME) is None
    with sole_run(tmp_path):
        pass


def test_whether_an_owner_lives():
    here = Owner.this_process()
    assert here.lives() is True
    for change, expected in (
        ({"started": here.started - 60}, False),  # its number went to another process
        ({"pid": 2**22 + 1}, False), ({"pid": -1}, False), ({"pid": 10**30}, False),
        ({"boot": "another"}, False),
        ({"host": "elsewhere"}, None), ({"namespace": "pid:[1]"}, None),
    ):
        assert dataclasses.replace(here, **change).lives() is expected, change


def test_without_locks_the_named_owner_decides(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    path, here = tmp_path / RUN_LOCK_NAME, Owner.this_process()
    with sole_run(tmp_path), monkeypatch.context() as another:
        another.setattr(locking, "_held", {})
        with pytest.raises(QAdapterError, match=f"process {os.getpid()} on"), sole_run(tmp_path):
            raise AssertionError("not reached")
    for gone in (dataclasses.replace(here, boot="before"), dataclasses.replace(here, host="other")):
        path.write_text(json.dumps(dataclasses.asdict(gone)))
        with sole_run(tmp_path):
            assert Owner.read(path) == here


def test_a_run_in_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(OSError), sole_run(tmp_path / "missing"):
        raise AssertionError("not reached")
