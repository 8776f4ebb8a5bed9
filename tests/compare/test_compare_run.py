"""A whole comparison on a tiny base: all methods, resumed after it broke off, reported."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import re
import shutil
import sys
from collections import Counter

import pytest
from another_run import another_run
from comparisons import old_rows, settings, write_config, write_place
from data.tiny import CHATML
from PIL import Image
from tiny_models import cli, preference_rows, write_jsonl

from qadapter import QAdapterError, QAdapterModel
from qadapter.compare import read_config, read_results, run_comparison
from qadapter.compare.against import against
from qadapter.compare.methods import require_trl, train
from qadapter.compare.page import columns
from qadapter.compare.pictures import draw_all, draw_frontier, draw_retention
from qadapter.compare.results import judged, preference, retention
from qadapter.compare.run import run_folder
from qadapter.compare.workbench import Workbench
from qadapter.data import as_preferences

MACHINE = {"machine": "<this>"}
METHODS = ("sft", "replay", "dpo", "rloo", "q")
CONTROLS = ("asked", "back")


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A finished comparison; it was broken off once, while the third run was measured."""
    patch = pytest.MonkeyPatch()
    folder = write_place(tmp_path_factory.mktemp("compare"))
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    config = read_config(write_config(folder))
    lines: list[str] = []

    def say(line):
        lines.append(line)
        if line.startswith("[3/9] dpo, seed 0:") and "steps" in line:
            raise Killed

    with pytest.raises(Killed):
        run_comparison(config, folder / "out", say=say, environment=MACHINE)
    assert not run_folder(folder / "out", "dpo", 0).joinpath("validation.json").exists()
    again: list[str] = []
    run_comparison(config, folder / "out", say=again.append, environment=MACHINE)
    yield folder, again
    patch.undo()


def read(folder, name, file):
    return json.loads((run_folder(folder / "out", name, 0) / file).read_text())


@pytest.mark.slow
def test_a_broken_off_comparison_goes_on_where_it_was(place):
    _, again = place
    assert not any("sft" in line or "replay" in line for line in again)
    assert not any("dpo, seed" in line and "training" in line for line in again)
    assert any(line.startswith("[1/7] dpo, seed 0: measured") for line in again)


@pytest.mark.slow
def test_budgets_are_equal(place):
    """Tokens seen: within a step's worth of the budget; trainable parameters: the same."""
    folder, _ = place
    trainings = [read(folder, name, "training.json") for name in METHODS]
    assert len({t["trainable_parameters"] for t in trainings}) == 1
    budget = trainings[0]["budget_tokens"]
    for training in trainings:
        step = training["tokens"] / training["steps"]
        # An online method's answers may end early: it sees up to a token an answer less.
        assert training["tokens"] == pytest.approx(budget, abs=1.5 * step), training["name"]
    assert [t["trained_by"].split()[0] for t in trainings] == [
        "TRL", "TRL", "QAdapterTrainer", "TRL", "QAdapterTrainer",
    ]


def test_every_method_moved_and_was_followed(place):
    folder, _ = place
    for name in METHODS:
        training = read(folder, name, "training.json")
        curve = training["curve"]
        assert len(curve) == 2 and curve[-1]["step"] == training["steps"]
        assert curve[-1]["kl_per_token"] > 1e-8 and curve[-1]["tokens"] == training["tokens"]
        dial = {p["strength"]: p for p in read(folder, name, "validation.json")["dial"]}
        # What was measured during training is the saved policy at strength 1.
        kept = dial[1.0]["retention"]["texts"]["kl_per_token"]
        assert kept == pytest.approx(curve[-1]["kl_per_token"], rel=1e-4)
        assert dial[2.0]["retention"]["texts"]["kl_per_token"] > kept
        model = QAdapterModel.from_pretrained(run_folder(folder / "out", name, 0), folder / "base")
        assert model.adapter_config.rank == 4


