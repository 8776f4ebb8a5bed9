"""The two losses against the NumPy oracle: every option, every kind of mask, every backend."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import authors_objective, objective

from qadapter.objective import (
    ObjectiveConfig,
    find_actions,
    linear_q_adapter_loss,
    q_adapter_loss,
    sequence_loss,
)
from qadapter_kernels import dispatch, linear_soft_value, reference

CPU_BACKENDS = tuple(
    name for name in dispatch.PREFERENCE["cpu"]
    if dispatch.load(name).unavailable_reason("cpu") is None
)
OPTIONS = [
    dict(parametrization=p, bootstrap=b, length_normalization=n, mask_alignment=m)
    for p in ("policy", "q")
    for b in ("next", "current")
    for n in ("none", "completion", "padded")
    for m in ("action", "state")
]
IDS = ["-".join(row.values()) for row in OPTIONS]

# One row each of what a mask can be: several turns with gaps; the whole row, position 0 too; one
# token; nothing (a row of padding); the last token alone; position 0 alone.
MASKS = torch.tensor([
    [0, 0, 1, 1, 0, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0, 1], [1, 0, 0, 0, 0, 0, 0, 0, 0],
    [0, 1, 0, 1, 0, 1, 0, 1, 0], [0, 0, 0, 0, 1, 1, 1, 0, 0],
], dtype=torch.bool)


def batch(mask=MASKS, vocab=7, hidden=5, dtype=torch.float64, seed=0):
    """(adapter_hidden, base_hidden, weight, input_ids, mask)."""
    generator = torch.Generator().manual_seed(seed)
    h, hb = (torch.randn(*mask.shape, hidden, generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(vocab, hidden, generator=generator).to(dtype)
    ids = torch.randint(vocab, mask.shape, generator=generator)
    return h, hb, weight, ids, mask


def random_mask(sequences, length, density, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(sequences, length, generator=generator) < density


def check(out, expected, tolerance=1e-11):
    for name in expected._fields:
        x = getattr(out, name)
        y = torch.as_tensor(np.asarray(getattr(expected, name)))
        assert x.shape == y.shape, name
        # NaN never passes: its difference is not below anything.
        assert ((x.double() - y).abs() <= tolerance * (1 + y.abs())).all(), (name, x, y)


# --- values -----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_both_levels_equal_the_oracle(options):
    config = ObjectiveConfig(alpha_0=0.7, alpha_tilde=1.3, gamma=0.9, chi2_coef=0.2, **options)
    h, hb, weight, ids, mask = batch()
    expected = objective(h @ weight.T, hb @ weight.T, ids, mask, **dataclasses.asdict(config))
    check(q_adapter_loss(h @ weight.T, hb @ weight.T, ids, mask, config), expected)
    check(linear_q_adapter_loss(h, hb, weight, ids, mask, config), expected)


@settings(max_examples=60)
@given(data=st.data())
def test_any_shape_mask_and_option(data):
    pairs, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 8))
    mask = random_mask(
        2 * pairs, length, data.draw(st.sampled_from([0.0, 0.2, 0.7, 1.0])),
        data.draw(st.integers(0, 999)),
    )
    config = ObjectiveConfig(
        alpha_0=data.draw(st.sampled_from([0.0, 0.01, 1.0, 2.5])),
        alpha_tilde=data.draw(st.floats(0.1, 3)), gamma=data.draw(st.floats(0, 1)),
        chi2_coef=data.draw(st.floats(0, 1)), **data.draw(st.sampled_from(OPTIONS)),
    )
    denominators = data.draw(st.sampled_from([
        {}, {"num_pairs": 5}, {"num_actions": 31}, {"num_pairs": 0.5, "num_actions": 0.25},
    ]))
    h, hb, weight, ids, mask = batch(mask, vocab=data.draw(st.integers(1, 9)))
    a, b = h @ weight.T, hb @ weight.T
    expected = objective(a, b, ids, mask, **dataclasses.asdict(config), **denominators)
    check(q_adapter_loss(a, b, ids, mask, config, **denominators), expected)
    check(linear_q_adapter_loss(h, hb, weight, ids, mask, config, **denominators), expected)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=[IDS[0], IDS[-1]])
def test_float32_on_every_backend(options, backend):
    """Within float32's roundings of float64: logits and rewards of size 10, sums of up to 9."""
    config = ObjectiveConfig(**options)
    h, hb, weight, ids, mask = batch(dtype=torch.float32)
    a, b = h @ weight.T, hb @ weight.T
    expected = objective(a, b, ids, mask, **dataclasses.asdict(config))
    check(q_adapter_loss(a, b, ids, mask, config, backend=backend), expected, 1e-5)
    check(linear_q_adapter_loss(h, hb, weight, ids, mask, config, backend=backend), expected, 1e-5)


