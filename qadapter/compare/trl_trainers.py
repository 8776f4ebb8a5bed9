"""TRL's trainers of the customised policy, on ``PolicyForCausalLM``: from a method to a trainer
that is about to see the comparison's budget of tokens."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import PreTrainedModel, Trainer
from trl.import_utils import TRLExperimentalWarning

from qadapter.compare.kinds import DPO, RLOO, SDFT, SFT, BestOfN, Method, Replay
from qadapter.compare.policy_view import PolicyForCausalLM
from qadapter.compare.workbench import Workbench
from qadapter.data import PlainText, Prompt, messages_of, prompt_of
from qadapter.errors import QAdapterError
from qadapter.policy.model import QAdapterModel
from qadapter.training.own_samples import Sample


def trl_trainer(
    bench: Workbench, method: Method, model: QAdapterModel, shared: dict[str, Any],
    best: Sequence[Sample] | None = None,
) -> tuple[Trainer, str]:
    """(the trainer of a method, who it is).

    Args:
        shared: training arguments that all methods have.
        best: the answers that ``BestOfN`` trains on.

    Raises:
        QAdapterError: prompts or answers of a form that TRL doesn't take.
    """
    # Gradients of a frozen trunk need no recomputing, and the base keeps its own dtype.
    shared = shared | {
        "bf16": False, "gradient_checkpointing": False, "logging_nan_inf_filter": False,
        "dataloader_pin_memory": torch.accelerator.is_available(),
    }
    if isinstance(method, SFT | Replay | BestOfN):
        trainer, name = _sft(bench, _sequences(bench, method, best), model, shared), "SFTTrainer"
    else:
        build, name = {
            DPO: (_dpo, "DPOTrainer"), RLOO: (_rloo, "RLOOTrainer"), SDFT: (_sdft, "SDFTTrainer"),
        }[type(method)]
        trainer = build(bench, method, model, shared)
    return trainer, f"TRL {trl.__version__} {name}"


def _sequences(
    bench: Workbench, method: Method, best: Sequence[Sample] | None
) -> list[tuple[list[int], list[int], list[bool]]]:
    """What SFT learns: (prompt, answer, whether a token of the answer is the assistant's own)."""
    if isinstance(method, BestOfN):
        return [(prompt, answer, [True] * len(answer)) for prompt, answer in best]
    tokens = bench.new.train.tokens
    masks = tokens["chosen_mask"] if "chosen_mask" in tokens.column_names else (
        [True] * len(answer) for answer in tokens["chosen_ids"]
    )
    sequences = list(zip(tokens["prompt_ids"], tokens["chosen_ids"], masks, strict=True))
    if isinstance(method, Replay):
        count = round(len(sequences) * method.replay_fraction / (1 - method.replay_fraction))
        own = [(prompt, answer, [True] * len(answer)) for prompt, answer in bench.replayed]
        sequences += [own[i % len(own)] for i in range(count)]
    return sequences


def _sft(
    bench: Workbench, sequences: Sequence[tuple[list[int], list[int], list[bool]]],
    model: QAdapterModel, shared: dict[str, Any],
) -> Trainer:
    batch = 2 * bench.config.training.per_device_train_batch_size
    passes = bench.budget / sum(len(prompt) + len(answer) for prompt, answer, _ in sequences)
    args = trl.SFTConfig(
        **shared, max_steps=max(1, round(passes * math.ceil(len(sequences) / batch))),
        per_device_train_batch_size=batch, max_length=None, completion_only_loss=True,
    )
    dataset = Dataset.from_list([
        {
            "input_ids": [*prompt, *answer],
            "completion_mask": [0] * len(prompt) + [int(own) for own in mask],
        }
        for prompt, answer, mask in sequences
    ])
    return _with_our_forward(
        trl.SFTTrainer, PolicyForCausalLM(model), args=args, train_dataset=dataset,
        processing_class=bench.tokenizer,
    )


def _dpo(bench: Workbench, method: DPO, model: QAdapterModel, shared: dict[str, Any]) -> Trainer:
    class PreparedDPOTrainer(trl.DPOTrainer):
        """Takes pairs that are tokenized and cut already, so that all methods see the same."""

        def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
            return dataset

    spec = bench.config.training
    if "chosen_mask" in bench.new.train.tokens.column_names:
        raise QAdapterError(
            "dpo with nll_coef trains with TRL, which takes every token of an answer for the "
            "assistant's: these answers hold turns of others; leave nll_coef out"
        )
    args = trl.DPOConfig(
        **shared, beta=method.beta, loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, method.nll_coef], max_length=None,
        num_train_epochs=spec.num_train_epochs,
        per_device_train_batch_size=spec.per_device_train_batch_size,
        precompute_ref_log_probs=True,  # before the first step the policy is the base
    )
    return _with_our_forward(
        PreparedDPOTrainer, PolicyForCausalLM(model), args=args, processing_class=bench.tokenizer,
        train_dataset=bench.new.train.tokens.select_columns(
            ["prompt_ids", "chosen_ids", "rejected_ids"]
        ),
    )