def test_the_base_is_itself(place):
    folder, _ = place
    found = json.loads((folder / "out" / "base" / "validation.json").read_text())
    [point] = found["dial"]
    assert point["strength"] == 0 and point["retention"]["texts"]["kl_per_token"] == 0.0
    assert found["preferences"]["new"]["preference_accuracy"] == 0.5
    # What its policy is compared with by quarters: its own margins, a token.
    old = found["preferences"]["old"]
    assert old["policy_margin"] == old["base_margin"]
    assert len(old["policy_margins"]) == old["num_pairs"]
    right = sum(margin > 0 for margin in old["policy_margins"]) / old["num_pairs"]
    assert right == pytest.approx(old["preference_accuracy_base_mean"])
    assert "policy_margins" not in found["preferences"]["new"]
    assert set(found["judges"]) == {"new", "old"}


def test_controls_are_made_of_what_there_is(place):
    """Asking moves nothing; turning a head round turns its rewards round, to first order."""
    folder, _ = place
    for name in CONTROLS:
        assert not (run_folder(folder / "out", name, 0) / "training.json").exists()
    asked, back, forth = (read(folder, name, "validation.json") for name in (*CONTROLS, "q"))
    [point] = asked["dial"]
    assert point["strength"] == 0.0 and point["retention"]["texts"]["kl_per_token"] == 0.0
    answered = point["answers"]["new"]
    assert answered["kl_of_own_answers"] is None and len(answered["judged"]) == 2
    margins = [run["preferences"]["new"]["reward_margin"] for run in (back, forth)]
    assert margins[0] * margins[1] < 0
    assert [p["strength"] for p in back["dial"]] == [1.0]


def test_old_answers_are_sampled_where_they_are_shown(place):
    folder, _ = place
    dial = {p["strength"]: p["answers"] for p in read(folder, "dpo", "validation.json")["dial"]}
    assert set(dial[1.0]) == {"new", "old"} and set(dial[2.0]) == {"new"}
    [swept] = read(folder, "q alpha=1", "validation.json")["dial"]
    assert set(swept["answers"]) == {"new"}


def test_preferred_answers_are_scored_behind_their_prompts(place):
    folder, _ = place
    found = json.loads((folder / "out" / "base" / "validation.json").read_text())
    texts = found["dial"][0]["retention"]["answers"]
    assert texts["num_texts"] == 5
    first = {row["prompt"][0]["content"]: row for row in reversed(old_rows(80))}
    rows = list(reversed(first.values()))[:5]
    words = sum(len(row["chosen"][0]["content"].split()) for row in rows)
    prompts = sum(len(row["prompt"][0]["content"].split()) for row in rows)
    assert words <= texts["num_tokens"] < words + prompts


@pytest.mark.slow
def test_the_base_may_learn_the_old_preference_first(place, capsys):
    """By DPO, merged into a checkpoint that everything else is put on; kept between runs."""
    folder, _ = place
    config = read_config(write_config(
        folder, "first.yaml", first={"learning_rate": 0.1, "rank": 4, "num_train_epochs": 8},
        methods={"dpo": {"method": "dpo", "beta": 0.3}}, sweeps={},
        evaluation={**settings()["evaluation"], "strengths": [1.0]},
    ))
    lines: list[str] = []
    run_comparison(config, folder / "taught", say=lines.append)
    assert any("it learned in" in line for line in lines)
    found = json.loads((folder / "taught" / "first.json").read_text())["validation"]
    names = [f"preference_accuracy_{x}_mean" for x in ("base", "policy")]
    assert found[names[1]] > found[names[0]]
    # What it learned is the base now: scored as the policy was.
    base = json.loads((folder / "taught" / "base" / "validation.json").read_text())
    assert base["preferences"]["old"][names[0]] == pytest.approx(found[names[1]], abs=0.2)
    assert base["dial"][0]["retention"]["texts"]["kl_per_token"] == 0.0
    capsys.readouterr()
    flags = (folder / "first.yaml", "--output_dir", folder / "taught", "--split", "test")
    assert cli("compare", *flags) == 0
    assert "learns the old preference first" not in capsys.readouterr().out


