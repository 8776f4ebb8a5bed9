"""JSON and YAML that others wrote: what the one way in lets through, and what it refuses."""

import json

import pytest

from qadapter.errors import QAdapterError, shown
from qadapter.system import documents
from qadapter.system.documents import parse_json, parse_yaml, read_json, read_yaml


def refuses(read, *arguments, **options):
    with pytest.raises(QAdapterError) as caught:
        read(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


def test_plain_documents_are_read_as_ever(tmp_path):
    value = {"a": [1, -2.5, None, True, "é 🙂"], "b": {"c": 10**38}}
    (tmp_path / "a.json").write_text(json.dumps(value), encoding="utf-8")
    assert read_json(tmp_path / "a.json") == parse_json(json.dumps(value), "x") == value
    (tmp_path / "a.yaml").write_text(
        "base: &base {lr: 1e-3, rank: 0x10, on: yes}\nother: {<<: *base, rank: 8}\nday: 2026-02-30"
    )
    assert read_yaml(tmp_path / "a.yaml") == {
        "base": {"lr": "1e-3", "rank": 16, True: True},
        "other": {"lr": "1e-3", "rank": 8, True: True},
        "day": "2026-02-30",  # there is no such day: dates are text
    }
    deep = "[" * documents.MAX_DEPTH + "]" * documents.MAX_DEPTH
    assert parse_json(deep, "x") == parse_yaml(deep, "x")


@pytest.mark.parametrize(("text", "problem"), [
    ("[" * 102 + "]" * 102, "more than 100 deep"),
    ('{"a":' * 5000 + "1" + "}" * 5000, "more than 100 deep"),
    ("[" * 300_000, "more than 100 deep"),
    ('{"a": [0, -' + "7" * 41 + "]}", "a whole number has 42 digits, more than 40"),
    ("1" * 100_000, "100,000 digits"),
    ('["\\udc00"]', "half of a surrogate pair"), ('{"\\ud83d": 1}', "half of a surrogate pair"),
    ("[1,]", "is not JSON: "), ("", "is not JSON: Expecting value (column 1)"),
])
def test_what_json_is_refused(tmp_path, text, problem):
    assert problem in refuses(parse_json, text, "the reply")
    path = tmp_path / "a.json"
    path.write_text("\n\n" + text)
    assert refuses(read_json, path).startswith(f"{path}:")
    assert refuses(parse_json, text, "b.jsonl", line=7).startswith("b.jsonl:7 ")


def test_halves_of_surrogate_pairs_pass_where_they_are_dealt_with():
    assert parse_json('"\\ud83d"', "x", surrogates=True) == "\ud83d"
    assert "deep" in refuses(parse_json, "[" * 500 + "]" * 500, "x", surrogates=True)


def bomb(first, again):
    return "a0: &a0 " + first + "".join(
        f"\na{i}: &a{i} " + again.format(f"*a{i - 1}") for i in range(1, 30)
    )


@pytest.mark.parametrize(("text", "problem"), [
    (bomb("[x, x]", "[{0}, {0}, {0}]"), "aliases written out"),
    (bomb("{k: 1}", "{{<<: [{0}, {0}]}}"), "aliases written out"),
    ("a: &a " + "x" * 50_000 + "\nb: [" + "*a, " * 50 + "]", "aliases written out"),
    ("&a [1, *a]", "stands for itself"), ("&a {b: {c: *a}}", "stands for itself"),
    ("&a {<<: *a}", "stands for itself"),
    ("- &a0 x\n" + "".join(f"- &a{i} [*a{i - 1}]\n" for i in range(1, 200)), "100 deep"),
    ("- " * 3000, "100 deep"), ("[" * 3000, "100 deep"), ("{a: " * 3000, "100 deep"),
    ("? " * 3000, "100 deep"),
    ("a: " + "9" * 41, "41 digits"), ("a: 0x" + "f" * 4000, "digits"),
    ("a: 1" + ":59" * 1000, "digits"), ("a: 1" + ":59" * 1000 + ".5", "is no float"),
    ("a: !!timestamp 2026-01-01", "a.yaml:1 is not YAML: the tag"),
    ("b: 1\na: !!binary aGk=", "a.yaml:2 is not YAML: the tag"),
    ("!!python/object/apply:os.getcwd []", "means nothing here"),
    ("a: !run x", "the tag '!run' means nothing here"), ("!!set {a}", "means nothing here"),
    ("a: !!int x", "'x' is no int"), ("a: !!bool 7", "'7' is no bool"),
    ("a: !!int ''", "'' is no int"), ("a: !!float ''", "'' is no float"),
    ("!!seq x", "expected a sequence"), ("<<: 5", "expected a mapping"),
    ('a: "x\\0y"', "a zero byte is no character"),
    ('a: "\\uD83D"', "half of a surrogate pair"), ('\na: "\\UFFFFFFFF"', "a.yaml:2 is not YAML"),
    ("1: a\n0x1: b", "a.yaml:2 is not YAML: the key 1 stands there twice"),
    ("a: 1\n'a': 2", "the key 'a' stands there twice"), ("? [a]\n: b", "unhashable key"),
    ("a: \x07", "special characters"), ("a: 1\n---\nb: 2", "another document"), ("*a", "alias 'a'"),
    ("#" * (documents.MAX_YAML_BYTES + 1), "more than 262,144 bytes"),
])
def test_what_yaml_is_refused(tmp_path, text, problem):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    message = refuses(read_yaml, path)
    assert problem in message and message.startswith(str(path))


def test_a_file_is_read_no_further_than_it_may_be_long(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[" + " " * 1000 + "]")
    assert read_json(path, most=1002) == []
    assert "it holds more than 1,001 bytes" in refuses(read_json, path, most=1001)
    assert "a device" in refuses(read_yaml, "/dev/zero")
    assert "No such file" in refuses(read_json, tmp_path / "b.json")
    assert "Is a directory" in refuses(read_yaml, tmp_path)


class Unprintable:
    def __repr__(self):
        raise RuntimeError


def test_a_value_in_a_message_is_short_whatever_it_is():
    many = ["x" * 1000] * 1000
    for _ in range(10):
        many = [many] * 1000
    for value in (many, {"a": many}, "y" * 10**6, 10**10_000, Unprintable()):
        assert len(shown(value)) <= 100
    assert shown({"a": [1, "b"]}) == "{'a': [1, 'b']}"
    assert len(str(QAdapterError("z" * 10**6))) < 2100
