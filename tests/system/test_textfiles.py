"""Files as editors and shells of all systems save them read alike."""

import codecs
import gzip
import json

import pytest

from qadapter.data import load_preferences, read_prompts, read_texts
from qadapter.errors import QAdapterError
from qadapter.evaluation.judges.endpoint_prompt import PROMPT_FILE, JudgePrompt
from qadapter.system.documents import read_yaml
from qadapter.system.textfiles import read_text, split_lines

# Separators that are no line end, and letters outside of ASCII.
TEXTS = ["naïve\x85still the first\u2028and on", "\x0bzweite\x1c Zeile\u2029", "第三行 🙂"]
ROW = {"prompt": "Pourquoi ça ?\u2028", "chosen": " Oui 🙂.", "rejected": " Non."}
ENCODINGS = {
    "utf-8": str.encode,
    "utf-8 with a mark": lambda text: codecs.BOM_UTF8 + text.encode(),
    "utf-16": lambda text: codecs.BOM_UTF16_LE + text.encode("utf-16-le"),
    "utf-16 big-endian": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    "utf-32": lambda text: text.encode("utf-32"),
}


@pytest.mark.parametrize("encode", ENCODINGS.values(), ids=ENCODINGS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("zipped", [False, True])
def test_encodings_and_line_ends_read_alike(tmp_path, encode, end, zipped):
    def write(name, lines):
        data = encode(end.join([*lines, "", lines[0]]) + end)
        path = tmp_path / (name + ".gz" * zipped)
        path.write_bytes(gzip.compress(data) if zipped else data)
        return str(path)

    def lines(key):
        return [json.dumps({key: text}, ensure_ascii=False) for text in TEXTS]

    found = [*TEXTS, TEXTS[0]]
    assert read_texts(write("a.txt", TEXTS)) == read_prompts(write("b.txt", TEXTS)) == found
    assert read_texts(write("a.jsonl", lines("text"))) == found
    assert read_prompts(write("b.jsonl", lines("prompt"))) == found
    pairs = load_preferences(write("c.jsonl", [json.dumps(ROW, ensure_ascii=False)]))
    assert [{key: row[key] for key in ROW} for row in pairs] == [ROW, ROW]
    listed = json.dumps([ROW], ensure_ascii=False, indent=1).replace("\n", end)
    data = encode(listed)
    path = tmp_path / ("d.json" + ".gz" * zipped)
    path.write_bytes(gzip.compress(data) if zipped else data)
    assert list(load_preferences(path)["prompt"]) == [ROW["prompt"]]


@pytest.mark.parametrize("encode", ENCODINGS.values(), ids=ENCODINGS)
def test_yaml_and_judge_prompts(tmp_path, encode):
    path = tmp_path / "a.yaml"
    path.write_bytes(encode("größe: 7\r\n"))
    assert read_yaml(path) == {"größe": 7}
    path.write_bytes(encode(PROMPT_FILE.read_text(encoding="utf-8")))
    assert JudgePrompt.read(path) == JudgePrompt.read()


def test_a_carriage_return_within_a_line_stays():
    assert split_lines("10%\r20%\nb\r\n\n") == ["10%\r20%", "b", "", ""]


def test_other_encodings_are_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("gut\nschön\n".encode("latin-1"))
    for read in (read_text, read_texts):
        with pytest.raises(QAdapterError, match=r"a\.txt:2 is not UTF-8 text \(byte 0xf6\)"):
            read(str(path))
    path.write_bytes("gut\nschlecht\n".encode("utf-16-be"))
    with pytest.raises(QAdapterError, match=r"a\.txt:1 holds a zero byte.*UTF-16 without"):
        read_text(path)
    path.write_bytes(codecs.BOM_UTF16_LE + b"abc")
    with pytest.raises(QAdapterError, match="begins like UTF-16 and is not"):
        read_text(path)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(QAdapterError, match=r"none\.txt can't be read: No such file"):
        read_text(tmp_path / "none.txt")
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"x" * 1000)[:-20])
    with pytest.raises(QAdapterError, match="can't be read"):
        read_text(path)


def test_half_a_surrogate_pair_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ok"}\n{"text": "cut \\ud83d"}\n')
    with pytest.raises(QAdapterError, match=r"a\.jsonl:2: 'text' holds half of a surrogate pair"):
        read_texts(str(path))
    path.write_text('{"prompt": [{"role": "user", "content": "\\udc00"}]}\n')
    with pytest.raises(QAdapterError, match=r"a\.jsonl:1: 'prompt' holds half"):
        read_prompts(str(path))


def test_errors_can_be_printed_whatever_they_name():
    assert str(QAdapterError("no column \ud83d here")) == "no column \\ud83d here"


def refused(read, path):
    with pytest.raises(QAdapterError) as caught:
        read(str(path))
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


@pytest.mark.parametrize(("read", "name"), [
    (load_preferences, "a.jsonl.gz"), (load_preferences, "a.json.gz"),
    (read_texts, "a.txt.gz"), (read_prompts, "a.jsonl.gz"),
])
def test_a_zip_that_fills_the_memory_is_refused(tmp_path, monkeypatch, read, name):
    monkeypatch.setattr("qadapter.system.textfiles.ZIPPED_BYTES", 2**16)
    path = tmp_path / name
    path.write_bytes(gzip.compress(b" " * 2**22) * 3)  # members follow each other
    assert "it grows to more than 100 times its size" in refused(read, path)
    whole = "".join(
        json.dumps(ROW | {"chosen": f" {i}", "text": "x", "n": [i] * 20}) + "\n" for i in range(900)
    )
    path = tmp_path / ("b" + "".join(path.suffixes))
    path.write_bytes(gzip.compress(whole.encode()))
    assert 2**16 < len(whole) < 100 * path.stat().st_size
    assert len(read(str(path))) == 900


@pytest.mark.parametrize("damage", [
    lambda data: data[:-4], lambda data: data[:12], lambda data: data[:3], lambda data: b"",
    lambda data: b"PK" + data[2:], lambda data: data[:20] + b"\xff" * 8 + data[28:],
    lambda data: data[:-8] + bytes(8), lambda data: data + b"more", lambda data: data[:2] + b"\x09",
])
def test_a_damaged_zip_is_named(tmp_path, damage):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(damage(gzip.compress(json.dumps(ROW).encode() * 20)))
    for read in (load_preferences, read_prompts, read_texts):
        refused(read, path)


def test_what_is_no_file_is_named(tmp_path):
    (tmp_path / "a.txt").symlink_to("/dev/zero")
    (tmp_path / "a.jsonl").symlink_to("/dev/zero")
    (tmp_path / "b.jsonl").symlink_to("b.jsonl")
    (tmp_path / "c.jsonl").mkdir()
    assert "it is a device, not a file" in refused(read_texts, tmp_path / "a.txt")
    assert "it is a device, not a file" in refused(load_preferences, tmp_path / "a.jsonl")
    assert "symbolic links" in refused(read_prompts, tmp_path / "b.jsonl")
    assert "directory" in refused(read_prompts, tmp_path / "c.jsonl")