@pytest.mark.parametrize("constants", [{}, {"alpha_0": 1.0, "alpha_tilde": 0.3, "gamma": 0.8}])
def test_authors_computation_to_the_last_digit(constants):
    config = dataclasses.replace(ObjectiveConfig.authors(), **constants)
    for seed in range(5):
        h, hb, weight, ids, mask = batch(random_mask(6, 11, 0.6, seed), seed=seed)
        q, b = h @ weight.T, hb @ weight.T
        loss = q_adapter_loss(q, b, ids, mask, config).loss.item()
        assert abs(loss - authors_objective(q, b, ids, mask, **constants)) < 1e-12
        loss = linear_q_adapter_loss(h, hb, weight, ids, mask, config).loss.item()
        assert abs(loss - authors_objective(q, b, ids, mask, **constants)) < 1e-12


def test_authors_constants():
    assert dataclasses.asdict(ObjectiveConfig.authors()) == dict(
        alpha_0=0.01, alpha_tilde=1.0, gamma=1.0, chi2_coef=0.1, parametrization="q",
        bootstrap="current", length_normalization="padded", mask_alignment="state",
    )


def test_head_with_bias_and_scale():
    config = ObjectiveConfig(alpha_0=0.5)
    h, hb, weight, ids, mask = batch()
    bias = torch.randn(7, dtype=torch.float64)
    a, b = (0.3 * (x @ weight.T + bias) for x in (h, hb))
    out = linear_q_adapter_loss(h, hb, weight, ids, mask, config, bias=bias, logit_scale=0.3)
    check(out, objective(a, b, ids, mask, **dataclasses.asdict(config)))


def test_cached_base_logsumexp():
    config = ObjectiveConfig(alpha_0=0.5)
    h, hb, weight, ids, mask = batch()
    a, b = h @ weight.T, hb @ weight.T
    expected = objective(a, b, ids, mask, **dataclasses.asdict(config))
    lse = b.logsumexp(-1)
    lse[~mask.roll(-1, dims=1)] = torch.nan  # read at the states that score an action only
    check(q_adapter_loss(a, b, ids, mask, config, base_logsumexp=lse), expected)
    check(linear_q_adapter_loss(h, hb, weight, ids, mask, config, base_logsumexp=lse), expected)


def test_a_base_of_two_numbers_a_state():
    config = ObjectiveConfig(alpha_0=0.5, alpha_tilde=0.8)
    h, hb, weight, ids, mask = batch()
    a, b = h @ weight.T, hb @ weight.T
    expected = objective(a, b, ids, mask, **dataclasses.asdict(config))
    known = {"base_logsumexp": b.logsumexp(-1),
             "base_action_logit": b.gather(-1, ids.roll(-1, dims=1)[..., None])[..., 0]}
    for x in known.values():
        x[~mask.roll(-1, dims=1)] = torch.nan
    check(q_adapter_loss(a, None, ids, mask, config, **known), expected)
    check(linear_q_adapter_loss(h, None, weight, ids, mask, config, **known), expected)
    with pytest.raises(ValueError, match="have a weight in the policy"):
        q_adapter_loss(a, None, ids, mask, ObjectiveConfig(parametrization="q"), **known)
    with pytest.raises(ValueError, match=r"base_action_logit must have shape"):
        q_adapter_loss(a, None, ids, mask, config, **{**known, "base_action_logit": ids[0] * 1.0})


