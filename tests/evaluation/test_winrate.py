"""Win rates and judged gains: what counts, ties, draws, intervals; the two baselines of tables."""

import numpy as np
import pytest

from qadapter.evaluation.answers import Answer
from qadapter.evaluation.judges import (
    Judge,
    LengthJudge,
    PreferenceTexts,
    judged_gain,
    pair_accuracy,
    score_draws,
    win_rate,
)
from qadapter.evaluation.judges.contest import AnswerStore, hold_contests, verdict_cells
from qadapter.evaluation.judges.winrate import paired_draws

PROMPTS = ["one", "two", "three"]
A = [["a b", "a", "a"], ["a b c", "a", "a b"]]
B = [["b", "b", "b b b"]]


class PairJudge(Judge):
    """Says 1, except where an answer asks for something else."""

    name = "pairs"

    def __init__(self):
        self.asked = []

    def compare(self, prompts, answers_a, answers_b, progress=None):
        self.asked += zip(prompts, answers_a, answers_b, strict=True)
        return np.array([np.nan if "?" in a else 1.0 for a in answers_a])


def test_every_draw_against_every_draw_of_the_same_prompt():
    scores_a, scores_b = np.array([[1.0, 2.0], [3.0, 2.0]]), np.array([[2.0, 2.0], [0.0, 2.0]])
    result = judged_gain(scores_a, scores_b)
    # Prompt 1: 1 beats 0, 3 beats 2 and 0, 1 loses to 2; prompt 2: four ties.
    assert result.win_rate.value == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert result.tie_rate == 0.5 and result.num_comparisons == 8 and result.num_prompts == 2
    assert result.gain.value == pytest.approx((2 - 1) / 2 / scores_b.std())


def test_equal_players_win_half_and_gain_nothing():
    scores = np.random.default_rng(0).normal(size=(3, 20))
    result = judged_gain(scores, scores)
    assert result.win_rate == (0.5, 0.5, 0.5) and result.gain.value == 0
    # Scores without a spread give no scale.
    assert np.isnan(judged_gain(np.ones((1, 3)), np.zeros((1, 3))).gain.value)


def test_the_interval_is_over_prompts_and_not_over_draws():
    """The same verdict drawn a hundred times is one prompt's verdict."""
    few = judged_gain(np.array([[1.0, 0.0, 1.0, 0.0]]), np.array([[0.5] * 3 + [0.6]]))
    many = judged_gain(
        np.array([[1.0, 0.0, 1.0, 0.0]] * 100), np.array([[0.5] * 3 + [0.6]] * 7)
    )
    assert many.win_rate == few.win_rate
    assert few.win_rate.high - few.win_rate.low > 0.5
    one = judged_gain(np.ones((1, 4)), np.array([[0, 0, 0, 0.1]]), clusters=["x"] * 4)
    assert np.isnan(one.win_rate.low)


def test_a_judge_of_pairs_sees_each_draw_once_and_missing_verdicts_are_left_out():
    judge = PairJudge()
    answers = [["a", "?", "a"], ["?", "?", "a"]]
    result = win_rate(judge, PROMPTS, answers, B)
    assert judge.asked[:3] == list(zip(PROMPTS, answers[0], B[0], strict=True))
    assert judge.asked[3:] == list(zip(PROMPTS, answers[1], B[0], strict=True))
    assert result.num_comparisons == 3 and result.num_prompts == 2
    assert result.win_rate.value == 1.0 and result.gain is None
    assert paired_draws(2, 4) == [(0, 0), (1, 1), (0, 2), (1, 3)]
    with pytest.raises(ValueError, match="one answer a prompt"):
        win_rate(judge, PROMPTS, [["a"]], B)


def test_the_length_judge_prefers_more_words_and_nothing_else():
    assert score_draws(LengthJudge(), PROMPTS, A).tolist() == [[2, 1, 1], [3, 1, 2]]
    result = win_rate(LengthJudge(), PROMPTS, A, B)
    assert result.win_rate.value == pytest.approx((1 + 0.5 + 0) / 3)
    assert LengthJudge().compare(PROMPTS, A[0], B[0]).tolist() == [1, 0.5, 0]
    texts = PreferenceTexts(PROMPTS, ["a b", "a", "a"], ["a", "a b", "b"], PROMPTS)
    assert pair_accuracy(LengthJudge(), texts).value == 0.5


def test_shuffled_labels_are_a_coin():
    """A judge that ranks every pair right is at one half once labels are shuffled: 400 pairs have
    a standard error of 0.025, four of which are allowed."""
    rng = np.random.default_rng(0)
    pairs = [("a b", "a")] * 400
    texts = PreferenceTexts(["x"] * 400, *map(list, zip(*pairs, strict=True)), list(range(400)))
    assert pair_accuracy(LengthJudge(), texts).value == 1.0
    shuffled = [(a, b) if rng.random() < 0.5 else (b, a) for a, b in pairs]
    texts = texts._replace(chosen=[a for a, _ in shuffled], rejected=[b for _, b in shuffled])
    assert pair_accuracy(LengthJudge(), texts).value == pytest.approx(0.5, abs=0.1)


def answers(draws):
    return [[Answer(text, [1], True) for text in draw] for draw in draws]


def test_contests_hold_all_players_against_the_last_and_the_last_against_itself():
    players = {"policy": answers(A), "prompted": answers(A), "base": answers(B * 4)}
    options = {"num_resamples": 10, "seed": 0}
    found = hold_contests(LengthJudge(), PROMPTS, players, **options)
    assert [v.contest for v in found] == ["policy – base", "prompted – base", "base – base"]
    assert found[0].result == found[1].result
    assert found[2].result.win_rate.value == 0.5 and found[2].result.num_comparisons == 12
    assert "base – base" in verdict_cells(found)[2]
    # Requests cost money: no control that is known beforehand.
    assert len(hold_contests(PairJudge(), PROMPTS, players, **options)) == 2


def test_draws_are_kept_and_a_broken_off_run_draws_the_rest(tmp_path, monkeypatch):
    file = tmp_path / "answers.jsonl"
    calls = []

    def generate(model, tokenizer, prompts, *, seed, progress, **options):
        calls.append(seed)
        return [Answer(f"{prompt}\u2028{seed}", [1, 2], False) for prompt in prompts]

    monkeypatch.setattr("qadapter.evaluation.judges.contest.generate_answers", generate)

    def draw(count):
        return AnswerStore(file, PROMPTS).draw("p", count, None, None, PROMPTS, seed=5)

    first = draw(2)
    assert calls == [5, 6] and first[1][2].text == "three\u20286"
    assert draw(3)[:2] == first
    assert calls == [5, 6, 7]
    # They answer these prompts and no others, in this order.
    for others in (["one", "two", "four"], ["two", "one", "three"], PROMPTS[:2]):
        with pytest.raises(Exception, match=r"answers.jsonl:\d answers another prompt"):
            AnswerStore(file, others)
    file.write_text(file.read_text() + '{"player": "p"}\n')
    with pytest.raises(Exception, match=r"answers.jsonl:10 is no answer"):
        draw(3)
