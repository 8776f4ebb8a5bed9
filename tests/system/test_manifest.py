"""What a manifest notices: every way in which a file can differ from what was saved."""

import json

import pytest

from qadapter.errors import QAdapterError
from qadapter.system import manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "a.bin").write_bytes(bytes(range(256)))
    (tmp_path / "part" / "b.txt").write_text("two", encoding="utf-8")
    manifest.write(tmp_path, ["a.bin", "part/b.txt"])
    return tmp_path


def listed(folder):
    return manifest.read(folder / manifest.MANIFEST_NAME)


def test_what_was_written_passes_wherever_the_folder_goes(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "copy"
    folder.rename(elsewhere)
    listed(elsewhere).check(elsewhere)
    assert [path.name for path in elsewhere.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("damage, said", [
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), "255 bytes, not 256"),
    (lambda path: path.write_bytes(b"\1" + path.read_bytes()[1:]), "SHA-256"),
    (lambda path: path.unlink(), "No such file"),
])
def test_a_changed_file_is_named(folder, damage, said):
    damage(folder / "a.bin")
    with pytest.raises(QAdapterError, match=said) as raised:
        listed(folder).check(folder)
    assert str(folder / "a.bin") in str(raised.value)
    listed(folder).check(folder, ["part/b.txt"])


def test_a_file_that_is_not_listed_is_no_part_of_it(folder):
    (folder / "c.bin").write_bytes(b"")
    with pytest.raises(QAdapterError, match=r"c\.bin is not listed"):
        listed(folder).check(folder, ["c.bin"])


def test_no_flipped_bit_of_the_list_itself_goes_unnoticed(folder):
    path = folder / manifest.MANIFEST_NAME
    written = path.read_bytes()
    before = json.loads(written)
    for position in range(len(written)):
        for bit in range(8):
            flipped = bytearray(written)
            flipped[position] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                listed(folder).check(folder, ["a.bin", "part/b.txt"])
            except QAdapterError:
                continue
            assert json.loads(bytes(flipped)) == before  # white space for other white space
    manifest.remove(folder)
    with pytest.raises(QAdapterError, match="No such file"):
        listed(folder)