def test_statistics_of_each_action():
    config = ObjectiveConfig(alpha_0=0.5)
    h, hb, weight, ids, mask = batch()
    a, b = h @ weight.T, hb @ weight.T
    base = b.log_softmax(-1)
    policy = ((1.0 * a - 0.5 * b + 0.5 * base) / 1.0).log_softmax(-1)  # z of design §2
    states = mask[:, 1:]
    expected = (
        -(policy.exp() * policy).sum(-1), (policy.exp() * (policy - base)).sum(-1),
        (base.exp() * (base - policy)).sum(-1),
    )
    for out in (
        q_adapter_loss(a, b, ids, mask, config, return_statistics=True),
        linear_q_adapter_loss(h, hb, weight, ids, mask, config, return_statistics=True),
    ):
        for x, y in zip(out.statistics, expected, strict=True):
            torch.testing.assert_close(x, y[:, :-1][states], rtol=0, atol=1e-12)


def test_ragged_rows_without_padding():
    """``sequence_loss`` over cached features is the padded loss."""
    config = ObjectiveConfig(length_normalization="padded")
    h, hb, weight, ids, mask = batch()
    actions = find_actions(ids, mask)
    states = actions.sequence_N, actions.state_N
    soft = linear_soft_value(
        h[states], hb[states], weight, actions.token_N, **config.coefficients._asdict()
    )
    out = sequence_loss(soft, actions.offsets_S1, config, padded_length=mask.shape[1])
    expected = linear_q_adapter_loss(h, hb, weight, ids, mask, config)
    assert abs(out.loss - expected.loss) < 1e-12


# --- what must not matter -----------------------------------------------------------------------


@pytest.mark.parametrize("mask_alignment", ["action", "state"])
def test_only_scored_positions_matter(mask_alignment):
    """NaN logits and foreign ids where nothing is scored; and no gradient there."""
    config = ObjectiveConfig(mask_alignment=mask_alignment)
    h, hb, weight, ids, mask = batch()
    expected = linear_q_adapter_loss(h, hb, weight, ids, mask, config)
    actions = find_actions(ids, mask, mask_alignment)
    states = torch.zeros_like(mask)
    states[actions.sequence_N, actions.state_N] = True
    tokens = torch.zeros_like(mask)
    tokens[actions.sequence_N, actions.position_N] = True
    h, hb, ids = h.clone(), hb.clone(), ids.clone()
    h[~states], hb[~states] = torch.nan, torch.nan
    ids[~tokens] = -100
    a, b = (h @ weight.T), hb @ weight.T
    for leaf, out in (
        (h.requires_grad_(), linear_q_adapter_loss(h, hb, weight, ids, mask, config)),
        (a.requires_grad_(), q_adapter_loss(a, b, ids, mask, config)),
    ):
        assert abs(out.loss - expected.loss) < 1e-12
        (grad,) = torch.autograd.grad(out.loss, leaf)
        assert not grad[~states].any() and torch.isfinite(grad).all()


@pytest.mark.parametrize("normalization", ["none", "completion"])
def test_padding_changes_nothing(normalization):
    config = ObjectiveConfig(length_normalization=normalization)
    h, hb, weight, ids, mask = batch()
    plain = linear_q_adapter_loss(h, hb, weight, ids, mask, config)
    padded = linear_q_adapter_loss(
        *(torch.cat([x.new_full((8, 4, 5), 9.0), x, x.new_full((8, 3, 5), 9.0)], 1)
          for x in (h, hb)),
        weight, torch.nn.functional.pad(ids, (4, 3)),
        # Padding on the left: what was at position 0 now has a state before it. Not an action.
        torch.nn.functional.pad(mask & (torch.arange(9) > 0), (4, 3)), config,
    )
    for name in ("loss", "chosen_rewards", "rejected_rewards", "policy_logps", "base_logps"):
        torch.testing.assert_close(getattr(padded, name), getattr(plain, name), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [torch.int64, torch.uint8, torch.float32])