def test_another_configuration_is_refused_by_name(place):
    folder, _ = place
    methods = settings()["methods"]
    methods["dpo"]["beta"] = 0.1
    config = read_config(write_config(folder, "other.yaml", methods=methods))
    with pytest.raises(QAdapterError, match=r"methods\.dpo\.beta: 0\.3 → 0\.1"):
        run_comparison(config, folder / "out")
    with pytest.raises(QAdapterError, match=r"methods\.dpo\.beta: 0\.3 → 0\.1"):
        read_results(config, folder / "out", "validation")
    with pytest.raises(QAdapterError, match="holds no comparison"):
        run_comparison(config, folder)


@pytest.mark.slow
def test_a_method_that_was_left_out_must_be_what_it_was_when_it_comes_back(tmp_path):
    folder = write_place(tmp_path)
    methods = {"q": settings()["methods"]["q"], "dpo": settings()["methods"]["dpo"]}
    small = {**settings()["evaluation"], "prompts": 0, "strengths": [1.0]}

    def config(**some):
        return read_config(write_config(
            folder, methods=some, sweeps={}, evaluation=small, reference=None
        ))

    run_comparison(config(**methods), folder / "out")
    fewer = config(q=methods["q"])
    run_comparison(fewer, folder / "out")
    shown = read_results(fewer, folder / "out", "validation")
    assert [r.row.name for r in shown.results] == ["base", "q"]
    assert list(shown.config["methods"]) == ["q"]
    changed = config(q=methods["q"], dpo={"method": "dpo", "beta": 0.5})
    with pytest.raises(QAdapterError, match=r"methods\.dpo\.beta: 0\.3 → 0\.5"):
        run_comparison(changed, folder / "out")
    # Results that are kept without the weights (under version control, say) can be gone on with.
    where = run_folder(folder / "out", "q", 0)
    before = json.loads((where / "training.json").read_text())
    for file in where.glob("*adapter*"):
        file.unlink()
    lines: list[str] = []
    run_comparison(fewer, folder / "out", split="test", say=lines.append)
    assert any("its weights are not here, or not whole: training again" in line for line in lines)
    after = json.loads((where / "training.json").read_text())
    assert after["curve"] == before["curve"] and (where / "test.json").is_file()


def test_no_pair_is_on_two_sides(place):
    """The old preference leaves out the new one's prompts; the two forms of a part are of the same
    pairs, also where only some of a prompt's are taken or kept."""
    folder, _ = place
    shared = preference_rows(80)[:40]
    rows = old_rows(80) + [
        row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in shared
    ]
    rows[3]["chosen"] = rows[3]["rejected"]  # dropped: the two answers are the same
    write_jsonl(folder / "both.jsonl", rows)
    changes = settings()
    changes["old"] |= {"dataset_name": "both.jsonl", "pairs_per_prompt": 1}
    bench = Workbench(read_config(write_config(folder, "both.yaml", **changes)), folder, print)
    both = {*as_preferences(shared)["prompt_id"]} & bench.new.prompt_ids
    assert both
    assert f"left out: {2 * len(both)} whose prompt the new preference has" in bench.old.summary
    assert not bench.old.prompt_ids & bench.new.prompt_ids
    for data, most in ((bench.old, 1), (bench.new, 2)):
        for part in (data.train, data.validation, data.test, data.judge):
            assert len(part.tokens) == len(part.pairs) > 0
            assert part.tokens["prompt_id"][:] == part.pairs["prompt_id"][:]
            assert max(Counter(part.pairs["prompt_id"]).values()) <= most
            for ids, answer in zip(part.tokens["chosen_ids"], part.pairs["chosen"], strict=True):
                text = bench.tokenizer.decode(ids, skip_special_tokens=True)
                assert text.strip() == answer[0]["content"]


