"""Every public name, used as users do, for the type checker: `make lint` reads this file.

What is right passes. What is wrong is an error: each such line says which by `type: ignore[...]`,
and one that were no error any more would be, as an ignore that nothing needs.
"""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase

from qadapter import (
    AdapterConfig,
    ObjectiveConfig,
    QAdapterConfig,
    QAdapterError,
    QAdapterLossOutput,
    QAdapterModel,
    QAdapterTrainer,
    linear_q_adapter_loss,
    q_adapter_loss,
)
from qadapter import __version__ as version
from qadapter_kernels import (
    BackendStatus,
    BradleyTerry,
    Coefficients,
    PolicyStatistics,
    Serving,
    SoftValue,
    StateScores,
    backends,
    bradley_terry,
    linear_action_logit,
    linear_logsumexp,
    linear_soft_value,
    linear_state_scores,
    serving,
    soft_value,
)


def configs() -> None:
    assert_type(version, str)
    objective = ObjectiveConfig(alpha_0=0.3, alpha_tilde=0.3, parametrization="policy")
    assert_type(objective.coefficients, Coefficients)
    assert_type(ObjectiveConfig.authors(), ObjectiveConfig)
    assert_type(AdapterConfig(form="block", rank=64).rank, int)
    ObjectiveConfig(alpha=0.3)  # type: ignore[call-arg]
    ObjectiveConfig(bootstrap="previous")  # type: ignore[arg-type]
    AdapterConfig(form="cubic")  # type: ignore[arg-type]
    objective.alpha_0 = 1.0  # type: ignore[misc]


def losses(a: Tensor, b: Tensor, weight: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    out = q_adapter_loss(a, b, ids, mask, ObjectiveConfig())
    assert_type(out, QAdapterLossOutput)
    assert_type(out.chosen_rewards, Tensor)
    assert_type(out.statistics, PolicyStatistics | None)
    q_adapter_loss(a, None, ids, mask, ObjectiveConfig(), base_action_logit=b, base_logsumexp=b)
    q_adapter_loss(a, b, ids, mask)  # type: ignore[call-arg]
    q_adapter_loss(a, b, ids, mask, {"alpha_0": 1.0})  # type: ignore[arg-type]
    linear = linear_q_adapter_loss(a, b, weight, ids, mask, ObjectiveConfig(), bias=None)
    linear_q_adapter_loss(a, b, weight, ids, mask, ObjectiveConfig(), None)  # type: ignore[call-arg]
    return out.loss + linear.loss


def models(
    base: PreTrainedModel, folder: Path, ids: Tensor, mask: Tensor, a: Tensor, b: Tensor
) -> None:
    try:
        model = QAdapterModel.from_base(base, AdapterConfig(), ObjectiveConfig())
    except QAdapterError as error:
        raise SystemExit(str(error)) from error
    assert_type(model, QAdapterModel)
    assert_type(QAdapterModel.from_base("name", "paper", dtype=torch.bfloat16), QAdapterModel)
    assert_type(QAdapterModel.from_pretrained(folder, base, is_trainable=True), QAdapterModel)
    plain: PreTrainedModel = model
    generating: GenerationMixin = model
    assert_type(model.objective, ObjectiveConfig)
    assert_type(model.base, PreTrainedModel)
    model.save_pretrained(folder)
    model.set_policy(strength=1.5)
    model.set_policy(alpha_0=0.1, alpha_tilde=0.2)
    assert_type(model.token_rewards(ids, mask), Tensor)
    assert_type(model.soft_value(a, b, ids), SoftValue)
    soft, statistics = model.soft_value(a, b, ids, return_statistics=True)
    assert_type(statistics, PolicyStatistics)
    model.export(folder, "merged")
    model.print_trainable_parameters()
    QAdapterModel.from_base(base, objective=0.3)  # type: ignore[arg-type]
    QAdapterModel.from_pretrained()  # type: ignore[call-arg]
    model.set_policy(strength="2")  # type: ignore[arg-type]
    model.export(folder, "onnx")  # type: ignore[arg-type]
    del plain, generating, soft


def training(model: QAdapterModel, tokenizer: PreTrainedTokenizerBase, pairs: object) -> None:
    args = QAdapterConfig(output_dir="out", learning_rate=1e-3, max_length=512, alpha_0=0.3)
    trainer = QAdapterTrainer(model, args, train_dataset=pairs, processing_class=tokenizer)
    trainer.train()
    trainer.save_model("out")
    QAdapterConfig(output_dir="out", learning_rate="fast")  # type: ignore[arg-type]
    QAdapterConfig(output_dir="out", lr=1e-3)  # type: ignore[call-arg]
    QAdapterTrainer(model, ref_model=model)  # type: ignore[call-arg]


def kernels(a: Tensor, b: Tensor, weight: Tensor, actions: Tensor, offsets: Tensor) -> None:
    soft = soft_value(a, b, actions, alpha_0=0.3)
    assert_type(soft, SoftValue)
    soft, statistics = soft_value(a, b, actions, alpha_0=0.3, return_statistics=True)
    assert_type(statistics, PolicyStatistics)
    hidden = linear_soft_value(a, b, weight, actions, alpha_0=0.3, alpha_tilde=0.3, bias=None)
    assert_type(hidden.value, Tensor)
    _, statistics = linear_soft_value(a, b, weight, actions, alpha_0=0.3, return_statistics=True)
    assert_type(statistics, PolicyStatistics)
    assert_type(bradley_terry(soft.q_action, soft.value, offsets, gamma=0.9), BradleyTerry)
    assert_type(linear_logsumexp(b, weight), Tensor)
    assert_type(linear_action_logit(b, weight, actions), Tensor)
    scores = linear_state_scores(a, b, weight, actions, objective=Coefficients(0.3, 0.3))
    assert_type(scores, StateScores)
    assert_type(backends(), tuple[BackendStatus, ...])
    assert_type(serving("cuda"), tuple[Serving, ...])
    soft_value(a, b, actions)  # type: ignore[call-overload]
    soft_value(a, b, actions, 0.3)  # type: ignore[call-overload]
    _, statistics = soft_value(a, b, actions, alpha_0=0.3)  # type: ignore[misc]
    print(soft_value(a, b, actions, alpha_0=0.3).normalizer)  # type: ignore[attr-defined]
    bradley_terry(soft.q_action, soft.value, offsets, gama=1.0)  # type: ignore[call-arg]
    bradley_terry(soft.q_action, soft.value, offsets, bootstrap="last")  # type: ignore[arg-type]
    linear_logsumexp(b, weight, backend=0)  # type: ignore[arg-type]
    serving(torch.device("cpu"))  # type: ignore[arg-type]