def test_masks_of_any_dtype(kind):
    h, hb, weight, ids, mask = batch()
    config = ObjectiveConfig()
    expected = linear_q_adapter_loss(h, hb, weight, ids, mask, config).loss
    assert linear_q_adapter_loss(h, hb, weight, ids.int(), mask.to(kind), config).loss == expected


def test_position_0_is_no_action_and_no_wrap_around():
    actions = find_actions(torch.arange(6).view(2, 3), torch.tensor([[1, 0, 1], [1, 1, 0]]))
    assert actions.state_N.tolist() == [1, 0] and actions.token_N.tolist() == [2, 4]
    assert actions.position_N.tolist() == [2, 1] and actions.offsets_S1.tolist() == [0, 1, 2]


def test_value_is_taken_at_the_next_action_wherever_it_stands():
    """Two turns with a gap: V of the second turn's first state follows the first turn's last."""
    h, hb, weight, ids, _ = batch(torch.zeros(2, 8, dtype=torch.bool))
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[0, [2, 6]] = True
    out = linear_q_adapter_loss(h, hb, weight, ids, mask, ObjectiveConfig(gamma=0.5))
    a, b = h @ weight.T, hb @ weight.T
    value = a[0, 5].logsumexp(-1) - b[0, 5].logsumexp(-1)
    q = a[0, 1, ids[0, 2]] - b[0, 1, ids[0, 2]]
    torch.testing.assert_close(out.token_rewards[0, 2], q - 0.5 * value)
    assert out.token_rewards.count_nonzero() == 2 and out.values[0, 6] == pytest.approx(value)


