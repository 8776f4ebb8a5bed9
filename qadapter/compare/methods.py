"""Training one row of a comparison: every method ends in a ``QAdapterModel``.

The same adapter on the same base, the same pairs, the same number of tokens seen. Q-Adapter trains
with ``QAdapterTrainer``, and DPO too: at α₀ = α̃ = β, γ = 1 and no χ² term its loss is DPO's (design
§2, fact 1), on cached features or states and without padding. With a term of TRL's own (NLL) DPO
trains with ``DPOTrainer``. All others train with TRL (``trl_trainers``).
"""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from qadapter.compare.kinds import DPO, Method, QAdapter
from qadapter.compare.workbench import Workbench
from qadapter.errors import QAdapterError
from qadapter.objective import ObjectiveConfig
from qadapter.policy.model import QAdapterModel
from qadapter.system.scratch import scratch_folder
from qadapter.training import QAdapterConfig, QAdapterTrainer
from qadapter.training.own_samples import Sample

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


def train(
    bench: Workbench, method: Method, seed: int, probe: Probe,
    best: Sequence[Sample] | None = None,
) -> Trained:
    """Train a fresh adapter by a method.

    Args:
        probe: measures the model at a few steps; its time is not counted.
        best: the answers that ``BestOfN`` trains on.
    """
    model = bench.model(method, _objective(method), seed)
    recorder = _Recorder(model, probe, bench.config.training.curve_points)
    with scratch_folder(tempfile.gettempdir(), "training") as folder:
        trainer, name = _trainer(bench, method, seed, model, folder, best)
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


@contextlib.contextmanager
def interpolated(model: QAdapterModel, weight: float) -> Iterator[float]:
    """Inside, what the adapter writes with is ``weight`` times what was trained: for a LoRA, W and
    what it became mixed. Gives the strength to decode with."""
    if model.adapts_trunk:
        layers = [layer for layer in model.adapter.layers if isinstance(layer, LoraLayer)]
        for layer in layers:
            layer.scale_layer(weight)
        try:
            yield 1.0
        finally:
            for layer in layers:
                layer.unscale_layer()
        return
    up = model.adapter.up.weight
    trained = up.detach().clone()
    with torch.no_grad():
        up.mul_(weight)
    try:
        yield 1.0
    finally:
        with torch.no_grad():
            up.copy_(trained)


def _objective(method: Method) -> ObjectiveConfig:
    """What the trained model is decoded and scored with. Those without a reward of their own
    get one at α₀ = α̃ = 1, read as DPO's is: log π̃ − log π."""
    if isinstance(method, QAdapter):
        return method.objective()
    alpha = method.beta if isinstance(method, DPO) else 1.0
    return ObjectiveConfig(alpha_0=alpha, alpha_tilde=alpha, chi2_coef=0.0)


def trains_with_trl(method: Method) -> bool:
    """Whether TRL trains it: all but Q-Adapter, and DPO's own loss, where ours is the same and
    faster."""
    if isinstance(method, DPO):
        return method.nll_coef is not None
    return method.trained and not isinstance(method, QAdapter)


def require_trl(methods: Iterable[Method]) -> None:
    """Refuse what trains with TRL where there is none, before anything is run.

    Raises:
        QAdapterError: it does, and TRL is not installed.
    """
    for method in methods:
        if trains_with_trl(method) and importlib.util.find_spec("trl") is None:
            raise QAdapterError(f"{method.kind} trains with TRL: pip install 'qadapter[compare]'")


def _trainer(
    bench: Workbench, method: Method, seed: int, model: QAdapterModel, folder: Path,
    best: Sequence[Sample] | None,
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
    from qadapter.compare.trl_trainers import trl_trainer

    return trl_trainer(bench, method, model, shared, best)


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
