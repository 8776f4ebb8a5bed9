"""What every form of head adapter has to be, those that are added too."""

from __future__ import annotations

import pytest
import torch
from tiny_models import save_tiny, tiny_base

from qadapter import AdapterConfig, ObjectiveConfig, QAdapterError, QAdapterModel
from qadapter.adapters.head_adapter import _FORMS, HEAD_FORMS

IDS = torch.tensor([[5, 9, 11, 3, 20, 7]])
STRENGTHS = (0.0, 0.5, 1.0, 2.0)


def model_of(form: str, base=None, trained: bool = True) -> QAdapterModel:
    config = AdapterConfig(form=form, rank=4)
    model = QAdapterModel.from_base(base or tiny_base(), config, ObjectiveConfig(alpha_0=0.5))
    if trained:
        torch.manual_seed(1)
        for parameter in model.adapter.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_every_form_that_a_type_checker_knows_can_be_built():
    assert tuple(_FORMS) == HEAD_FORMS
    with pytest.raises(ValueError, match=r"adapter form must be .*, got 'cubic'") as caught:
        AdapterConfig(form="cubic")
    assert all(f'"{form}"' in str(caught.value) for form in HEAD_FORMS)
    with pytest.raises(ValueError, match="adapter form must be"):
        AdapterConfig(form=[])


@pytest.mark.parametrize("form", HEAD_FORMS)
def test_training_begins_at_the_base(form):
    """Bit for bit: both streams are the same before anything is learned."""
    model = model_of(form, trained=False)
    adapter_hidden, base_hidden = model.hidden_streams(IDS)
    assert torch.equal(adapter_hidden, base_hidden)
    assert torch.equal(base_hidden, model.base.model(IDS).last_hidden_state)


@pytest.mark.parametrize("form", HEAD_FORMS)
def test_a_gradient_reaches_every_parameter_and_the_adapter_alone(form):
    model = model_of(form)
    model.adapter.requires_grad_(True)
    model(IDS).logits.square().mean().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {f"adapter.{name}" for name, _ in model.adapter.named_parameters()}
    assert all(p.grad.abs().max() > 0 for p in model.adapter.parameters())


@pytest.mark.parametrize("form", HEAD_FORMS)
def test_the_dial_runs_from_the_base_through_the_adapter(form):
    """At 0 the base, bit for bit; along it log-probabilities move on a line (no cap here)."""
    model = model_of(form)
    zero, half, one, two = (model(IDS, strength=s).logits.double() for s in STRENGTHS)
    assert torch.equal(zero, model.base(IDS).logits.double())
    scale = one.abs().max().item() * 1e-5
    torch.testing.assert_close(half - zero, (one - zero) / 2, atol=scale, rtol=0)
    torch.testing.assert_close(two - zero, (one - zero) * 2, atol=scale, rtol=0)
    assert (one - zero).abs().max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("form", HEAD_FORMS)
def test_what_is_exported_is_the_policy_and_what_can_not_be_is_named(form, tmp_path):
    model = model_of(form, str(save_tiny(tmp_path / "base")))
    try:
        model.export(tmp_path / "merged")
    except QAdapterError as error:
        assert repr(form) in str(error) and "approximate" in str(error)
        return
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ours, theirs = (m(IDS).logits.float().log_softmax(-1) for m in (model, merged))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
