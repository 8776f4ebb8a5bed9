"""Evaluation's row kernel in Triton."""

from __future__ import annotations

import interpreter  # first: it decides how triton is imported
import pytest
import test_state_scores
from scores import HEADS, OBJECTIVES, check, check_do_nothing, run, score_case

pytestmark = [interpreter.quiet, interpreter.interpreter_only]


@pytest.fixture(autouse=True)
def _prepare(monkeypatch):
    interpreter.prepare(monkeypatch)


@pytest.fixture
def backend():
    return "triton"


test_a_model_without_an_adapter = test_state_scores.test_a_model_without_an_adapter
test_without_an_objective = test_state_scores.test_without_an_objective_there_are_no_rewards
test_nothing_hides_a_nan = test_state_scores.test_nothing_hides_a_nan
test_no_rows = test_state_scores.test_no_rows
test_rows_far_apart = test_state_scores.test_rows_far_apart_and_strided
test_same_top1 = test_state_scores.test_same_top1_with_ties_near_and_far
test_common_offsets = test_state_scores.test_an_offset_common_to_a_row_costs_no_digits
test_softcap = test_state_scores.test_softcap_of_any_size_of_logit


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_equals_the_definition(objective, head):
    for strength in (0.5, 1.0):
        case = score_case(objective, strength, head, rows=4)
        check(run(case, "triton"), case)


@pytest.mark.parametrize("vocab", [1, 2, 511, 512, 513, 1024, 1040])
def test_odd_vocabularies_and_tile_edges(vocab):
    case = score_case("policy, other alphas", 2.0, "bias", rows=4, vocab=vocab)
    case.actions[3:] = vocab // 2
    check(run(case, "triton"), case)


@pytest.mark.parametrize("head", HEADS)
def test_an_adapter_that_does_nothing_is_the_base_to_the_last_bit(head):
    for strength in (0.0, 0.3, 1.0, 2.0):
        check_do_nothing(score_case("policy", strength, head, rows=4), "triton")
