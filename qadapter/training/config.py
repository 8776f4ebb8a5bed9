"""QAdapterConfig: transformers' TrainingArguments with the objective, the adapter and the data."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import LoraConfig
from transformers import PreTrainedModel, TrainingArguments

from qadapter.adapters.head_adapter import HEAD_FORMS, AdapterConfig
from qadapter.adapters.peft_config import ALL_LINEAR, in_upper_blocks
from qadapter.errors import QAdapterError
from qadapter.objective import ObjectiveConfig
from qadapter.training import checks
from qadapter.trunk.shells import depth_of

_OBJECTIVE = tuple(f.name for f in dataclasses.fields(ObjectiveConfig))
_CHOICES = {
    "adapter_kind": ("head", "lora"),
    "truncation_mode": ("keep_start", "keep_end"),
    "on_bad_row": ("drop", "raise"),
    "cache_features": ("auto", "memory", "disk", "none"),
}
RETENTION_COEF, OWN_SAMPLES_COEF = 30.0, 10.0
"""Of the retention term where none is named; the second where it holds to the base's own samples.
Measured: docs/compare.md, How to keep and Through the default adapter."""
_AT_LEAST = {
    **dict.fromkeys((
        "feature_batch_tokens", "feature_shard_mb", "workspace_mb", "pad_to_multiple_of",
        "dataset_num_proc", "retention_states", "lora_r", "lora_alpha",
        "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
        "eval_accumulation_steps", "dataloader_prefetch_factor", "num_completions_to_print",
        "max_completion_length",
    ), 1),
    **dict.fromkeys((
        "learning_rate", "warmup_steps", "max_grad_norm", "weight_decay", "adam_epsilon",
        "logging_steps", "eval_steps", "save_steps", "eval_delay", "dataloader_num_workers",
        "seed", "data_seed", "retention_coef", "shuffle_buffer",
    ), 0),
    "max_length": 2,  # a token of the prompt, one of the answer
    "max_steps": -1,  # transformers' own default: not set
}
_MOST_SEED = 2**32 - 1
"""NumPy takes no more."""
_OF_ONE_KIND: dict[str, dict[str, Any]] = {
    "head": {"adapter_form": AdapterConfig.form, "adapter_rank": AdapterConfig.rank},
    "lora": {
        "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "lora_target_modules": ALL_LINEAR,
        "lora_layers": None,
    },
}
"""Options that one kind of adapter has, and what they are where none is given."""
LORA_LAYERS = 2
"""Upper blocks with a LoRA where none are named, or all of a base that has fewer."""


def default_learning_rate(blocks: int | None) -> float:
    """What ranked held-out pairs best, with the least log loss, through an adapter in so many of
    the upper blocks, or a head adapter (none): docs/compare.md, What to train."""
    if blocks is None or blocks > 8:
        return 3e-4
    return 3e-3 if blocks <= 4 else 1e-3


def _objective(name: str, help_text: str, **metadata: Any) -> Any:
    return field(
        default=getattr(ObjectiveConfig, name), metadata={"help": help_text, **metadata}
    )


@dataclass
class QAdapterConfig(TrainingArguments):
    """Arguments of ``QAdapterTrainer``. Names follow TRL; those of TrainingArguments all apply.

    Defaults differ from TrainingArguments where preferences want it: a ``learning_rate`` by what is
    trained, settled by the trainer, one epoch, warm-up over a tenth of the steps,
    ``logging_steps`` 10; and non-finite losses stop the run instead of being filtered from the
    logs. What a head adapter has, or a LoRA, is None in the arguments of the other.

    Raises:
        QAdapterError: an option that can't be honoured, or a value out of range; it is named.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs",
    ]

    # --- defaults that differ from TrainingArguments ---
    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Initial learning rate of the optimizer. Default: by what is trained, as "
            "measured (docs/compare.md): 3e-3 for a LoRA in up to 4 blocks, 1e-3 up to 8, else "
            "3e-4."
        },
    )
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the pairs."})
    warmup_steps: float = field(
        default=0.1,
        metadata={"help": "Steps of linear warm-up: a count, or a share of all steps below 1."},
    )
    logging_steps: float = field(
        default=10,
        metadata={"help": "Steps between two logs: a count, or a share of all steps below 1."},
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "Filter non-finite losses from the logs. They stop the run, so: false."},
    )

    # --- model ---
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments for loading the base (dtype, revision, device_map, "
            "attn_implementation, ...), as JSON; for a model given by name."
        },
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run Python code that comes with a model or tokenizer."},
    )
    chat_template_path: str | None = field(
        default=None,
        metadata={
            "help": "Chat template instead of the tokenizer's own: a .jinja file, a folder or hub "
            "name whose tokenizer has one, or plain (roles as words, for bases without one). It is "
            "saved with the adapter.",
            "flag": "chat_template",
        },
    )
    adapter_kind: str | None = field(
        default=None,
        metadata={
            "help": "What is trained: a 'lora' in the trunk, from its lowest block on, or a 'head' "
            "adapter behind it: half the time, less learned (docs/compare.md). Default: lora, "
            "unless an option of head adapters is given.",
            "choices": ["head", "lora"],
        },
    )
    adapter_form: str | None = field(
        default=None,
        metadata={
            "help": "Form of the head adapter: 'linear' merges into lm_head and can be served "
            "anywhere; 'block' (a gated bottleneck before the final norm) learns more and is "
            "exported exactly, as one decoder layer more, for bases of Llama's kind; 'mlp' (the "
            "same behind the norm) can't be merged. Default: linear.",
            "choices": list(HEAD_FORMS),
        },
    )
    adapter_rank: int | None = field(
        default=None,
        metadata={"help": "Width of the head adapter's bottleneck. Default: 128."},
    )
    lora_r: int | None = field(default=None, metadata={"help": "Rank of the LoRA. Default: 8."})
    lora_alpha: int | None = field(
        default=None,
        metadata={"help": "The LoRA's product is scaled by this over its rank. Default: 16."},
    )
    lora_dropout: float | None = field(
        default=None,
        metadata={"help": "Dropout before the LoRA's product, in training. Default: 0."},
    )
    lora_target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Layers that get a LoRA: [q_proj, v_proj], or a string as PEFT reads it "
                  "(all-linear, or a pattern). Default: all-linear."},
    )
    lora_layers: str | int | None = field(
        default=None,
        metadata={"help": "Blocks that get a LoRA: 8 or top:8 for the upper eight, whose input is "
                  "then computed once, or all. Default: 2, which learned as much as more."},
    )

    # --- objective: ObjectiveConfig's fields and defaults ---
    alpha_0: float = _objective("alpha_0", "Weight of the base policy (the paper's λ·α₁).")
    alpha_tilde: float = _objective("alpha_tilde", "Entropy weight of the customised policy.")
    gamma: float = _objective("gamma", "Discount, between 0 and 1.")
    chi2_coef: float = _objective(
        "chi2_coef", "Weight of the mean squared reward (the authors' beta)."
    )
    parametrization: str = _objective(
        "parametrization",
        "'policy': the adapted stream is the customised policy's logits. 'q': it is the residual "
        "Q-function itself, as in the authors' code.",
        choices=["policy", "q"],
    )
    bootstrap: str = _objective(
        "bootstrap",
        "State whose value is subtracted from q: the 'next' one (the paper) or the 'current' one "
        "(the authors' code).",
        choices=["next", "current"],
    )
    length_normalization: str = _objective(
        "length_normalization",
        "Divisor of a sequence's summed reward: 'none', its number of tokens ('completion') or "
        "the padded length ('padded', the authors' code).",
        choices=["none", "completion", "padded"],
    )
    mask_alignment: str = _objective(
        "mask_alignment",
        "'action' scores every completion token; 'state' scores the outputs at completion tokens, "
        "as the authors' code does.",
        choices=["action", "state"],
    )

    # --- retention (ours, not the paper's) ---
    retention_coef: float | None = field(
        default=None,
        metadata={
            "help": "Weight of KL(base||customised), in nats a token, at states of unrelated text: "
            "less drift where the preferences have no say. Default: 30, which was measured "
            "(docs/compare.md: 0.02 of what a DPO of equal gain forgets); 10 with texts 'own'. 0: "
            "off."
        },
    )
    retention_states: int = field(
        default=128, metadata={"help": "States of the retention texts drawn at every step."}
    )

    # --- samples while training ---
    log_completions: bool = field(
        default=False,
        metadata={"help": "Whether some held-out prompts are answered before the first step and at "
                  "every evaluation: printed, and logged to completions.jsonl and the trackers of "
                  "report_to."},
    )
    num_completions_to_print: int = field(
        default=2, metadata={"help": "Held-out prompts of log_completions."}
    )
    max_completion_length: int = field(
        default=64, metadata={"help": "Most tokens of each of their answers."}
    )

    # --- data ---
    max_length: int | None = field(
        default=1024, metadata={"help": "Most tokens of prompt and answer; none for no limit."}
    )
    truncation_mode: str = field(
        default="keep_start",
        metadata={
            "help": "What is kept of a sequence that is too long: 'keep_start' cuts the answer's "
            "end, 'keep_end' the prompt's start.",
            "choices": ["keep_start", "keep_end"],
        },
    )
    on_bad_row: str = field(
        default="drop",
        metadata={
            "help": "Pairs that can't be used: 'drop' and count them, or 'raise' at the first.",
            "choices": ["drop", "raise"],
        },
    )
    pad_to_multiple_of: int | None = field(
        default=None, metadata={"help": "Round padded lengths up to a multiple of this."}
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that tokenize; none for the main one alone."}
    )
    shuffle_buffer: int | None = field(
        default=None,
        metadata={"help": "Pairs of a stream among which the next one is drawn (1000); 0: as they "
                  "come."},
    )

    # --- features of the frozen base, and memory ---
    cache_features: str = field(
        default="auto",
        metadata={
            "help": "Where what the frozen base says is kept, so that the base runs once: "
            "'memory', 'disk', 'none' (the base runs at every step); 'auto' takes memory if it "
            "has ample room, else disk.",
            "choices": ["auto", "memory", "disk", "none"],
        },
    )
    padding_free: bool | None = field(
        default=None,
        metadata={"help": "Run the trunk on one row of tokens, without padding and with each "
                  "prompt once. Default: where the base's attention can, which is checked; true: "
                  "or else stop; false: pad."},
    )
    feature_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of features (and of the base's own samples) on disk; default: in "
                  "qadapter's own cache."},
    )
    feature_batch_tokens: int = field(
        default=4096, metadata={"help": "Tokens in a batch of the pass that computes features."}
    )
    feature_shard_mb: int = field(
        default=256, metadata={"help": "Size of one file of cached features, in MiB."}
    )
    workspace_mb: int = field(
        default=512, metadata={"help": "Most memory for logits, in MiB."}
    )

    def __post_init__(self) -> None:
        # First: transformers would trip over some of these without a name.
        self._check_ranges()
        checks.check_supported(self)
        if self.bf16 and not torch.accelerator.is_available():
            self.use_cpu = True  # else transformers takes it for a GPU's
        try:
            super().__post_init__()
        except (ValueError, TypeError, ImportError, OSError) as error:
            raise QAdapterError(str(error)) from error
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise QAdapterError(
                f"train_sampling_strategy={self.train_sampling_strategy!r} can't be honoured: "
                "choose 'random' or 'sequential' (padding costs nothing with cached features)"
            )
        if "inputs" in self.include_for_metrics:
            raise QAdapterError("include_for_metrics can't hold 'inputs': features are no tokens")
        if self.adapter_kind is None:
            head = any(getattr(self, name) is not None for name in _OF_ONE_KIND["head"])
            self.adapter_kind = "head" if head else "lora"
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise QAdapterError(
                    f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        self._settle_adapter()
        checks.check_reporting(self)
        checks.check_optimizer(self)
        try:
            self.objective_config()
            self.adapter_config()
        except ValueError as error:
            raise QAdapterError(str(error)) from error
        # Pinned memory serves copies to an accelerator; without one torch only warns about it.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()

    def _settle_adapter(self) -> None:
        """The options of its kind that were not given; the other kind has none."""
        for kind, options in _OF_ONE_KIND.items():
            for name, default in options.items():
                if getattr(self, name) is None and self.adapter_kind == kind:
                    setattr(self, name, default)
                elif getattr(self, name) is not None and self.adapter_kind != kind:
                    raise QAdapterError(
                        f"{name} is for adapter_kind {kind}, and this is {self.adapter_kind}"
                    )
        if self.adapter_kind == "lora":
            if not 0 <= self.lora_dropout < 1:
                raise QAdapterError(f"lora_dropout must be in [0, 1), got {self.lora_dropout}")
            self._upper_blocks(LORA_LAYERS)

    def _check_ranges(self) -> None:
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:  # NaN is neither
                raise QAdapterError(f"{name} must be at least {least}, got {value}")
            # Clipping to infinity is a way to log the norm and not to clip.
            if value == math.inf and name != "max_grad_norm":
                raise QAdapterError(f"{name} must be finite")
        if not 0 < self.num_train_epochs < math.inf:
            raise QAdapterError(f"num_train_epochs must be positive, got {self.num_train_epochs}")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise QAdapterError(f"{name} must be from 0 to below 1, got {getattr(self, name)}")
        if self.seed > _MOST_SEED:
            raise QAdapterError(f"seed must be at most {_MOST_SEED}, got {self.seed}")

    def objective_config(self) -> ObjectiveConfig:
        """The objective these arguments describe."""
        return ObjectiveConfig(**{name: getattr(self, name) for name in _OBJECTIVE})

    def adapter_config(self, base: PreTrainedModel | None = None) -> AdapterConfig | LoraConfig:
        """The adapter these arguments describe.

        Args:
            base: what it is for, whose depth ``lora_layers`` counts from; without, all blocks.

        Raises:
            QAdapterError: ``lora_layers`` names more blocks than the base has, or
                ``lora_target_modules`` is a pattern then.
        """
        if self.adapter_kind == "head":
            return AdapterConfig(form=self.adapter_form, rank=self.adapter_rank)
        number = None if base is None else self._upper_blocks(depth_of(base))
        return LoraConfig(
            r=self.lora_r, lora_alpha=self.lora_alpha, lora_dropout=self.lora_dropout,
            task_type="CAUSAL_LM",
            **in_upper_blocks(number, self.lora_target_modules, base, "lora_layers"),
        )

    def _upper_blocks(self, depth: int) -> int | None:
        """How many of a base's blocks; none for all, or where a pattern says so itself."""
        targets = self.lora_target_modules
        by_pattern = isinstance(targets, str) and targets.lower() != ALL_LINEAR
        if self.lora_layers == "all" or (self.lora_layers is None and by_pattern):
            return None
        if self.lora_layers is None:
            return min(LORA_LAYERS, depth)
        number = str(self.lora_layers).removeprefix("top:")
        if not number.isdecimal() or int(number) < 1:
            raise QAdapterError(
                "lora_layers must be a number of upper blocks (8 or top:8) or all, got "
                f"{self.lora_layers!r}"
            )
        return int(number)

    def set_objective(self, objective: ObjectiveConfig) -> None:
        """Take over the objective of a model that has its own."""
        for name in _OBJECTIVE:
            setattr(self, name, getattr(objective, name))