def test_a_template_that_refuses_a_system_message_does_so_before_anything_is_trained(tmp_path):
    folder = write_place(tmp_path)
    (folder / "base" / "chat_template.jinja").write_text(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + CHATML
    )
    with pytest.raises(QAdapterError, match="can't render a prompt: no system"):
        run_comparison(read_config(write_config(folder)), folder / "out")
    assert not list((folder / "out").glob("*/seed-0"))


def test_what_cannot_be_read_claims_no_folder(tmp_path):
    folder = write_place(tmp_path)
    written = settings()
    for part, message in (("data", "nowhere.jsonl"), ("old", "nowhere.jsonl")):
        typo = copy.deepcopy(written)
        typo[part]["dataset_name"] = "nowhere.jsonl"
        with pytest.raises(QAdapterError, match=message):
            run_comparison(read_config(write_config(folder, **typo)), folder / "out")
        assert not (folder / "out").exists()


def test_a_run_that_another_process_is_at_is_left_to_it(tmp_path):
    """Of one comparison, whose base is measured, several processes may do runs; not the same."""
    folder = write_place(tmp_path)
    config = read_config(write_config(
        folder, methods={"q": {"method": "q_adapter", "retention_coef": 0}}, sweeps={},
        reference=None, evaluation={**settings()["evaluation"], "prompts": 0, "strengths": [1.0]},
    ))
    with another_run(folder / "out"), pytest.raises(QAdapterError, match="process 123"):
        run_comparison(config, folder / "out")
    where = run_folder(folder / "out", "q", 0)
    with contextlib.ExitStack() as stack:
        def say(line):
            if line == "measuring the base":
                stack.enter_context(another_run(where))

        with pytest.raises(QAdapterError, match="q/seed-0 is being written by"):
            run_comparison(config, folder / "out", say=say)
    assert not where.exists() or not list(where.iterdir())
    with another_run(folder / "out"):  # at another run of it
        run_comparison(config, folder / "out")
    assert (where / "validation.json").exists()
    left = where / ".qadapter-writing-abcd1234"  # by one that was killed at its very end
    left.mkdir()
    for file in (left / ".owner.lock", left / "validation.json", where / "_run.lock"):
        file.write_text("{}")
    run_comparison(config, folder / "out")
    assert not left.exists() and not (where / "_run.lock").exists()


def test_without_trl_nothing_is_run_that_needs_it(tmp_path, monkeypatch):
    folder = write_place(tmp_path)
    monkeypatch.setitem(sys.modules, "trl", None)
    said: list[str] = []
    config = read_config(write_config(folder))
    with pytest.raises(QAdapterError, match=r"sft trains with TRL: pip install 'qadapter\[comp"):
        run_comparison(config, folder / "out", only=["q", "sft"], say=said.append)
    assert not said and not (folder / "out").exists()
    require_trl([config.methods["q"], config.methods["dpo"]])


def test_without_trl_a_reversed_head_that_it_must_train_is_refused(tmp_path, monkeypatch):
    folder = write_place(tmp_path)
    monkeypatch.setitem(sys.modules, "trl", None)
    methods = {"sft": {"method": "sft"}, "back": {"method": "reversed", "of": "sft"}}
    config = read_config(write_config(folder, methods=methods, sweeps={}, reference=None))
    with pytest.raises(QAdapterError, match="sft trains with TRL"):
        run_comparison(config, folder / "out", only=["back"])


def test_without_trl_what_it_trained_can_be_measured(place, tmp_path, monkeypatch):
    folder, _ = place
    shutil.copytree(folder / "out", tmp_path / "out")
    file = run_folder(tmp_path / "out", "sft", 0) / "validation.json"
    before = json.loads(file.read_text())
    file.unlink()
    monkeypatch.setitem(sys.modules, "trl", None)
    run_comparison(read_config(folder / "compare.yaml"), tmp_path / "out", only=["sft"])
    assert json.loads(file.read_text())["preferences"] == before["preferences"]


