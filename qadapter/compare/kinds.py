"""The methods that a comparison knows, with their options: what a row of it can be."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import ClassVar

from qadapter.adapters.head_adapter import AdapterConfig
from qadapter.objective import ObjectiveConfig


@dataclass(frozen=True)
class AdapterSpec:
    """The trainable parameters, the same for all methods: a head adapter, or LoRA in the trunk."""

    kind: str = "head"
    form: str = "mlp"
    rank: int = 128
    r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.0
    target_modules: list[str] | str = field(default_factory=lambda: ["q_proj", "v_proj"])
    """Names, or all-linear."""
    layers: int | None = None
    """Of a LoRA: so many of the upper blocks get one; none for all."""

    def check(self) -> None:
        """Raises ValueError for options that can't be."""
        if self.kind == "head":
            AdapterConfig(form=self.form, rank=self.rank)
        elif self.kind != "lora":
            raise ValueError(f"kind must be head or lora, got {self.kind!r}")
        if self.layers is not None and (self.kind != "lora" or self.layers < 1):
            raise ValueError(
                f"layers is a number of upper blocks that get a LoRA, got {self.layers} for "
                f"kind {self.kind}"
            )
        if self.r < 1 or self.lora_alpha < 1 or not 0 <= self.lora_dropout < 1:
            raise ValueError(
                "r and lora_alpha must be at least 1 and lora_dropout in [0, 1), got "
                f"{self.r}, {self.lora_alpha} and {self.lora_dropout}"
            )


@dataclass(frozen=True)
class TrainingSpec:
    """What all methods share. The budget is the tokens, prompts included, of both answers of all
    training pairs, times ``num_train_epochs``; every method stops when it has seen as many."""

    num_train_epochs: float = 1.0
    per_device_train_batch_size: int = 8
    """Pairs; a method without pairs gets twice as many sequences."""
    learning_rate: float = 1e-3
    lr_scheduler_type: str = "linear"
    warmup_steps: float = 0.1
    max_grad_norm: float = 1.0
    curve_points: int = 4
    """Steps at which retention is measured during training, the last one included."""


@dataclass(frozen=True)
class Method:
    """One row of the comparison."""

    kind: ClassVar[str]
    trained: ClassVar[bool] = True
    seeds: list[int] | None = None
    """Instead of the comparison's own."""
    learning_rate: float | None = None
    """Instead of the one all methods share."""
    adapter: AdapterSpec | None = None
    """Instead of the comparison's own: to compare adapters; budgets are no longer equal then."""

    def check(self, training: TrainingSpec) -> None:
        """Raises ValueError for options that can't be."""
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")


@dataclass(frozen=True)
class SFT(Method):
    """Supervised fine-tuning on the preferred answers."""

    kind: ClassVar[str] = "sft"


@dataclass(frozen=True)
class Replay(Method):
    """SFT on the preferred answers, mixed with the base's own answers to the old data's prompts."""

    kind: ClassVar[str] = "replay"
    replay_fraction: float = 0.5
    """Share of the sequences that are the base's own."""

    def check(self, training: TrainingSpec) -> None:
        super().check(training)
        if not 0 < self.replay_fraction < 1:
            raise ValueError(f"replay_fraction must be in (0, 1), got {self.replay_fraction}")


@dataclass(frozen=True)
class DPO(Method):
    """Direct preference optimization, sigmoid loss."""

    kind: ClassVar[str] = "dpo"
    beta: float = 0.1
    nll_coef: float | None = None
    """Weight of the preferred answers' cross-entropy, in nats a token (RPO; TRL's "sft" loss)."""
    retention_coef: float = 0.0
    retention_dataset_name: list[str] | str | None = None
    """As Q-Adapter's."""

    def check(self, training: TrainingSpec) -> None:
        super().check(training)
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        if self.nll_coef is not None and not 0 < self.nll_coef < math.inf:
            raise ValueError(f"nll_coef must be positive, got {self.nll_coef}")
        if self.nll_coef is not None and self.retention_coef > 0:
            raise ValueError("nll_coef and retention_coef are not trained together")
        _check_retention(self)


@dataclass(frozen=True)
class RLOO(Method):
    """Reinforcement learning on a reward model with a KL penalty: what stands in for PPO."""

    kind: ClassVar[str] = "rloo"
    beta: float = 0.05
    num_generations: int = 4
    max_completion_length: int = 64

    def check(self, training: TrainingSpec) -> None:
        super().check(training)
        _check_generations(self.num_generations, 2, training)
        if self.beta < 0 or self.max_completion_length < 1:
            raise ValueError("beta must not be negative, and max_completion_length at least 1")


