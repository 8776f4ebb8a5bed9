"""What memory and disk are left, as the machine, a container and a user's limits have it."""

import resource

import pytest

from qadapter.system import room

GIB = 1 << 30


def group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")
    return folder


def groups(root, lines):
    group(root / "proc/self", cgroup="\n".join(lines))
    return list(room._control_groups(root))


def test_a_container_limits_what_its_machine_has(tmp_path):
    group(tmp_path / "sys/fs/cgroup/pod/box", memory__max=4 * GIB, memory__current=3 * GIB,
          memory__stat=f"anon {GIB}\ninactive_file {GIB}")
    assert groups(tmp_path, ["0::/pod/box"]) == [2 * GIB]


def test_a_group_is_also_limited_by_those_around_it(tmp_path):
    group(tmp_path / "sys/fs/cgroup/pod", memory__max=GIB, memory__current=0)
    group(tmp_path / "sys/fs/cgroup/pod/box", memory__max="max", memory__high=8 * GIB,
          memory__current=6 * GIB)
    assert sorted(groups(tmp_path, ["0::/pod/box"])) == [GIB, 2 * GIB]


def test_a_container_that_sees_its_own_group_as_the_top(tmp_path):
    group(tmp_path / "sys/fs/cgroup", memory__max=GIB, memory__current=100)
    assert groups(tmp_path, ["0::/"]) == [GIB - 100]
    assert groups(tmp_path, ["0::/host/name/of/it"]) == [GIB - 100]


def test_the_first_version_of_control_groups(tmp_path):
    memory = tmp_path / "sys/fs/cgroup/memory"
    group(memory, memory__limit_in_bytes=2**63 - 4096, memory__usage_in_bytes=GIB)  # no limit
    group(memory / "job", memory__limit_in_bytes=3 * GIB, memory__usage_in_bytes=2 * GIB,
          memory__stat="total_inactive_file 5")
    lines = ["5:cpu,cpuacct:/job", "4:memory:/job", "0::/system"]
    assert groups(tmp_path, lines) == [GIB + 5]


def test_without_control_groups_nothing_is_limited(tmp_path):
    assert list(room._control_groups(tmp_path)) == []
    assert groups(tmp_path, ["0::/nowhere"]) == []


def test_a_limit_of_the_process_counts(monkeypatch):
    free = room.available_memory()
    assert free > 0
    used = room.psutil.Process().memory_info().vms
    monkeypatch.setattr(room.resource, "getrlimit", lambda limit: (
        used + 1000 if limit == resource.RLIMIT_AS else resource.RLIM_INFINITY, -1,
    ))
    assert room.available_memory() < 1 << 27
    monkeypatch.setattr(room.resource, "getrlimit", lambda limit: (0, -1))
    assert room.available_memory() == 0


def test_free_disk_of_a_folder_that_is_not_made_yet(tmp_path):
    assert room.free_disk(tmp_path / "a/b/c") > 0
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("num_bytes, text", [
    (0, "0 bytes"), (1023, "1,023 bytes"), (1536, "1.5 KiB"), (3 * GIB // 2, "1.5 GiB"),
    (5000 * 1024 * GIB, "5,000.0 TiB"),
])
def test_sizes_read_as_people_say_them(num_bytes, text):
    assert room.size(num_bytes) == text


def test_a_folder_below_a_file_is_not_writable(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        room.require_writable(tmp_path / "file/folder")
    room.require_writable(tmp_path / "new/folder")
    assert list((tmp_path / "new/folder").iterdir()) == []
