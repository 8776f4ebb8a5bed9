"""Training one row of a comparison: every method ends in a ``QAdapterModel``.

The same adapter on the same base, the same pairs, the same number of tokens seen. Q-Adapter trains
with ``QAdapterTrainer``, and DPO too: at α₀ = α̃ = β, γ = 1 and no χ² term its loss is DPO's (design
§2, fact 1), on cached features or states and without padding. With a term of TRL's own (NLL) DPO
trains with ``DPOTrainer``. SFT, replay and RLOO train with TRL, on ``PolicyForCausalLM``.
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from qadapter.compare.config import DPO, RLOO, SFT, Method, QAdapter, Replay
from qadapter.compare.workbench import Workbench
from qadapter.data import PlainText, Prompt, messages_of
from qadapter.errors import QAdapterError
from qadapter.objective import ObjectiveConfig
from qadapter.policy.model import QAdapterModel
from qadapter.system.scratch import scratch_folder
from qadapter.training import QAdapterConfig, QAdapterTrainer

Probe = Callable[[QAdapterModel], dict[str, Any]]


class Trained(NamedTuple):
    model: QAdapterModel
    trained_by: str
    steps: int
    tokens: int
    """Seen, prompts included."""
    seconds: float
    processor_seconds: float
    """Of all threads; what it costs on a machine that others share."""
    curve: list[dict[str, Any]]
    """What the probe found during training, with ``step`` and ``tokens``."""


def train(bench: Workbench, method: Method, seed: int, probe: Probe) -> Trained:
    """Train a fresh adapter by a method.

    Args:
        probe: measures the model at a few steps; its time is not counted.
    """
    model = bench.model(method, _objective(method), seed)
    recorder = _Recorder(model, probe, bench.config.training.curve_points)
    with scratch_folder(tempfile.gettempdir(), "training") as folder:
        trainer, name = _trainer(bench, method, seed, model, folder)
        for callback in (ProgressCallback, PrinterCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(recorder)
        start, start_cpu = time.perf_counter(), time.process_time()
        trainer.train()
    tokens = recorder.tokens or round(bench.budget)
    for point in recorder.curve:
        point["tokens"] = round(tokens * point["step"] / trainer.state.global_step)
    return Trained(
        model.eval(), name, trainer.state.global_step, tokens,
        time.perf_counter() - start - recorder.seconds,
        time.process_time() - start_cpu - recorder.processor_seconds, recorder.curve,
    )


def reversed_head(model: QAdapterModel) -> QAdapterModel:
    """The model, its head adapter's change turned round in place: h_a = h_b − f(h_b)."""
    with torch.no_grad():
        model.adapter.up.weight.neg_()
    return model


def _objective(method: Method) -> ObjectiveConfig:
    """What the trained model is decoded and scored with. SFT and RLOO have no reward of their own:
    at α₀ = α̃ = 1 theirs reads as DPO's does, log π̃ − log π."""
    if isinstance(method, QAdapter):
        return method.objective()
    alpha = method.beta if isinstance(method, DPO) else 1.0
    return ObjectiveConfig(alpha_0=alpha, alpha_tilde=alpha, chi2_coef=0.0)


def trains_with_trl(method: Method) -> bool:
    """Whether TRL trains it: all but Q-Adapter, and DPO's own loss, where ours is the same and
    faster."""
    if isinstance(method, DPO):
        return method.nll_coef is not None
    return isinstance(method, SFT | Replay | RLOO)


def require_trl(methods: Iterable[Method]) -> None:
    """Refuse what trains with TRL where there is none, before anything is run.

    Raises:
        QAdapterError: it does, and TRL is not installed.
    """
    for method in methods:
        if trains_with_trl(method) and importlib.util.find_spec("trl") is None:
            raise QAdapterError(f"{method.kind} trains with TRL: pip install 'qadapter[compare]'")


