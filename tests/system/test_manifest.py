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


@pytest.mark.parametrize("name", [
    "/dev/zero", "../a.bin", "part/../a.bin", "..", ".", "", "./a.bin", "part//b.txt", "a\0b",
])
def test_a_list_of_a_stranger_names_nothing_outside(folder, name):
    path = folder / manifest.MANIFEST_NAME
    path.write_text(json.dumps({"files": {name: {"bytes": 0, "sha256": ""}}}))
    with pytest.raises(QAdapterError, match=r"manifest\.json"):
        listed(folder).check(folder)


def test_a_device_is_not_read(folder):
    (folder / "a.bin").unlink()
    (folder / "a.bin").symlink_to("/dev/zero")
    path = folder / manifest.MANIFEST_NAME
    path.write_text(json.dumps({"files": {"a.bin": {"bytes": 0, "sha256": ""}}}))
    with pytest.raises(QAdapterError, match=r"a\.bin is no file"):
        listed(folder).check(folder)


@pytest.mark.parametrize("text", [
    "", "[]", "{}", '{"files": []}', '{"files": {"a": 1}}', '{"files": {"a": {"bytes": true}}}',
    '{"files": {"a": {"bytes": 1, "sha256": 2}}}', "[" * 10_000, '{"files": null}',
    '{"files": {"a": {"bytes": 1, "sha256": "", "more": 1}}}', '"files"', "9" * 10_000,
])
def test_what_is_no_list(folder, text):
    path = folder / manifest.MANIFEST_NAME
    path.write_text(text)
    with pytest.raises(QAdapterError) as raised:
        listed(folder)
    assert str(path) in str(raised.value)
