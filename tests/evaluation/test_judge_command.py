"""``qadapter judge`` on a tiny run: what it writes, what it goes on with, what it refuses."""

import json
import shutil

import pytest
import torch
from test_endpoint_judge import Server, server  # noqa: F401  (a fixture)
from test_judges import save_reward_model
from tiny_models import preference_rows, save_tiny, write_jsonl

from qadapter import AdapterConfig, QAdapterModel
from qadapter.cli import main


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    save_tiny(folder / "model")
    model = QAdapterModel.from_base(str(folder / "model"), AdapterConfig(form="linear", rank=4))
    torch.manual_seed(1)
    torch.nn.init.normal_(model.adapter.up.weight, std=0.2)
    model.save_pretrained(folder / "run")
    save_reward_model(folder / "rm", True)
    write_jsonl(folder / "pairs.jsonl", preference_rows(80))
    write_jsonl(folder / "others.jsonl", preference_rows(120)[60:])
    return folder


def judge(place, *more, data=None):
    arguments = (
        "judge", place / "run", "--dataset_name", data or place / "pairs.jsonl", "--num_prompts", 6,
        "--max_new_tokens", 6, *more,
    )
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    return end.value.code


def test_all_judges_on_all_contests_and_what_is_written(place, tmp_path, capsys, server):  # noqa: F811
    flags = (
        "--judge_fraction", 0.5, "--reward_model", place / "rm", "--judge_model", "m",
        "--judge_url", server.url, "--judge_input_price", 2, "--judge_output_price", 10,
        "--control_system", "Be short.", "--output_dir", tmp_path / "out",
    )
    assert judge(place, *flags) == 0
    found = json.loads((tmp_path / "out/judge.json").read_text())
    said = {(v["judge"], v["contest"]): v for v in found["verdicts"]}
    scoring = ("longer wins", "rm (reward model)", "hidden states", "words")
    contests = ("customised – base", "base, prompted – base", "base – base")
    expected = {(j, c) for j in scoring for c in contests}
    assert said.keys() == expected | {("m (endpoint)", c) for c in contests[:2]}
    assert said["longer wins", contests[0]]["num_comparisons"] == 6 * 2 * 4
    assert said["m (endpoint)", contests[0]]["num_comparisons"] == 6 * 4
    assert said["hidden states", contests[0]]["win_rate_ci"][0] <= 1
    # 40 of 80 pairs are the judges'; of the other prompts, six are asked, with two pairs each.
    assert found["accuracy_on_pairs"]["hidden states"]["accuracy"] > 0.8
    assert found["accuracy_on_pairs"]["longer wins"]["accuracy"] == 0.0
    usage = found["usage"]["m (endpoint)"]
    assert usage["replies"] == usage["verdicts"] == len(server.requests)
    text = " ".join(capsys.readouterr().out.split())
    assert f"cost {usage['replies'] * 300 / 1e6:.4f}" in text
    assert "| words | customised – base |" in (tmp_path / "out/judge.md").read_text()
    answers = [json.loads(x) for x in (tmp_path / "out/answers.jsonl").read_text().splitlines()]
    assert len(answers) == 6 * (2 + 2 + 4)
    # The same command asks nothing and draws nothing again.
    asked = len(server.requests)
    before = (tmp_path / "out/answers.jsonl").stat().st_mtime_ns
    assert judge(place, *flags) == 0
    again = json.loads((tmp_path / "out/judge.json").read_text())
    assert again["verdicts"] == found["verdicts"] and len(server.requests) == asked
    assert (tmp_path / "out/answers.jsonl").stat().st_mtime_ns == before
    # More draws of the same contest would be another one.
    capsys.readouterr()
    assert judge(place, *flags, "--draws", 3) == 2
    assert "another draws (2, now 3)" in capsys.readouterr().err


def test_an_opponent_and_pairs_of_ones_own(place, capsys):
    """A model against itself under another name: nobody is better than a coin says."""
    assert judge(
        place, "--opponent", place / "model", "--judge_dataset_name", place / "others.jsonl"
    ) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "left out of the judges' training: 20 pairs whose prompt is asked" in text
    assert "(opponent)" in text


def test_a_model_that_was_trained_again_is_another_contest(place, tmp_path, capsys):
    """Its answers in the folder are the earlier one's."""
    shutil.copytree(place / "run", tmp_path / "run")
    shutil.copytree(place / "model", tmp_path / "other")
    flags = ("--opponent", tmp_path / "other", "--judge_fraction", 0.5, "--output_dir",
             tmp_path / "out")
    assert judge(tmp_path, *flags, data=place / "pairs.jsonl") == 0
    for folder in ("other", "run"):
        [weights] = (tmp_path / folder).glob("*.safetensors")
        before = weights.read_bytes()
        weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        capsys.readouterr()
        assert judge(tmp_path, *flags, data=place / "pairs.jsonl") == 2
        assert "holds a contest" in capsys.readouterr().err
        weights.write_bytes(before)


