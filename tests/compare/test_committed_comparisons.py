"""The committed comparisons: run as their files say, and told as they came out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from comparisons import settings, write_config
from made_up import write_results
from scripts import load_script

from qadapter.compare.against import against, at_equal_gain
from qadapter.compare.config import SPLITS
from qadapter.compare.page import page as report
from qadapter.compare.page import summary
from qadapter.compare.reading import changes, read_config
from qadapter.compare.results import read_results

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results/compare"
NAMES = sorted(path.parent.name for path in RESULTS.glob("*/config.json"))
"""Of those whose results are committed."""


@pytest.fixture(scope="module")
def page():
    """docs/what_it_found.py."""
    return load_script(ROOT / "docs/what_it_found.py")


def test_the_tables_in_the_docs_are_of_the_committed_runs(page):
    blocks = [(page.PAGE, name, block) for name, block in page.tables().items()]
    blocks += [(page.CHOOSING, name, block) for name, block in page.choosing_tables().items()]
    blocks += [(page.README, name, block) for name, block in page.readme_tables().items()]
    for file, name, block in blocks:
        text = file.read_text(encoding="utf-8")
        assert text.split(f"<!-- {name} -->\n")[1].split("<!-- end -->")[0] == block


def test_a_table_of_dials_has_a_column_for_every_setting(page, tmp_path):
    """Also where rows have been measured at different ones."""
    methods = {name: settings()["methods"][name] for name in ("dpo", "q")}
    config = read_config(write_config(tmp_path, methods=methods, sweeps={}))
    write_results(config, tmp_path / "out")
    found = read_results(config, tmp_path / "out", "validation")
    found.results[2].runs[0]["dial"][1]["strength"] = 3.0
    [header, _, dpo, q] = [x.split(" | ") for x in page.dial(found).split("\n") if x[:1] == "|"]
    assert [cell.strip("| ") for cell in header[1:]] == ["strength 1", "strength 2", "strength 3"]
    assert [cell[0] for cell in dpo[1:]] == ["0", "0", "—"]
    assert [cell[0] for cell in q[1:]] == ["0", "—", "0"]


@pytest.mark.parametrize("name", NAMES)
def test_they_ran_what_their_file_says(name):
    written = json.loads((RESULTS / name / "config.json").read_text())
    del written["files_sha256"]
    config = read_config(ROOT / f"benchmarks/compare/{name}.yaml")
    now = json.loads(json.dumps(config.as_dict()))
    assert changes(written, now) == changes(now, written) == []
    assert written["seeds"] == now["seeds"]


def test_the_test_split_was_touched_once_by_three_seeds_of_every_method(page):
    """But by the choices', whose test splits are for other comparisons. A row of one seed says so
    in its file; where all are, the page says so."""
    assert {*page.TESTED, *page.CHOICES} == set(NAMES)
    for name in {*page.CHOICES} - {*page.TESTED}:
        assert not (RESULTS / name / "test_touched.jsonl").exists()
    for name in page.TESTED:
        found = page.comparison(name, "test")
        touched = Counter((touch["name"], touch["seed"]) for touch in found.touched)
        for result in found.main[1:]:
            assert {touched[result.row.name, seed] for seed in result.row.seeds} == {1}
            few = name in page.ONE_SEED or found.config["methods"][result.row.name]["seeds"]
            least = 1 if few or not result.trainings else 3
            assert len(result.runs) == len(result.row.seeds) >= least


@pytest.mark.parametrize(("chosen_by", "tested"), [
    ("dsp_choices", "dsp_academy"), ("dsp_what_rates", "dsp_forget"), ("dsp_keep", "dsp_forget"),
    ("dsp_judged", "dsp_forget"), ("dsp_what_rates", "dsp_forget_lora"),
    ("dsp_what", "dsp_forget_lora"), ("dsp_keep", "dsp_forget_lora"),
])
def test_what_was_chosen_by_holds_none_of_what_is_tested(page, chosen_by, tested):
    """The answers of a domain are cut alike for both."""
    chosen, tested = (
        read_config(ROOT / f"benchmarks/compare/{name}.yaml").data for name in (chosen_by, tested)
    )
    assert chosen == tested


def test_what_the_pages_say_of_retention_is_what_came_out(page):
    """"Four to ten times nearer … at no loss of ranking"; and against the tuned DPO."""
    assert "four to ten times nearer" in page.README.read_text(encoding="utf-8")
    for name in ("hh", "dsp_academy", "dsp_business", "dsp_entertainment", "dsp_literature"):
        found = page.comparison(name, "test")
        rows = {r.row.name: r for r in found.results}
        kept = against(rows["Q-Adapter + retention"], found.reference)
        assert kept.accuracy.value > -0.005 and kept.accuracy.high > 0
        tuned = found.reference.row.name == "DPO beta 1"
        low, high = (0.15, 0.4) if tuned else (1 / 10.5, 1 / 3.75)
        assert all(low <= ratio.value <= high for ratio in kept.kl_ratio.values())


@pytest.fixture(scope="module")
def beside_the_tuned_dpo(page):
    """(row, strength or none) → what it has over the tuned DPO, of answers that judges see."""
    found = page.comparison("dsp_judged", "test")
    rows = {r.row.name: r for r in found.results}
    assert found.reference.row.name == "DPO tuned"
    return lambda name, strength=None: against(rows[name], found.reference, strength)


def says(file: Path, *claims: str) -> None:
    text = " ".join(file.read_text(encoding="utf-8").split())
    assert not [claim for claim in claims if claim not in text]


def test_retention_and_the_dial_give_a_better_frontier_than_the_tuned_dpo(
    page, beside_the_tuned_dpo
):
    says(page.PAGE, "gains as much as the tuned DPO as trained", "at 0.4 to 0.55 of its KL",
         "ranks more pairs right")
    says(page.README, "as much as DPO at `--strength 2`, at about half its drift")
    for loss in ("DPO", "Q-Adapter"):
        turned = beside_the_tuned_dpo(f"{loss} tuned + retention", 2.0)
        assert turned.gain.low > -0.05 and turned.accuracy.low > 0
        ratios = [ratio.value for ratio in turned.kl_ratio.values()]
        assert 0.35 < min(ratios) and max(ratios) < 0.55


def test_held_to_passages_a_policy_gains_as_much_at_a_tenth_of_the_kl(page):
    says(page.PAGE, "moved 0.06 of what DPO has on unrelated text ([0.02, 0.12])",
         "0.11 on news ([0.05, 0.25]) and 0.45 on answers", "(0.07 [0.02, 0.13])",
         "(-0.24 [-0.40, -0.09] SD)", "0.02 to 0.03 on validation prompts")
    says(page.README, "0.06 of its KL on unrelated text ([0.02, 0.12])")
    found = page.comparison("dsp_forget", "test")
    rows = {r.row.name: r for r in found.results}
    held = rows["block + built-in 30"]
    equal = at_equal_gain(held, found.reference)
    ratios = {name: tuple(round(x, 2) for x in ratio) for name, ratio in equal.kl_ratio.items()}
    assert ratios["unrelated text"] == (0.06, 0.02, 0.12)
    assert ratios["news"] == (0.11, 0.05, 0.25) and ratios["helpful answers"][0] == 0.45
    beside = against(held, found.reference)
    assert tuple(round(x, 2) for x in beside.accuracy) == (0.07, 0.02, 0.13)
    assert tuple(round(x, 2) for x in beside.gain) == (-0.24, -0.40, -0.09)
    chosen = page.comparison("dsp_keep", "validation")
    for result in chosen.results:
        if "+ built-in" in result.row.name and "alpha 1" not in result.row.name:
            ratio = at_equal_gain(result, chosen.reference).kl_ratio["unrelated text"]
            assert 0.015 < ratio.value < 0.035


def test_the_default_gains_what_a_dpo_gains_at_a_fiftieth_of_the_kl(page):
    says(page.PAGE, "(-0.05 SD, [-0.21, 0.11])", "0.02 [0.01, 0.04] of its KL on unrelated text",
         "0.03 [0.01, 0.06] on news and 0.44 [0.21, 0.91]", "(0.06 [0.01, 0.12])")
    says(page.README, "at 0.02 of its KL on unrelated text and on news")
    found = page.comparison("dsp_forget_lora", "test")
    held = next(r for r in found.results if r.row.name == "Q-Adapter + built-in 30")
    beside = against(held, found.reference)
    assert tuple(round(x, 2) for x in beside.gain) == (-0.05, -0.21, 0.11)
    assert tuple(round(x, 2) for x in beside.accuracy) == (0.06, 0.01, 0.12)
    assert [round(x.value, 2) for x in beside.kl_ratio.values()][:2] == [0.02, 0.02]
    equal = at_equal_gain(held, found.reference).kl_ratio
    ratios = {name: tuple(round(x, 2) for x in ratio) for name, ratio in equal.items()}
    assert ratios["unrelated text"] == (0.02, 0.01, 0.04)
    assert ratios["news"] == (0.03, 0.01, 0.06)
    assert ratios["helpful answers"] == (0.44, 0.21, 0.91)
    rows = {r.row.name: at_equal_gain(r, found.reference).kl_ratio for r in found.results
            if r.row.name in ("SFT", "DPO + NLL")}
    for name, told in (("SFT", (0.48, 0.28, 0.72)), ("DPO + NLL", (0.51, 0.33, 0.81))):
        assert tuple(round(x, 2) for x in rows[name]["unrelated text"]) == told


def test_the_order_holds_on_a_second_base(page):
    says(page.PAGE, "0.13 [0.06, 0.21] of its KL on unrelated text, 0.10 [0.05, 0.16] on news")
    says(page.README, "Gemma 3 270M, 0.13 ([0.06, 0.21], one seed")
    found = page.comparison("gemma", "test")
    held = next(r for r in found.results if r.row.name == "Q-Adapter + built-in 30")
    equal = at_equal_gain(held, found.reference).kl_ratio
    assert tuple(round(x, 2) for x in equal["unrelated text"]) == (0.13, 0.06, 0.21)
    assert tuple(round(x, 2) for x in equal["news"]) == (0.10, 0.05, 0.16)


def test_a_lora_gives_a_better_frontier_than_the_tuned_dpo(page, beside_the_tuned_dpo):
    says(page.PAGE, "0.21 of its KL on unrelated text and 0.45 on other answers")
    says(page.README, "gains as much for a fifth of the drift")
    for loss in ("DPO", "Q-Adapter"):
        found = beside_the_tuned_dpo(f"{loss} tuned LoRA")
        assert found.gain.low < 0 < found.gain.high and found.accuracy.value > 0
        unrelated, *answers = (ratio.value for ratio in found.kl_ratio.values())
        assert 0.19 < unrelated < 0.22 and all(0.35 < ratio < 0.46 for ratio in answers)


def test_a_mild_chi2_helps_the_tuned_dpo(page, beside_the_tuned_dpo):
    says(page.PAGE, "17 to 24% where it moves more", "it gains more as well (0.15 SD, [0.05, 0.27]")
    found = beside_the_tuned_dpo("Q-Adapter tuned")
    assert tuple(round(x, 2) for x in found.gain) == (0.15, 0.05, 0.27)
    assert all(0.755 < ratio.value < 0.835 for ratio in found.kl_ratio.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_untouched_base_is_the_base_to_the_last_digit(page, name):
    for split in SPLITS:
        if not (RESULTS / name / "base" / f"{split}.json").exists():
            continue
        base = page.comparison(name, split).results[0]
        [point] = base.runs[0]["dial"]
        for texts in point["retention"].values():
            assert texts["kl_per_token"] == 0.0
            assert texts["perplexity"] == texts["perplexity_base"]
        assert base.runs[0]["preferences"]["new"]["preference_accuracy"] == 0.5


MEASURED = sorted((path.parents[1].name, path.stem) for path in RESULTS.glob("*/base/*.json"))


@pytest.mark.parametrize(("name", "split"), MEASURED)
def test_reports_are_written_from_what_is_committed(page, name, split):
    """Their numbers are those committed, and no page names a place on a machine."""
    found = page.comparison(name, split)
    committed = (RESULTS / name / f"summary-{split}.json").read_text(encoding="utf-8")
    now = json.loads(json.dumps(summary(found)), parse_float=rounded)
    assert json.loads(committed, parse_float=rounded)["rows"] == now["rows"]
    assert not places(report(found, []))


def test_no_file_names_a_place_on_a_machine_or_holds_weights():
    files = [path for path in RESULTS.rglob("*.json") if path.is_file()]
    assert files
    for path in files:
        assert not places(path.read_text(encoding="utf-8")), path


def rounded(number: str) -> str:
    return f"{float(number):.6g}"


def places(text: str) -> list[str]:
    return [place for place in ("/work/", "/tmp/", "/root/", "/home/") if place in text]
