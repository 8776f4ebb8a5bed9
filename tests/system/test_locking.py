"""Work that several processes want done is done by one of them."""

import signal
import subprocess
import sys
import threading

import filelock
import pytest

from qadapter.system.locking import exclusive


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
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "thing")], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        other = filelock.FileLock(tmp_path / "thing.lock")
        with pytest.raises(filelock.Timeout):
            other.acquire(timeout=0)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with exclusive(tmp_path / "thing"):
            pass
    finally:
        holder.kill()
        holder.communicate()


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