@pytest.mark.parametrize(("file", "text"), [
    ("q/seed-0/validation.json", '{"name": '), ("q/seed-0/training.json", "[]"),
    ("base/validation.json", "{}"), ("test_touched.jsonl", '{"name": "q", "seed": 0}\n{"na'),
    ("config.json", "[]"), ("config.json", '{"architectures": ["LlamaForCausalLM"]}'),
])
def test_a_damaged_result_is_named(place, tmp_path, file, text):
    folder, _ = place
    shutil.copytree(folder / "out", tmp_path / "out", ignore=shutil.ignore_patterns("*.safetens*"))
    (tmp_path / "out" / file).write_text(text)
    with pytest.raises(QAdapterError) as raised:
        read_results(read_config(folder / "compare.yaml"), tmp_path / "out", "validation")
    assert str(raised.value).startswith(str(tmp_path / "out" / file))


def test_no_changed_number_of_a_result_is_believed(place, tmp_path):
    folder, _ = place
    config = read_config(folder / "compare.yaml")
    for file in ("q/seed-0/validation.json", "q/seed-0/training.json", "base/validation.json"):
        out = tmp_path / file.replace("/", "-")
        shutil.copytree(folder / "out", out, ignore=shutil.ignore_patterns("*.safetens*"))
        text = (out / file).read_text()
        [number, *_] = re.findall(r"0\.\d{4,}", text)
        other = f"0.{(int(number[2]) + 1) % 10}{number[3:]}"
        (out / file).write_text(text.replace(number, other, 1))
        with pytest.raises(QAdapterError, match=r"is damaged .*not what was written") as told:
            read_results(config, out, "validation")
        assert str(told.value).startswith(str(out / file))
        (out / file).write_bytes(b"\xff\xfe" + text.encode())
        with pytest.raises(QAdapterError, match=re.escape(str(out / file))):
            read_results(config, out, "validation")
        unsealed = json.loads(text)
        del unsealed["sha256"]  # as comparisons were written before
        (out / file).write_text(json.dumps(unsealed))
        read_results(config, out, "validation")


@pytest.mark.slow
def test_an_adapter_that_is_not_whole_is_trained_again(place, tmp_path):
    folder, _ = place
    config, lines = read_config(folder / "compare.yaml"), []
    for number, damage in enumerate((
        lambda path: path.with_name("manifest.json").unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-8]),
    )):
        out = tmp_path / str(number)
        shutil.copytree(folder / "out", out)
        where = run_folder(out, "q", 0)
        weights = (where / "adapter_model.safetensors").read_bytes()
        (where / "validation.json").unlink()
        damage(where / "adapter_model.safetensors")
        run_comparison(config, out, only=["q"], say=lines.append)
        assert any("not whole: training again" in line for line in lines)
        assert (where / "adapter_model.safetensors").read_bytes() == weights


@pytest.mark.slow
def test_the_test_split_is_measured_on_request_and_recorded(place, capsys):
    folder, _ = place
    out = folder / "out"
    assert not (out / "test_touched.jsonl").exists()
    flags = (folder / "compare.yaml", "--output_dir", out)
    assert cli("compare", *flags, "--split", "test") == 0
    touched = (out / "test_touched.jsonl").read_text()
    names = [json.loads(line)["name"] for line in touched.splitlines()]
    assert names == [*METHODS, *CONTROLS]  # no sweeps: they are for choosing
    assert "steps" not in capsys.readouterr().out  # nothing was trained again
    page = (out / "report-test.html").read_text()
    assert page.count("<svg") == 5 and "q alpha=1" not in page.split("Configuration")[0]
    assert "scored on it more than once: no run" in page
    assert cli("compare", *flags, "--split", "test") == 0  # only shows what is there
    assert (out / "test_touched.jsonl").read_text() == touched
    # Who wants another result is seen to have asked for it.
    run_folder(out, "dpo", 0).joinpath("test.json").unlink()
    assert cli("compare", *flags, "--split", "test") == 0
    page = (out / "report-test.html").read_text()
    assert "scored on it more than once: dpo seed 0" in page