@dataclass(frozen=True)
class SDFT(Method):
    """Self-distillation: at each state of its own answers the model learns the next-token
    distribution of a teacher, which is itself or the base, shown the preferred answer."""

    kind: ClassVar[str] = "sdft"
    num_generations: int = 1
    """Answers that are drawn to a prompt at a time."""
    max_completion_length: int = 64
    teacher_model_kind: str = "base"
    """"base", or "live": the model as it is trained so far."""
    teacher_prompt_template: str = (
        "{prompt}\n\nHere is an example of a good answer:\n\n{privileged_context}\n\n"
        "Now give an answer of your own."
    )
    """What the teacher is asked: {privileged_context} is the preferred answer."""

    def check(self, training: TrainingSpec) -> None:
        super().check(training)
        _check_generations(self.num_generations, 1, training)
        if self.max_completion_length < 1:
            raise ValueError("max_completion_length must be at least 1")
        if self.teacher_model_kind not in ("base", "live"):
            raise ValueError(
                f"teacher_model_kind must be base or live, got {self.teacher_model_kind!r}"
            )
        try:
            asked = self.teacher_prompt_template.format(prompt="\0p", privileged_context="\0a")
        except (LookupError, ValueError) as error:
            raise ValueError(
                "teacher_prompt_template takes {prompt} and {privileged_context} alone, other "
                "braces doubled"
            ) from error
        if "\0p" not in asked or "\0a" not in asked:
            raise ValueError("teacher_prompt_template needs {prompt} and {privileged_context}")


def _check_generations(number: int, least: int, training: TrainingSpec) -> None:
    batch = 2 * training.per_device_train_batch_size
    if number < least or batch % number:
        raise ValueError(
            f"num_generations must be at least {least} and divide a batch of {batch} answers "
            f"(twice per_device_train_batch_size), got {number}"
        )


@dataclass(frozen=True)
class QAdapter(Method):
    """Q-Adapter; all fields of ``ObjectiveConfig``."""

    kind: ClassVar[str] = "q_adapter"
    alpha_0: float = ObjectiveConfig.alpha_0
    alpha_tilde: float = ObjectiveConfig.alpha_tilde
    gamma: float = ObjectiveConfig.gamma
    chi2_coef: float = ObjectiveConfig.chi2_coef
    parametrization: str = ObjectiveConfig.parametrization
    bootstrap: str = ObjectiveConfig.bootstrap
    length_normalization: str = ObjectiveConfig.length_normalization
    mask_alignment: str = ObjectiveConfig.mask_alignment
    retention_coef: float = 0.0
    retention_dataset_name: list[str] | str | None = None
    """Texts that retention is held to: a file of texts, built-in (passages that come with the
    library) or own (the base's own answers to the training prompts), or several of these. None for
    its answers to the old data's training prompts, or where there are none, own."""

    def check(self, training: TrainingSpec) -> None:
        super().check(training)
        self.objective()
        _check_retention(self)

    def objective(self) -> ObjectiveConfig:
        names = [f.name for f in dataclasses.fields(ObjectiveConfig)]
        return ObjectiveConfig(**{name: getattr(self, name) for name in names})


def _check_retention(method: DPO | QAdapter) -> None:
    if not 0 <= method.retention_coef < math.inf:
        raise ValueError(f"retention_coef must not be negative, got {method.retention_coef}")
    if method.retention_dataset_name is None:
        return
    if method.retention_coef == 0:
        raise ValueError("retention_dataset_name has no say where retention_coef is 0")
    if not retention_names(method):
        raise ValueError("retention_dataset_name is empty")


def retention_names(method: Method) -> list[str]:
    """The texts that a method is held to, by name; empty where it says nothing of its own."""
    named = getattr(method, "retention_dataset_name", None)
    return [named] if isinstance(named, str) else list(named or ())


@dataclass(frozen=True)
class Prompted(Method):
    """A control that is not trained: the base, asked for the new preference in words."""

    kind: ClassVar[str] = "prompted"
    trained: ClassVar[bool] = False
    system: str = ""
    """The system message; judges see the prompt without it."""


@dataclass(frozen=True)
class OfAnother(Method):
    """A row that is made of another one, run by run of the same seed."""

    of: str = ""
    """Name of that row, a trained one."""


@dataclass(frozen=True)
class Reversed(OfAnother):
    """A control that is not trained: another row's head adapter with its change turned round,
    h_a = h_b − f(h_b). What is learned should be lost; what gains here too is no gain."""

    kind: ClassVar[str] = "reversed"
    trained: ClassVar[bool] = False


@dataclass(frozen=True)
class Interpolated(OfAnother):
    """Not trained: the weights of the base and of another row mixed. What an adapter writes with
    (LoRA's B, a head's ``up``) is zero in the base; here it is a weight's share of what was
    trained. The weight is this row's dial."""

    kind: ClassVar[str] = "interpolate"
    trained: ClassVar[bool] = False
    weights: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.75, 1.0, 1.5])
    """0 is the base, 1 the other row's policy and always among them."""

    def check(self, training: TrainingSpec) -> None:
        super().check(training)
        if not all(0 <= w < math.inf for w in self.weights):
            raise ValueError(f"weights must not be negative, got {self.weights}")


@dataclass(frozen=True)
class BestOfN(OfAnother):
    """SFT on the base's own answers to the training prompts: of n to each prompt, the one that
    another row's implicit reward puts first. Nearly on-policy, and no reward model is trained."""

    kind: ClassVar[str] = "best_of_n"
    n: int = 4

    def check(self, training: TrainingSpec) -> None:
        super().check(training)
        if self.n < 2:
            raise ValueError(f"n must be at least 2, got {self.n}")


METHODS: dict[str, type[Method]] = {
    m.kind: m for m in (
        SFT, Replay, DPO, RLOO, SDFT, QAdapter, BestOfN, Prompted, Reversed, Interpolated,
    )
}