@pytest.mark.parametrize(("flags", "message"), [
    ((), "judge needs a judge"),
    (("--judge_fraction", 1.5), "judge_fraction must be"),
    (("--judge_fraction", 0.5, "--judge_dataset_name", "x"), "not both"),
    (("--judge_fraction", 0.5, "--judge_url", "http://x"), "judge_url needs --judge_model"),
    (("--judge_fraction", 0.5, "--opponent_strength", 2), "needs --opponent"),
    (("--judge_fraction", 0.5, "--draws", 0), "draws must be at least 1"),
    (("--judge_model", "m", "--judge_input_price", 1), "given together"),
    (("--reward_model", "/nowhere/at/all"), "can't be loaded"),
    (("--judge_fraction", 0.5, "--temperature", "nan"), "temperature must be finite and positive"),
    (("--judge_fraction", 0.5, "--temperature", "inf"), "temperature must be finite and positive"),
    (("--judge_fraction", 0.5, "--temperature", 0), "positive, got 0.0"),
    (("--judge_fraction", 0.5, "--top_p", 2), "top_p must be above 0 and at most 1, got 2.0"),
    (("--judge_fraction", 0.5, "--seed", -1), "seed must be at least 0 and below 2**63, got -1"),
    (("--judge_fraction", 0.5, "--num_prompts", 0), "num_prompts must be at least 1, got 0"),
    (("--judge_fraction", 0.5, "--strength", "nan"), "strength must be finite"),
    (("--judge_model", "m", "--judge_concurrency", 0), "judge_concurrency must be at least 1"),
    (("--judge_model", "m", "--judge_input_price", -1, "--judge_output_price", 1),
     "judge_input_price must be finite and not negative, got -1.0"),
    (("--judge_model", "m", "--judge_input_price", 1, "--judge_output_price", "nan"),
     "judge_output_price must be finite"),
    (("--judge_model", "m", "--judge_url", "notaurl"), "judge_url must be the address"),
    (("--judge_model", "m", "--judge_url", ""), "judge_url must be the address"),
])
def test_refusals(place, capsys, flags, message):
    assert judge(place, *flags) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_too_few_pairs_for_a_judge_are_refused_before_any_answer_is_drawn(place, tmp_path, capsys):
    flags = ("--judge_fraction", 0.05, "--output_dir", tmp_path / "out")
    assert judge(place, *flags) == 2
    assert "a judge needs at least 20 pairs on 5 prompts" in capsys.readouterr().err
    assert not (tmp_path / "out" / "answers.jsonl").exists()


def test_a_plain_model_needs_an_opponent(place, capsys):
    with pytest.raises(SystemExit) as end:
        main(["judge", str(place / "model"), "--dataset_name", str(place / "pairs.jsonl"),
              "--judge_fraction", "0.5"])
    assert end.value.code == 2
    assert "has no base to beat" in capsys.readouterr().err


def test_a_folder_of_another_kind_is_left_alone(place, tmp_path, capsys):
    (tmp_path / "summary.json").write_text("{}")
    assert judge(place, "--judge_fraction", 0.5, "--output_dir", tmp_path) == 2
    assert "holds another run (summary.json)" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_a_command_that_could_not_be_started_binds_no_other(place, tmp_path, capsys):
    """Names of a dataset, a reward model or a model that were mistyped are no contest."""
    out = tmp_path / "out"
    flags = ("--judge_fraction", 0.5, "--output_dir", out)
    assert judge(place, *flags, data=place / "none.jsonl") == 2
    assert judge(place, *flags, "--reward_model", place / "none") == 2
    assert not any(out.iterdir())
    assert judge(place, *flags, "--opponent", place / "none") == 2
    capsys.readouterr()
    assert judge(place, *flags) == 0
    assert json.loads((out / "settings.json").read_text())["opponent"] is None
    assert judge(place, *flags, data=place / "others.jsonl") == 2
    assert "holds a contest with another dataset_name" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "content", "message"), [
    ("settings.json", b"[]", "settings.json holds no settings"),
    ("settings.json", b"{", "settings.json:1 is not JSON"),
    ("settings.json", b"\xff\xfe", "settings.json:1 is not JSON"),
    ("answers.jsonl", b'{"text": null, "token_ids": [], "ended": true, "player": "base", '
     b'"draw": 0, "prompt_hash": ""}', "answers.jsonl:1 is no answer"),
])
def test_damaged_files_are_named(place, tmp_path, capsys, name, content, message):
    (tmp_path / "answers.jsonl").write_bytes(b"")
    (tmp_path / name).write_bytes(content)
    assert judge(place, "--judge_fraction", 0.5, "--output_dir", tmp_path) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert message in error and "Traceback" not in error
