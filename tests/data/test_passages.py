"""The passages that come with the library."""

from __future__ import annotations

from qadapter.data.passages import passages


def test_texts_to_hold_to_and_texts_to_measure_on_share_nothing():
    held, measured = passages(held_to=True), passages(held_to=False)
    assert len(held) >= 20 and len(measured) >= 20 and not set(held) & set(measured)