@pytest.mark.slow
def test_the_report_is_one_file_that_says_it_all(place, capsys):
    folder, _ = place
    out = folder / "out"
    assert cli("compare", folder / "compare.yaml", "--output_dir", out, "--report_only") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in METHODS)
    page = (out / "report-validation.html").read_text()
    for outside in ("http:", "src=", "<script", "<link", "@import"):
        assert outside not in page.replace("http://www.w3.org", "").replace(
            "http://purl.org", "").replace("http://creativecommons.org", ""), outside
    # Retention, win rates, frontier, razor, old margins, two sweeps.
    assert page.count("<svg") == 7
    assert "Tiny &amp; small" in page and "&lt;this&gt;" in page
    assert str(folder) not in page
    comparison = read_results(read_config(folder / "compare.yaml"), out, "validation")
    summary = json.loads((out / "summary-validation.json").read_text())["rows"]
    for result in comparison.results:
        for column in columns(comparison):
            found = result.number(column.measure)
            written = summary[result.row.name].get(column.key)
            assert written == (None if found is None else found._asdict())
            if found is not None and result.row.sweep is None:
                assert f"{found.mean:.{column.digits}f}" in page


@pytest.mark.slow
def test_rows_are_compared_prompt_by_prompt(place):
    """The differences are those of the tables' means; a row against itself has none, to the bit."""
    folder, _ = place
    options = (folder / "compare.yaml", "--output_dir", folder / "out", "--report_only")
    assert cli("compare", *options) == 0
    comparison = read_results(read_config(folder / "compare.yaml"), folder / "out", "validation")
    rows = {r.row.name: r for r in comparison.results}
    assert comparison.reference is rows["dpo"]
    found = against(rows["q"], rows["dpo"])
    for value, measure in ((found.accuracy, preference("new", "preference_accuracy")),
                           (found.gain, judged("new", "gain"))):
        means = [rows[name].number(measure).mean for name in ("q", "dpo")]
        assert value.value == pytest.approx(means[0] - means[1], abs=1e-5)
        assert value.low <= value.value <= value.high
    kls = [rows[name].number(retention("answers", "kl_per_token")).mean for name in ("q", "dpo")]
    assert found.kl_ratio["answers"].value == pytest.approx(kls[0] / kls[1], rel=1e-4)
    same = against(rows["dpo"], rows["dpo"])
    assert set(same.accuracy) == set(same.gain) == {0.0}
    assert all(set(ratio) == {1.0} for ratio in same.kl_ratio.values())
    assert math.isnan(against(rows["q"], rows["base"]).kl_ratio["texts"].value)
    # The same for a setting of the dial, beside the other's trained policy.
    turned = against(rows["q"], rows["dpo"], 2.0)
    of_q = dict(rows["q"].dial(judged("new", "gain"), retention("answers", "kl_per_token")))[2.0]
    assert turned.gain.value == pytest.approx(
        of_q[0].mean - rows["dpo"].number(judged("new", "gain")).mean, abs=1e-5
    )
    assert turned.kl_ratio["answers"].value == pytest.approx(of_q[1].mean / kls[1], rel=1e-4)
    page = (folder / "out" / "report-validation.html").read_text()
    assert "Against dpo" in page and f"{found.gain.value:.2f} [" in page
    assert f"{turned.gain.value:.2f} [" in page.split("The dial")[1]