# --- gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=IDS)
def test_gradients(options):
    """gradcheck from the hidden states, autograd through the definition from the logits."""
    config = ObjectiveConfig(alpha_0=0.7, alpha_tilde=1.3, gamma=0.9, chi2_coef=0.2, **options)
    h, hb, weight, ids, mask = batch(MASKS[[0, 1, 3, 6]][:, :5], vocab=4, hidden=3)
    a, b = (h @ weight.T).requires_grad_(), hb @ weight.T

    def narrow(h):
        return linear_q_adapter_loss(h, hb, weight, ids, mask, config).loss

    assert torch.autograd.gradcheck(narrow, (h.requires_grad_(),))
    (grad_h,) = torch.autograd.grad(narrow(h), h)
    (grad_a,) = torch.autograd.grad(q_adapter_loss(a, b, ids, mask, config).loss, a)
    (expected,) = torch.autograd.grad(by_definition(a, b, ids, mask, config), a)
    torch.testing.assert_close(grad_a, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(grad_h, expected @ weight, rtol=0, atol=1e-12)
    assert expected.any()


def by_definition(a, b, ids, mask, config):
    """The loss by plain PyTorch and autograd (``qadapter_kernels.reference``)."""
    actions = find_actions(ids, mask, config.mask_alignment)
    states = actions.sequence_N, actions.state_N
    soft = reference.soft_value(a[states], b[states], actions.token_N, config.coefficients)
    lengths = actions.offsets_S1.diff().double()
    divisors = {
        "none": torch.ones_like(lengths), "completion": lengths.clamp_min(1),
        "padded": torch.full_like(lengths, ids.shape[1] - 1),
    }[config.length_normalization]
    return reference.bradley_terry(
        soft.q_action, soft.value, actions.offsets_S1, gamma=config.gamma,
        chi2_coef=config.chi2_coef, bootstrap=config.bootstrap, divisors=divisors,
        num_pairs=len(ids) // 2, num_actions=len(soft.value),
    )[0]


def test_gradients_through_every_output():
    """Rewards, values and both terms carry gradients; log-probabilities don't."""
    config = ObjectiveConfig(alpha_0=0.7, gamma=0.9)
    h, hb, weight, ids, mask = batch(MASKS[[0, 1, 3, 6]][:, :5], vocab=4, hidden=3)

    def outputs(h):
        out = linear_q_adapter_loss(h, hb, weight, ids, mask, config)
        return out[:7]

    assert torch.autograd.gradcheck(outputs, (h.requires_grad_(),))
    out = linear_q_adapter_loss(h, hb, weight, ids, mask, config)
    assert all(x.requires_grad for x in out[:7])
    assert not out.policy_logps.requires_grad and not out.base_logps.requires_grad


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_float32_gradients_on_every_backend(backend):
    config = ObjectiveConfig(alpha_0=0.7, gamma=0.9)
    grads = []
    for dtype, name in ((torch.float64, None), (torch.float32, backend)):
        h, hb, weight, ids, mask = batch(dtype=dtype)
        h.requires_grad_()
        linear_q_adapter_loss(h, hb, weight, ids, mask, config, backend=name).loss.backward()
        a, b = (h.detach() @ weight.T).requires_grad_(), hb @ weight.T
        q_adapter_loss(a, b, ids, mask, config, backend=name).loss.backward()
        grads.append((h.grad, a.grad))
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(y.double(), x, rtol=1e-5, atol=1e-5)


def test_a_base_that_wants_a_gradient_is_refused():
    h, hb, weight, ids, mask = batch()
    with pytest.raises(ValueError, match="base_hidden requires grad"):
        linear_q_adapter_loss(h, hb.requires_grad_(), weight, ids, mask, ObjectiveConfig())
    with pytest.raises(ValueError, match="base_logits requires grad"):
        q_adapter_loss(h @ weight.T, hb @ weight.T, ids, mask, ObjectiveConfig())
    with torch.no_grad():
        q_adapter_loss(h @ weight.T, hb @ weight.T, ids, mask, ObjectiveConfig())


# --- batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[4], OPTIONS[-1]], ids=str)
@pytest.mark.parametrize("level", ["logits", "hidden"])
def test_how_a_batch_is_split_changes_nothing(level, options):
    """8 pairs at once, 2×4, 8×1: sums of losses and gradients are equal, exact to float64."""
    config = ObjectiveConfig(chi2_coef=0.3, **options)
    h, hb, weight, ids, mask = batch(random_mask(16, 9, 0.5, 3))
    mask[1], mask[4] = False, False  # an empty answer on either side, so pairs differ in length
    num_actions = find_actions(ids, mask, config.mask_alignment).token_N.numel()

    def run(pairs):
        rows = torch.tensor([*pairs, *(8 + i for i in pairs)])
        leaf = h[rows].requires_grad_()
        denominators = dict(num_pairs=8, num_actions=num_actions)
        if level == "hidden":
            out = linear_q_adapter_loss(
                leaf, hb[rows], weight, ids[rows], mask[rows], config, **denominators
            )
        else:
            out = q_adapter_loss(
                leaf @ weight.T, hb[rows] @ weight.T, ids[rows], mask[rows], config, **denominators
            )
        grad = torch.zeros_like(h)
        grad[rows] = torch.autograd.grad(out.loss, leaf)[0]
        return out.loss.detach(), out.preference_loss.detach(), out.chi2_loss.detach(), grad

    whole = run(range(8))
    for size in (4, 1):
        parts = [run(range(i, i + size)) for i in range(0, 8, size)]
        for x, y in zip(map(sum, zip(*parts, strict=True)), whole, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-13)
    default = linear_q_adapter_loss(h, hb, weight, ids, mask, config)
    torch.testing.assert_close(default.loss, whole[0], rtol=0, atol=1e-13)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("level", ["logits", "hidden"])
def test_nothing_masked_in(level, backend):
    """The loss of zero rewards, connected to the graph: a rank without work still joins in."""
    h, hb, weight, ids, _ = batch(dtype=torch.float32)
    h.requires_grad_()
    mask = torch.zeros_like(MASKS)
    config = ObjectiveConfig()
    if level == "hidden":
        out = linear_q_adapter_loss(h, hb, weight, ids, mask, config, backend=backend)
    else:
        out = q_adapter_loss(h @ weight.T, hb @ weight.T, ids, mask, config, backend=backend)
    assert out.loss.item() == pytest.approx(math.log(2)) and out.chi2_loss.item() == 0
    for x in out[3:9]:
        assert not x.any()
    out.loss.backward()
    assert h.grad is not None and not h.grad.any()


@pytest.mark.parametrize("pairs", [1, 2, 5])
def test_shapes(pairs):
    h, hb, weight, ids, mask = batch(random_mask(2 * pairs, 6, 0.5, 1))
    out = linear_q_adapter_loss(h, hb, weight, ids, mask, ObjectiveConfig())
    assert out.loss.shape == out.preference_loss.shape == out.chi2_loss.shape == ()
    assert out.chosen_rewards.shape == out.rejected_rewards.shape == (pairs,)
    assert out.token_rewards.shape == out.values.shape == (2 * pairs, 6)
    assert out.policy_logps.shape == out.base_logps.shape == (2 * pairs,)
    assert out.statistics is None


@pytest.mark.parametrize("level", ["logits", "hidden"])
def test_16_bit_streams_give_a_float32_loss(level):
    h, hb, weight, ids, mask = batch(dtype=torch.bfloat16)
    h.requires_grad_()
    config = ObjectiveConfig()
    if level == "hidden":
        out = linear_q_adapter_loss(h, hb, weight, ids, mask, config)
    else:
        out = q_adapter_loss(h @ weight.T, hb @ weight.T, ids, mask, config)
    assert all(x.dtype == torch.float32 for x in out[:9])
    out.loss.backward()
    assert h.grad.dtype == torch.bfloat16 and h.grad.any()


@pytest.mark.parametrize("alpha_0", [0.0, 0.5])
def test_log_probabilities_of_excluded_actions_and_of_states_without_any(alpha_0):
    """Never 0·−inf nor −inf − (−inf); a NaN of the policy stays one."""
    config = ObjectiveConfig(alpha_0=alpha_0, parametrization="q")
    a, b = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    ids, mask = torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4, dtype=torch.bool)
    b[0, 1, 0] = -torch.inf  # excluded by the base, which has no say in π̃ at α₀ = 0
    a[1, 1] = -torch.inf
    out = q_adapter_loss(a, b, ids, mask, config)
    assert out.policy_logps[0].isfinite() == (alpha_0 == 0) and not out.policy_logps.isnan().any()
    assert out.policy_logps[1] == -torch.inf and out.base_logps[0] == -torch.inf
    a[1, 2, 3] = torch.nan
    assert q_adapter_loss(a, b, ids, mask, config).policy_logps.isnan().tolist() == [False, True]