def _trainer(
    bench: Workbench, method: Method, seed: int, model: QAdapterModel, folder: Path
) -> tuple[Trainer, str]:
    spec = bench.config.training
    shared = {
        "output_dir": str(folder), "seed": seed, "learning_rate": method.learning_rate
        or spec.learning_rate, "lr_scheduler_type": spec.lr_scheduler_type,
        "warmup_steps": spec.warmup_steps, "max_grad_norm": spec.max_grad_norm,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_steps": 1,
    }
    if isinstance(method, QAdapter):
        return _qadapter_trainer(bench, method, model, shared), "QAdapterTrainer"
    if not trains_with_trl(method):
        name = "QAdapterTrainer at chi2_coef 0, alpha_0 = alpha_tilde = beta: DPO's loss"
        return _qadapter_trainer(bench, method, model, shared), name
    import trl

    # Gradients of a frozen trunk need no recomputing, and the base keeps its own dtype.
    shared |= {
        "bf16": False, "gradient_checkpointing": False, "logging_nan_inf_filter": False,
        "dataloader_pin_memory": torch.accelerator.is_available(),
    }
    build, name = {
        SFT: (_sft, "SFTTrainer"), Replay: (_sft, "SFTTrainer"), DPO: (_dpo, "DPOTrainer"),
        RLOO: (_rloo, "RLOOTrainer"),
    }[type(method)]
    return build(bench, method, model, shared), f"TRL {trl.__version__} {name}"


def _qadapter_trainer(
    bench: Workbench, method: QAdapter | DPO, model: QAdapterModel, shared: dict[str, Any]
) -> Trainer:
    spec = bench.config.training
    args = QAdapterConfig(
        **shared, num_train_epochs=spec.num_train_epochs, max_length=bench.config.data.max_length,
        per_device_train_batch_size=spec.per_device_train_batch_size, cache_features="disk",
        retention_coef=method.retention_coef,
    )
    return QAdapterTrainer(
        model, args, train_dataset=bench.new.train.tokens, processing_class=bench.tokenizer,
        retention_dataset=bench.retention_texts(method),
    )


# --- TRL ----------------------------------------------------------------------------------------


def _view(model: QAdapterModel, reference: bool = False) -> PreTrainedModel:
    from qadapter.compare.policy_view import PolicyForCausalLM

    return PolicyForCausalLM(model, reference)


def _sft(
    bench: Workbench, method: SFT | Replay, model: QAdapterModel, shared: dict[str, Any]
) -> Trainer:
    """On preferred answers; replay mixes in what the base itself says to the old data's prompts."""
    import trl

    tokens, spec = bench.new.train.tokens, bench.config.training
    # (prompt, answer, whether a token of the answer is the assistant's own)
    masks = tokens["chosen_mask"] if "chosen_mask" in tokens.column_names else (
        [True] * len(answer) for answer in tokens["chosen_ids"]
    )
    sequences = list(zip(tokens["prompt_ids"], tokens["chosen_ids"], masks, strict=True))
    if isinstance(method, Replay):
        count = round(len(sequences) * method.replay_fraction / (1 - method.replay_fraction))
        own = [(prompt, answer, [True] * len(answer)) for prompt, answer in bench.replayed]
        sequences += [own[i % len(own)] for i in range(count)]
    batch = 2 * spec.per_device_train_batch_size
    mean = sum(len(prompt) + len(answer) for prompt, answer, _ in sequences) / len(sequences)
    args = trl.SFTConfig(
        **shared, max_steps=max(1, round(bench.budget / (mean * batch))),
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
        trl.SFTTrainer, _view(model), args=args, train_dataset=dataset,
        processing_class=bench.tokenizer,
    )