@pytest.mark.slow
def test_pictures_are_drawn_from_results_alone(place, tmp_path):
    folder, _ = place
    config = read_config(folder / "compare.yaml")
    comparison = read_results(config, folder / "out", "validation")
    assert [value for value, _ in comparison.sweep("alpha")] == [0.3, 1.0]
    pictures = draw_all(comparison, tmp_path)
    assert [value for value, _ in comparison.sweep("form")] == ["linear", "mlp"]
    assert [p.name for p in pictures] == [
        "retention", "win_rates", "frontier", "razor", "old_margins", "sweep_alpha", "sweep_form",
    ]
    for picture in pictures:
        assert picture.svg.startswith("<svg") and picture.caption
        with Image.open(tmp_path / f"{picture.name}.png") as image:
            assert image.width > 600
    with pytest.raises(QAdapterError, match="nothing is measured"):
        read_results(config, tmp_path, "validation")
    # A sweep whose origin is not measured yet has no dial to show.
    [swept] = [r for r in comparison.results if r.row.name == "q alpha=1"]
    other = dataclasses.replace(swept, row=dataclasses.replace(swept.row, value=0.3))
    without = [r for r in comparison.results if r.row.name != "q"]
    pictures = draw_all(dataclasses.replace(comparison, results=[*without, other]))
    [alone] = [p for p in pictures if p.name == "sweep_alpha"]
    assert "by the dial" not in alone.svg
    # A run that has not moved at all has no place on a log scale.
    [base, q, *_] = comparison.main
    still = copy.deepcopy(q.trainings)
    for training in still:
        for point in training["curve"]:
            point["kl_per_token"] = 0.0
    alone = dataclasses.replace(comparison, results=[base, dataclasses.replace(q, trainings=still)])
    assert draw_retention(alone).axes[0].get_yscale() == "linear"
    # More methods than colours.
    many = [
        dataclasses.replace(q, row=dataclasses.replace(q.row, name=f"q {i}")) for i in range(20)
    ]
    [axes] = draw_frontier(dataclasses.replace(comparison, results=[base, *many])).axes
    looks = {
        (line.get_color(), line.get_marker()) for line in axes.lines
        if line.get_label().startswith("q ")
    }
    assert len(looks) == len(many)


@pytest.mark.slow
def test_without_prompts_nothing_is_sampled_and_what_is_left_is_reported(place, capsys):
    folder, _ = place
    path = write_config(
        folder, "unasked.yaml", methods={k: settings()["methods"][k] for k in ("dpo", "q")},
        evaluation={**settings()["evaluation"], "prompts": 0},
    )
    # The rows named first, then what is left.
    assert cli("compare", path, "--output_dir", folder / "unasked", "--only", "dpo") == 0
    assert "judges" not in capsys.readouterr().out
    done = sorted(x.parts[-3] for x in (folder / "unasked").glob("*/seed-*/validation.json"))
    assert done == ["dpo"]
    assert cli("compare", path, "--output_dir", folder / "unasked", "--only", "[dpo, pq]") == 2
    assert "no row of the validation split is called 'pq'" in capsys.readouterr().err
    assert cli("compare", path, "--output_dir", folder / "unasked") == 0
    assert "[1/3] q, seed 0: measured" in capsys.readouterr().out
    assert not (folder / "unasked" / "base_answers").exists() or not list(
        (folder / "unasked" / "base_answers").glob("validation*"))
    comparison = read_results(read_config(path), folder / "unasked", "validation")
    assert [p.name for p in draw_all(comparison)] == [
        "retention", "frontier", "old_margins", "sweep_alpha", "sweep_form",
    ]
    assert not any("win" in column.key or "gain" in column.key for column in columns(comparison))
    page = (folder / "unasked" / "report-validation.html").read_text()
    assert "Against dpo" in page and "Each judge apart" not in page