def _rloo(bench: Workbench, method: RLOO, model: QAdapterModel, shared: dict[str, Any]) -> Trainer:
    args = trl.RLOOConfig(**shared, **_online(bench, method), beta=method.beta)
    part = bench.new.train
    _, prompts = part.prompts(len(part.pairs), 0)
    _require_rendered(method, prompts)

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list[float]:
        prompts = [PlainText(p) if isinstance(p, str) else p for p in prompts]
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        return bench.reward(prompts, texts)

    view = PolicyForCausalLM(model)
    view.config._name_or_path = bench.loaded.location  # TRL loads its reference model by name
    trainer = _with_our_forward(
        trl.RLOOTrainer, view, args=args, reward_funcs=[reward],
        train_dataset=_filled([{"prompt": prompt} for prompt in prompts], method, args),
        processing_class=bench.tokenizer,
    )
    trainer.ref_model = PolicyForCausalLM(model, reference=True).eval()
    return trainer


def _sdft(bench: Workbench, method: SDFT, model: QAdapterModel, shared: dict[str, Any]) -> Trainer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TRLExperimentalWarning)
        from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    class CountingSDFTTrainer(SDFTTrainer):
        """Says how many tokens were seen, as TRL's other trainers do."""

        num_tokens = 0

        def sample_rollouts(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
            batch = super().sample_rollouts(inputs)
            self.num_tokens += int(batch["prompt_mask"].sum() + batch["completion_mask"].sum())
            return batch

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            super().log({**logs, "num_tokens": self.num_tokens}, start_time)

    part = bench.new.train
    if "chosen_mask" in part.tokens.column_names:
        raise QAdapterError("sdft shows the teacher one answer: these hold turns of others")
    prompts = [prompt_of(pair) for pair in part.pairs]
    _require_rendered(method, prompts)
    shown = bench.tokenizer.batch_decode(part.tokens["chosen_ids"][:], skip_special_tokens=True)
    args = SDFTConfig(
        **shared, **_online(bench, method), max_prompt_length=None, disable_dropout=False,
        teacher_prompt_template=method.teacher_prompt_template,
        teacher_model_kind="live",  # no second base is loaded; the teacher is put in below
    )
    trainer = CountingSDFTTrainer(
        PolicyForCausalLM(model), args=args, processing_class=bench.tokenizer,
        train_dataset=_filled([
            {"prompt": prompt, "privileged_context": answer.strip()}
            for prompt, answer in zip(prompts, shown, strict=True)
        ], method, args),
    )
    if method.teacher_model_kind == "base":
        trainer.teacher_model = PolicyForCausalLM(model, reference=True).eval()
    return trainer


def _online(bench: Workbench, method: RLOO | SDFT) -> dict[str, Any]:
    """Training arguments of a method that samples: its steps are counted as if every answer took
    all of ``max_completion_length``."""
    batch = 2 * bench.config.training.per_device_train_batch_size
    lengths = [len(ids) for ids in bench.new.train.tokens["prompt_ids"]]
    mean = sum(lengths) / len(lengths) + method.max_completion_length
    return {
        "num_generations": method.num_generations, "per_device_train_batch_size": batch,
        "max_completion_length": method.max_completion_length,
        "max_steps": max(1, round(bench.budget / (mean * batch))),
    }


def _filled(rows: list[dict[str, Any]], method: RLOO | SDFT, args: Any) -> Dataset:
    """The rows, repeated until they make up a batch: TRL leaves out what does not fill one."""
    needed = args.per_device_train_batch_size // method.num_generations
    return Dataset.from_list(rows * math.ceil(needed / len(rows)))


def _require_rendered(method: Method, prompts: Sequence[Prompt]) -> None:
    """Raises QAdapterError where TRL would make other tokens of a prompt than we do, or none."""
    if any(not _rendered_by_trl(prompt, method) for prompt in prompts):
        raise QAdapterError(
            f"{method.kind} trains with TRL, which renders prompts itself: it needs text, or "
            "messages that end with a user's, without tools and chat_template_kwargs of their own"
        )


def _rendered_by_trl(prompt: Prompt, method: Method) -> bool:
    if isinstance(prompt, str):
        return True
    messages = None if isinstance(prompt, Mapping) else messages_of(prompt)
    if messages is None:
        return False
    last = messages[-1]["role"]  # a teacher reads the preferred answer in a user's message
    return last == "user" if isinstance(method, SDFT) else last != "assistant"


def _with_our_forward(
    trainer_class: type[Trainer], view: PreTrainedModel, **kwargs: Any
) -> Trainer:
    """TRL's trainer of a view, without the ``forward`` it puts in place of the view's own."""
    trainer = trainer_class(view, **kwargs)
    del view.forward
    return trainer
