"""Objects that hold their own digest: whatever changes in one is noticed."""

import json

import pytest

from qadapter.errors import QAdapterError
from qadapter.system.sealed import opened, sealed

VALUE = {"kl": 0.1 + 0.2, "rows": [1, {"b": None, "a": "ä\u2028"}], "seed": 3}


def test_what_was_written_is_read():
    written = json.loads(json.dumps(sealed(VALUE)))
    assert opened(written) == VALUE
    assert sealed(written) == sealed(VALUE)
    assert list(written)[-1] == "sha256"
    assert opened(dict(reversed(written.items()))) == VALUE  # order is nothing


def test_one_without_a_digest_was_written_before():
    assert opened(VALUE) == VALUE


@pytest.mark.parametrize("change", [
    {"seed": 4}, {"seed": "3"}, {"kl": 0.3}, {"more": 1}, {"rows": [1]}, {"sha256": None},
    {"sha256": ""}, {"seed": True},
])
def test_a_change_is_noticed(change):
    with pytest.raises(QAdapterError, match="not what was written"):
        opened(sealed(VALUE) | change)
    left = {key: x for key, x in sealed(VALUE).items() if key != "seed"}
    with pytest.raises(QAdapterError, match="not what was written"):
        opened(left)


def test_no_flipped_bit_gives_another_value():
    text = json.dumps(sealed(VALUE)).encode()
    for position in range(len(text)):
        for bit in range(8):
            flipped = bytearray(text)
            flipped[position] ^= 1 << bit
            try:
                found = opened(json.loads(flipped.decode()))
            except (QAdapterError, ValueError):
                continue
            found.pop(next((k for k in found if k not in VALUE), None), None)  # no digest's name
            assert found == VALUE


@pytest.mark.parametrize("value", [None, [], "text", 3])
def test_what_is_no_object(value):
    with pytest.raises(QAdapterError, match="no object"):
        opened(value)