@pytest.mark.slow
def test_sweeps_may_go_unasked(place):
    folder, _ = place
    config = read_config(write_config(
        folder, "sweeps.yaml", methods={"q": settings()["methods"]["q"]}, reference=None,
        sweeps={"alpha": settings()["sweeps"]["alpha"]},
        evaluation={**settings()["evaluation"], "strengths": [1.0], "ask_sweeps": False},
    ))
    told = []
    run_comparison(config, folder / "sweeps", say=told.append)
    for judge in ("hidden states", "words"):
        judged_by = f"new preference, judge by {judge}: accuracy "
        assert any(line.startswith(judged_by) for line in told)
    comparison = read_results(config, folder / "sweeps", "validation")
    rows = {r.row.name: r for r in comparison.results}
    assert rows["q alpha=1"].number(judged("new", "gain")) is None
    assert rows["q"].number(judged("new", "win_rate")) is not None
    [swept] = [p for p in draw_all(comparison) if p.name == "sweep_alpha"]
    assert "accuracy by implicit reward" in swept.svg and "judged gain" not in swept.svg
    assert math.isnan(against(rows["q alpha=1"], rows["q"]).gain.value)


def test_lora_trains_in_the_trunk(place):
    """SFT, and DPO with a term of TRL's, by TRL; DPO alone by our trainer. The shared base of the
    judges stays as it is."""
    folder, _ = place
    dpo = settings()["methods"]["dpo"]
    methods = {"sft": {"method": "sft"}, "dpo": dpo, "dpo + nll": {**dpo, "nll_coef": 0.5}}
    config = read_config(write_config(
        folder, "lora.yaml", methods=methods, sweeps={},
        adapter={"kind": "lora", "r": 2, "target_modules": ["q_proj"]},
        evaluation={**settings()["evaluation"], "strengths": [1.0]},
    ))
    run_comparison(config, folder / "lora")
    for name in methods:
        where = run_folder(folder / "lora", name, 0)
        training = json.loads((where / "training.json").read_text())
        assert training["trained_by"].startswith("QAdapterTrainer" if name == "dpo" else "TRL")
        assert training["curve"][-1]["kl_per_token"] > 1e-9
        assert (where / "adapter_config.json").is_file()


def test_turns_of_others_are_learned_by_no_method(tmp_path):
    """Answers with turns of others in them: SFT scores the assistant's tokens alone, and TRL's DPO,
    which would score all, is refused."""
    folder = write_place(tmp_path)
    rows = preference_rows(80)
    for row in rows:
        row["chosen"] = [*row["chosen"], {"role": "user", "content": "Is it always hot?"},
                         {"role": "assistant", "content": "Never."}]
    write_jsonl(folder / "new.jsonl", rows)
    methods = {"sft": {"method": "sft"}}
    small = {**settings()["evaluation"], "prompts": 0, "strengths": [1.0]}
    options = {"sweeps": {}, "evaluation": small, "reference": None}
    config = read_config(write_config(folder, methods=methods, **options))
    bench = Workbench(config, folder, print)
    dataset = []

    def keep(trainer_class, *args, train_dataset, **kwargs):
        dataset.extend(train_dataset)
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr("qadapter.compare.trl_trainers._with_our_forward", keep)
        train(bench, config.methods["sft"], 0, lambda model: {})
    tokens = bench.new.train.tokens
    for row, prompt, answer, mask in zip(
        dataset, tokens["prompt_ids"], tokens["chosen_ids"], tokens["chosen_mask"], strict=True
    ):
        assert row["input_ids"] == [*prompt, *answer]
        assert row["completion_mask"] == [0] * len(prompt) + [int(x) for x in mask]
        assert 0 < sum(row["completion_mask"]) < len(answer)
    config = read_config(write_config(
        folder, methods={"dpo": {"method": "dpo", "nll_coef": 1}}, **options
    ))
    with pytest.raises(QAdapterError, match="these answers hold turns of others; leave nll_coef o"):
        run_comparison(config, folder / "nll")
