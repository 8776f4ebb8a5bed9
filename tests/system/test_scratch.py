"""Temporary folders: gone when they are done with, and after a kill when the next one opens."""

import errno
import os
import signal
import threading

import pytest
from another_run import holding

from qadapter.system import locking, scratch
from qadapter.system.scratch import remove_abandoned, scratch_folder

HOLDER = """
import sys
from qadapter.system.scratch import scratch_folder
with scratch_folder(sys.argv[1], "saving") as folder:
    (folder / "half").mkdir()
    (folder / "half" / "model.safetensors").write_bytes(b"0" * 100)
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    with holding(HOLDER, tmp_path) as (process, process.folder):
        yield process


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_gone_afterwards_and_after_an_error(tmp_path):
    with scratch_folder(tmp_path, "saving") as folder:
        assert folder.parent == tmp_path and "saving" in folder.name
        (folder / "sub").mkdir()
        (folder / "file").write_text("x")
        os.replace(folder / "file", tmp_path / "finished")
    with pytest.raises(KeyError), scratch_folder(tmp_path, "saving"):
        raise KeyError
    assert os.listdir(tmp_path) == ["finished"]


def test_what_a_killed_process_left_is_removed_and_the_rest_is_not(tmp_path, holder):
    assert os.path.isdir(holder.folder)
    theirs = [tmp_path / name for name in (".saving-abcd1234", ".qadapter-saving-abcd1234", "own")]
    for folder in theirs:
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
    (tmp_path / ".qadapter-writing-empty000").mkdir()  # killed before it was locked
    (tmp_path / ".qadapter-writing-linked00").symlink_to(theirs[2])
    with scratch_folder(tmp_path, "writing"):
        assert os.path.isfile(f"{holder.folder}/half/model.safetensors")
    kill(holder)
    with scratch_folder(tmp_path, "writing") as folder:
        assert sorted(tmp_path.iterdir()) == sorted(
            [*theirs, folder, tmp_path / ".qadapter-writing-linked00"]
        )
    assert all((folder / "notes.txt").read_text() == "mine" for folder in theirs)


def test_killed_while_removing_it_is_found_again(tmp_path, holder, monkeypatch):
    kill(holder)
    removed = []

    def killed(path, **kwargs):
        removed.append(path)
        raise SystemExit

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(SystemExit):
        remove_abandoned(tmp_path)
    monkeypatch.undo()
    assert len(removed) == 1
    locking._forget_in_child()  # as the end of the process would
    remove_abandoned(tmp_path)
    assert not list(tmp_path.iterdir())


def test_one_taken_for_abandoned_while_it_is_made_is_made_again(tmp_path, monkeypatch):
    take, looked = locking.take, []

    def swept_first(path):
        if not looked:
            looked.append(path)
            path.parent.rmdir()
        return take(path)

    monkeypatch.setattr(locking, "take", swept_first)
    with scratch_folder(tmp_path, "saving") as folder:
        assert folder.is_dir() and folder != looked[0].parent


def test_threads_open_and_sweep_at_once(tmp_path):
    errors, start = [], threading.Barrier(4)

    def work():
        start.wait()
        try:
            for number in range(30):
                with scratch_folder(tmp_path, "saving") as folder:
                    (folder / "file").write_text(str(number))
                    assert (folder / "file").read_text() == str(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and not list(tmp_path.iterdir())


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as nothing_fits:
        nothing_fits.setattr("os.pwrite", full)
        with scratch_folder(tmp_path, "saving") as folder:  # held, though its owner has no name
            remove_abandoned(tmp_path)
            assert folder.is_dir()
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as no_more_files:
        no_more_files.setattr("os.open", full)
        with pytest.raises(OSError, match="No space"), scratch_folder(tmp_path, "saving"):
            raise AssertionError("not reached")
    assert not list(tmp_path.iterdir())


def test_a_parent_that_is_missing_or_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for parent in (tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(OSError), scratch_folder(parent, "saving"):
            raise AssertionError("not reached")


def test_a_folder_of_a_process_is_made_once_and_goes_with_it(tmp_path):
    folder = scratch.process_folder(tmp_path / "parent", "rows")
    assert scratch.process_folder(tmp_path / "parent", "rows") == folder
    assert scratch.process_folder(tmp_path / "parent", "others") != folder
    with scratch.scratch_folder(tmp_path / "parent", "more"):
        assert folder.is_dir()  # nobody takes it for abandoned
    child = os.fork()
    if child == 0:
        scratch._remove_at_exit(os.getppid(), tmp_path / "parent", "rows")
        other = scratch.process_folder(tmp_path / "parent", "rows") != folder
        os._exit(0 if other and folder.is_dir() else 1)
    assert os.waitpid(child, 0)[1] == 0
    scratch._remove_at_exit(os.getpid(), tmp_path / "parent", "rows")
    assert not folder.exists()
    scratch.process_folder(tmp_path / "parent", "rows")