def _dpo(bench: Workbench, method: DPO, model: QAdapterModel, shared: dict[str, Any]) -> Trainer:
    import trl

    class PreparedDPOTrainer(trl.DPOTrainer):
        """Takes pairs that are tokenized and cut already, so that all methods see the same."""

        def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
            return dataset

    spec = bench.config.training
    if "chosen_mask" in bench.new.train.tokens.column_names:
        raise QAdapterError(
            "dpo with nll_coef trains with TRL, which takes every token of an answer for the "
            "assistant's: these answers hold turns of others"
        )
    args = trl.DPOConfig(
        **shared, beta=method.beta, loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, method.nll_coef], max_length=None,
        num_train_epochs=spec.num_train_epochs,
        per_device_train_batch_size=spec.per_device_train_batch_size,
        precompute_ref_log_probs=True,  # before the first step the policy is the base
    )
    return _with_our_forward(
        PreparedDPOTrainer, _view(model), args=args, processing_class=bench.tokenizer,
        train_dataset=bench.new.train.tokens.select_columns(
            ["prompt_ids", "chosen_ids", "rejected_ids"]
        ),
    )


def _rloo(bench: Workbench, method: RLOO, model: QAdapterModel, shared: dict[str, Any]) -> Trainer:
    import trl

    spec, part = bench.config.training, bench.new.train
    batch = 2 * spec.per_device_train_batch_size
    lengths = [len(ids) for ids in part.tokens["prompt_ids"]]
    mean = sum(lengths) / len(lengths) + method.max_completion_length
    args = trl.RLOOConfig(
        **shared, beta=method.beta, num_generations=method.num_generations,
        max_completion_length=method.max_completion_length, per_device_train_batch_size=batch,
        max_steps=max(1, round(bench.budget / (mean * batch))),
    )
    _, prompts = part.prompts(len(part.pairs), 0)
    if any(not _rendered_by_trl(prompt) for prompt in prompts):
        raise QAdapterError(
            "rloo trains with TRL, which renders prompts itself: it needs text, or messages that "
            "end with a user's, without tools and chat_template_kwargs of their own"
        )

    def reward(prompts: Sequence[Any], completions: Sequence[Any], **kwargs: Any) -> list[float]:
        prompts = [PlainText(p) if isinstance(p, str) else p for p in prompts]
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        return bench.reward(prompts, texts)

    view = _view(model)
    view.config._name_or_path = bench.loaded.location  # TRL loads its reference model by name
    trainer = _with_our_forward(
        trl.RLOOTrainer, view, args=args, reward_funcs=[reward],
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=bench.tokenizer,
    )
    trainer.ref_model = _view(model, reference=True).eval()
    return trainer


def _rendered_by_trl(prompt: Prompt) -> bool:
    """Whether TRL makes the tokens of a prompt that we do."""
    if isinstance(prompt, str):
        return True
    messages = None if isinstance(prompt, Mapping) else messages_of(prompt)
    return messages is not None and messages[-1]["role"] != "assistant"


def _with_our_forward(
    trainer_class: type[Trainer], view: PreTrainedModel, **kwargs: Any
) -> Trainer:
    """TRL's trainer of a view, without the ``forward`` it puts in place of the view's own."""
    trainer = trainer_class(view, **kwargs)
    del view.forward
    return trainer


class _Recorder(TrainerCallback):
    """Probes the model at evenly spaced steps, and reads off how many tokens were seen."""

    def __init__(self, model: QAdapterModel, probe: Probe, points: int):
        self.model, self.probe, self.points = model, probe, points
        self.curve: list[dict[str, Any]] = []
        self.tokens = 0
        self.seconds = self.processor_seconds = 0.0

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        total = state.max_steps
        wanted = {round(total * k / self.points) for k in range(1, self.points + 1)}
        if state.global_step not in wanted:
            return
        start, start_cpu = time.perf_counter(), time.process_time()
        training = self.model.training
        # Sampling and dropout of the training go on as if nothing had been measured.
        with torch.random.fork_rng():
            self.curve.append({"step": state.global_step, **self.probe(self.model)})
        self.model.train(training)
        self.seconds += time.perf_counter() - start
        self.processor_seconds += time.process_time() - start_cpu

    def on_log(self, args, state, control, logs=None, **kwargs: Any) -> None:
        self.tokens = int((logs or {}).get("num_tokens", self.tokens))