# --- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize("field, value, says", [
    ("alpha_0", -0.1, "not negative"), ("alpha_0", math.nan, "finite"), ("alpha_0", "1", "number"),
    ("alpha_0", True, "number"), ("alpha_tilde", 0, "positive"),
    ("alpha_tilde", math.inf, "finite"), ("alpha_tilde", 1e-40, "at least 1e-30"),
    ("gamma", 1.01, r"\[0, 1\]"),
    ("gamma", -0.5, "not negative"), ("chi2_coef", -1.0, "not negative"),
    ("chi2_coef", None, "number"), ("parametrization", "policies", '"policy" or "q"'),
    ("bootstrap", "last", '"next" or "current"'), ("bootstrap", None, '"next" or "current"'),
    ("length_normalization", True, '"none" or "completion" or "padded"'),
    ("mask_alignment", "token", '"action" or "state"'),
])
def test_a_bad_objective_names_the_field_and_the_value(field, value, says):
    with pytest.raises(ValueError, match=f"^{field} must .*{says}.*, got {value!r}$"):
        ObjectiveConfig(**{field: value})


def test_an_objective_that_float32_has_no_room_for_is_refused():
    with pytest.raises(ValueError, match=r"alpha_tilde is 1e-20: too small beside .* 1e\+15"):
        ObjectiveConfig(alpha_0=1e15, alpha_tilde=1e-20, parametrization="q")
    with pytest.raises(ValueError, match=r"chi2_coef must not be larger than .*, got 1e\+40"):
        ObjectiveConfig(chi2_coef=1e40)
    with pytest.raises(ValueError, match=r"alpha_0 must not be larger than .*, got more"):
        ObjectiveConfig(alpha_0=10**5000)
    ObjectiveConfig(alpha_0=1e15, alpha_tilde=1e-20)  # here it has no part in the policy


