"""The report: counts, first rows, the table, JSON."""

import io
import json

from rich.console import Console

from qadapter.data import DROP_REASONS, NOTES, PreparationReport
from qadapter.data.report import BadRow


def report() -> PreparationReport:
    made = PreparationReport(20, kept=12, max_length=64, end_of_turn="<|end|>")
    made.count(made.dropped, "empty_answer", [4])
    made.count(made.dropped, "identical_answers", [1, 1, 2, 3, 5, 6, 7])
    made.count(made.notes, "chosen_truncated", [9])
    made.count(made.notes, "boundary_merged", [])
    return made


def test_counts_and_first_rows():
    made = report()
    assert made.dropped == {"empty_answer": 1, "identical_answers": 7}
    assert made.notes == {"chosen_truncated": 1}
    assert made.first_rows["identical_answers"] == [1, 2, 3, 5, 6]  # five, none twice
    assert made.num_dropped == 8
    assert "kept 12 of 20 pairs" in made.summary() and "\n" not in made.summary()
    assert PreparationReport(3, kept=3).summary() == "kept all 3 pairs"


def test_table_names_every_reason_with_its_count():
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(report().table())
    text = console.export_text()
    for words in ("12 of 20 kept", "64 tokens", DROP_REASONS["identical_answers"], "35.0%"):
        assert words in text
    assert NOTES["chosen_truncated"] in text and "1, 2, 3, 5, 6, …" in text
    assert PreparationReport(1, kept=1).table().row_count == 1


def test_as_dict_is_json_and_a_copy():
    made = report()
    values = made.as_dict()
    assert json.loads(json.dumps(values)) == values
    values["dropped"]["empty_answer"] = 99
    assert made.dropped["empty_answer"] == 1
    assert {*values, "indices"} == set(PreparationReport.__dataclass_fields__)


def test_bad_row_survives_a_dataset_column():
    bad = BadRow("template_error", "no: really")
    assert BadRow.parse(str(bad)).args == bad.args
    assert BadRow.parse("empty_prompt").description == DROP_REASONS["empty_prompt"]