def test_objective_is_frozen_and_its_defaults_are_the_documented_ones():
    config = ObjectiveConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.alpha_0 = 2.0
    assert dataclasses.asdict(config) == dict(
        alpha_0=1.0, alpha_tilde=1.0, gamma=1.0, chi2_coef=0.1, parametrization="policy",
        bootstrap="next", length_normalization="none", mask_alignment="action",
    )
    assert ObjectiveConfig(alpha_0=1, gamma=0).coefficients == (1, 1.0, 1.0, -1)


@pytest.mark.parametrize("change, says", [
    (dict(input_ids=torch.zeros(3, 4, dtype=torch.int64)), "input_ids.*2B"),
    (dict(input_ids=torch.zeros(8, dtype=torch.int64)), "input_ids.*2B"),
    (dict(input_ids=torch.zeros(8, 9)), "input_ids.*float32"),
    (dict(completion_mask=MASKS[:, :-1]), "completion_mask"),
    (dict(adapter_hidden=torch.zeros(8, 8, 5)), "adapter_hidden"),
    (dict(base_hidden=torch.zeros(72, 5)), "base_hidden"),
    (dict(base_logsumexp=torch.zeros(8, 8)), "base_logsumexp"),
    (dict(input_ids=torch.full((8, 9), 7)), "7, outside the vocabulary of 7"),
])
def test_a_bad_batch_names_the_argument(change, says):
    h, hb, weight, ids, mask = batch(dtype=torch.float32)
    arguments = dict(
        adapter_hidden=h, base_hidden=hb, lm_head_weight=weight, input_ids=ids,
        completion_mask=mask, config=ObjectiveConfig(),
    )
    with pytest.raises((ValueError, TypeError), match=says):
        linear_q_adapter_loss(**(arguments | change))


def test_the_objective_pulls_in_no_transformers():
    """Anybody's training loop can use it; importing it stays quick."""
    import subprocess

    code = "import sys, qadapter.objective; assert 'transformers' not in sys.modules"
    root = Path(__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


@pytest.mark.parametrize("level", ["logits", "hidden"])
def test_the_whole_loss_compiles_to_one_graph(level):
    h, hb, weight, ids, mask = batch(dtype=torch.float32)
    config = ObjectiveConfig()

    def loss(h):
        if level == "hidden":
            return linear_q_adapter_loss(h, hb, weight, ids, mask, config).loss
        return q_adapter_loss(h @ weight.T, hb @ weight.T, ids, mask, config).loss

    torch._dynamo.reset()
    # Which positions are actions depends on the data: their number becomes a symbol.
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        h.requires_grad_()
        assert compiled(h) == loss(h)
        assert torch.equal(*(torch.autograd.grad(f(h), h)[0] for f in (compiled, loss)))
