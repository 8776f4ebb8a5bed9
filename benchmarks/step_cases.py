"""Ways to make one training step of a LoRA, all with the same loss, on the same pairs.

Ours run through ``QAdapterTrainer``, lever by lever; the peers through TRL's DPOTrainer, and eager
as the authors wrote it. The objective is the one at which Q-Adapter is DPO (design §2, fact 1):
policy parametrization, α₀ = α̃ = β, γ = 1, no χ² term, V of the action's own state. The authors' q
is the adapted stream itself; what has to be computed for it is the same.

All models share the tensors of one base. Shapes: 2B sequences of a padded batch (chosen first), T
its length, N actions.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import torch.nn.functional as F
from datasets import Dataset, disable_progress_bars
from harness import Unavailable
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from qadapter import AdapterConfig, ObjectiveConfig, QAdapterConfig, QAdapterModel, QAdapterTrainer
from qadapter.data import PreferenceCollator, tokenize_preferences
from qadapter.objective import find_actions
from qadapter.training.checks import CHECKPOINTING
from qadapter.training.feature_set import FeatureCollator
from qadapter.trunk.gathering import Gathering
from qadapter.trunk.lm_head import trunk
from qadapter.trunk.loading import shell_of
from qadapter.trunk.packing import Packing

BETA = 0.5
OBJECTIVE = ObjectiveConfig(alpha_0=BETA, alpha_tilde=BETA, chi2_coef=0.0, bootstrap="current")
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
LENGTHS = Path(__file__).parent / "lengths"
"""Token counts of real pairs' prompts, chosen and rejected answers (SmolLM2's tokenizer)."""
disable_progress_bars()
_SPECIAL = ("<pad>", "</s>", "<unk>")

Step = Callable[[], None]
"""Forward, backward, update."""


# --- pairs ----------------------------------------------------------------------------------


def draw_pairs(lengths: str, count: int, longest: int, vocabulary: int) -> Dataset:
    """Random words in pairs as long as those of a real dataset.

    Args:
        lengths: a file of ``LENGTHS``. longest: where answers are cut.
        vocabulary: of the model.
    """
    rows = json.loads((LENGTHS / f"{lengths}.json").read_text(encoding="utf-8"))
    generator = torch.Generator().manual_seed(0)

    def words(number: int) -> str:
        ids = torch.randint(len(_SPECIAL), vocabulary, (number,), generator=generator)
        return " ".join(f"w{i}" for i in ids.tolist())

    pairs = []
    for prompt, *answers in rows:
        if len(pairs) < count and prompt + 2 < longest:
            # One token less: an end of turn is added.
            chosen, rejected = (words(max(1, min(n, longest - prompt) - 1)) for n in answers)
            pairs.append({"prompt": words(prompt) + " ", "chosen": chosen, "rejected": rejected})
    return Dataset.from_list(pairs)


def tokenizer_of(vocabulary: int) -> PreTrainedTokenizerFast:
    """One word, one token."""
    words = {word: i for i, word in enumerate(_SPECIAL)}
    words |= {f"w{i}": i for i in range(len(_SPECIAL), vocabulary)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


# --- what they all begin with ---------------------------------------------------------------


class Setting(NamedTuple):
    """One base, the pairs of its steps, and how steps are made."""

    base: PreTrainedModel
    pairs: Dataset
    tokenizer: PreTrainedTokenizerFast
    pairs_a_step: int
    longest: int
    checkpointed: bool

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def depth(self) -> int:
        return self.base.config.num_hidden_layers

    def parts(self, items: Sequence[Any]) -> Iterator[list[Any]]:
        """The items of one step after the other."""
        for start in range(0, len(items), self.pairs_a_step):
            yield [items[i] for i in range(start, min(start + self.pairs_a_step, len(items)))]

    def arguments(self, **changes: Any) -> dict[str, Any]:
        # One option under its new name and its old one; a transformers has one or both.
        fields = {field.name for field in dataclasses.fields(QAdapterConfig)}
        checkpointing = next(name for name in CHECKPOINTING if name in fields)
        return {
            "output_dir": tempfile.mkdtemp(prefix="qadapter-step-"), "report_to": "none",
            "save_strategy": "no", "learning_rate": 1e-5, "max_length": self.longest,
            "per_device_train_batch_size": self.pairs_a_step, "disable_tqdm": True,
            checkpointing: self.checkpointed, "use_cpu": self.device.type == "cpu",
            "bf16": False,  # the base is in the data type it is measured in
            **changes,
        }

    def adapted(self, layers: Sequence[int] | None = None, head: bool = False) -> QAdapterModel:
        """An adapter of its own on the shared base, which does something already."""
        config = AdapterConfig() if head else peft.LoraConfig(
            **LORA, layers_to_transform=None if layers is None else list(layers)
        )
        model = QAdapterModel.from_base(shell_of(self.base), config, OBJECTIVE)
        stir(model)
        return model


def stir(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.data.copy_(noise)


class Way(NamedTuple):
    """One way to make steps on the setting's pairs."""

    steps: list[Step]
    loss: Callable[[int], Tensor]
    """Of the pairs of one step, differentiable."""
    parameters: list[nn.Parameter]
    read_once: float | None = None
    """Seconds that the base took for all pairs before the first step."""

    @classmethod
    def of(
        cls, model: nn.Module, count: int, loss: Callable[[int], Tensor],
        backward: Callable[[int], Any], optimizer: torch.optim.Optimizer,
        read_once: float | None = None,
    ) -> Way:
        """``count`` steps, each a backward and an update."""
        def step(number: int) -> None:
            backward(number)
            optimizer.step()
            optimizer.zero_grad()

        trained = [p for p in model.parameters() if p.requires_grad]
        return cls([partial(step, number) for number in range(count)], loss, trained, read_once)


# --- ours -----------------------------------------------------------------------------------


class PaddedFeatures:
    """Cached features beside a padded batch: every sequence as long as the longest, on its own."""

    def __init__(self, collator: FeatureCollator):
        self.collator = collator

    def __call__(self, examples: list[Any]) -> dict[str, Any]:
        batch = self.collator(examples)
        return batch | {"packing": in_one_block(batch["packing"]), "packed": False}


def in_one_block(packing: Packing) -> Packing:
    block = nn.utils.rnn.pad_sequence(packing.lines, batch_first=True)
    used = [
        torch.arange(len(line)) + row * block.shape[1] for row, line in enumerate(packing.lines)
    ]
    places = Gathering.of(block.numpy().ravel(), torch.cat(used).numpy(), len(packing.ids_N))
    return dataclasses.replace(packing, blocks=[block], block_places=places)


def ours(
    setting: Setting, *, layers: Sequence[int] | None = None, head: bool = False,
    cached: bool = True, padded: bool = False, share: bool = True,
) -> Way:
    """Through the trainer: its collator, its loss, its backward."""
    model = setting.adapted(layers, head)
    if head:
        setting = setting._replace(checkpointed=False)
    arguments = setting.arguments(
        cache_features="memory" if cached else "none", retention_coef=0.0,
    )
    trainer = QAdapterTrainer(
        model, QAdapterConfig(**arguments),
        train_dataset=setting.pairs, processing_class=setting.tokenizer,
        data_collator=PreferenceCollator(0) if padded and not cached else None,
    )
    trainer._move_model_to_device(model, setting.device)
    seconds = timed(trainer.read_base, setting.device) if cached else None
    trainer.get_train_dataloader()  # settles how trunks are run
    trainer.create_optimizer()
    if padded and cached:
        trainer.data_collator.features.share = False
        trainer.data_collator.features = PaddedFeatures(trainer.data_collator.features)
    elif not padded:
        for collator in (trainer.data_collator.features, trainer.data_collator.tokens):
            collator.share = share
    model.train()
    parts = list(setting.parts(trainer.train_dataset))

    def batch(number: int) -> dict[str, Any]:
        found = trainer.data_collator(parts[number])
        return {
            name: x.to(setting.device) if hasattr(x, "to") else x for name, x in found.items()
        }

    def backward(number: int) -> None:
        batches, totals = trainer.get_batch_samples(iter([batch(number)]), 1, setting.device)
        trainer.training_step(model, batches[0], totals)

    return Way.of(
        model, len(parts), lambda n: trainer.compute_loss(model, batch(n)), backward,
        trainer.optimizer, seconds,
    )


def timed(run: Callable[[], Any], device: torch.device) -> float:
    start = time.monotonic()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - start


# --- the peers ------------------------------------------------------------------------------


def eager(setting: Setting, step_loss: Callable[[QAdapterModel, dict[str, Tensor]], Tensor]) -> Way:
    """A loss in plain PyTorch on padded batches."""
    model = setting.adapted()
    if setting.checkpointed:
        model.gradient_checkpointing_enable()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    ids = tokenized(setting)
    parts = list(setting.parts(ids))

    def loss(number: int) -> Tensor:
        batch = PreferenceCollator(0)(parts[number])
        return step_loss(model, {name: x.to(setting.device) for name, x in batch.items()})

    return Way.of(model, len(parts), loss, lambda n: loss(n).backward(), optimizer)


def tokenized(setting: Setting) -> Dataset:
    return tokenize_preferences(
        setting.pairs, setting.tokenizer, max_length=setting.longest
    ).dataset


def authors_loss(model: QAdapterModel, batch: dict[str, Tensor]) -> Tensor:
    """As the authors wrote it: two passes, of which the base's builds a graph too (the embeddings
    require gradients), two products over all positions, float32 copies of both logits."""
    base, inputs = model.base, (batch["input_ids"], batch["attention_mask"])
    base.enable_input_require_grads()
    try:
        adapter_hidden = trunk(base)(*inputs, use_cache=False).last_hidden_state
        with model.adapter.off():
            base_hidden = trunk(base)(*inputs, use_cache=False).last_hidden_state
    finally:
        base.disable_input_require_grads()
    head = base.get_output_embeddings()
    q_STV = head(adapter_hidden).float()
    base_logprobs_STV = head(base_hidden).float().log_softmax(-1).detach()
    value_ST = BETA * ((q_STV + BETA * base_logprobs_STV) / BETA).logsumexp(-1)
    q_ST = q_STV[:, :-1].gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    rewards_ST = (q_ST - value_ST[:, :-1]) * batch["completion_mask"][:, 1:]
    chosen_B, rejected_B = rewards_ST.sum(1).tensor_split(2)
    return -F.logsigmoid(chosen_B - rejected_B).mean()


def one_product_loss(model: QAdapterModel, batch: dict[str, Tensor]) -> Tensor:
    """The adapted stream is the policy: one product in the graph, at completion tokens alone, and
    the base without one."""
    adapter_hidden, base_hidden = model.hidden_streams(batch["input_ids"], batch["attention_mask"])
    actions = find_actions(batch["input_ids"], batch["completion_mask"])
    weight = model.head.weight

    def logprob(hidden: Tensor) -> Tensor:
        logits_NV = F.linear(hidden[actions.sequence_N, actions.state_N], weight).float()
        chosen_N = logits_NV.gather(1, actions.token_N[:, None])[:, 0]
        return chosen_N - logits_NV.logsumexp(-1)

    with torch.no_grad():
        base_logprob_N = logprob(base_hidden)
    rewards_S = actions.sum(BETA * (logprob(adapter_hidden) - base_logprob_N))
    chosen_B, rejected_B = rewards_S.tensor_split(2)
    return -F.logsigmoid(chosen_B - rejected_B).mean()


def trl(setting: Setting) -> Way:
    """TRL's DPOTrainer on the same LoRA, its reference precomputed; padding as it is."""
    try:
        from trl import DPOConfig, DPOTrainer
    except ImportError as error:
        raise Unavailable(f"not installed: {error}") from error
    arguments = DPOConfig(**setting.arguments(beta=BETA, precompute_ref_log_probs=True,
                                              logging_strategy="no"))
    trainer: Any = None

    def build() -> None:
        nonlocal trainer
        trainer = DPOTrainer(
            shell_of(setting.base), args=arguments, train_dataset=setting.pairs,
            processing_class=setting.tokenizer, peft_config=peft.LoraConfig(**LORA),
        )

    seconds = timed(build, setting.device)
    model = trainer.model.to(setting.device)
    stir(model)
    model.train()
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # which train() would set
    columns = {"prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps"}
    rows = [{k: v for k, v in row.items() if k in columns} for row in trainer.train_dataset]
    parts = list(setting.parts(rows))

    def batch(number: int) -> dict[str, Any]:
        return trainer._prepare_inputs(trainer.data_collator(parts[number]))

    return Way.of(
        model, len(parts), lambda n: trainer.compute_loss(model, batch(n)),
        lambda n: trainer.training_step(model, batch(n)), trainer.optimizer, seconds,
    )


# --- by name --------------------------------------------------------------------------------


def top(share: int) -> Callable[[Setting], Way]:
    def build(setting: Setting) -> Way:
        depth = setting.depth
        if depth // share < 1:
            raise Unavailable(f"the base has {depth} blocks")
        return ours(setting, layers=range(depth - depth // share, depth))

    return build


WAYS: dict[str, Callable[[Setting], Way]] = {
    "eager, authors": lambda s: eager(s, authors_loss),
    "eager, one product": lambda s: eager(s, one_product_loss),
    "TRL DPOTrainer": trl,
    "ours, padded, base at every step": lambda s: ours(s, cached=False, padded=True),
    "ours, + base cached": lambda s: ours(s, padded=True),
    "ours, + packed": lambda s: ours(s, share=False),
    "ours, + shared prompts": ours,
    "ours, top L/2 blocks": top(2),
    "ours, top L/4 blocks": top(4),
    "ours, top L/8 blocks": top(8),
    "ours, head": lambda s: ours(s, head=True),
}
"""From what the authors published to what the library does by default, a lever at a time."""
FULL = tuple(WAYS)[:7]
"""Those that train a LoRA in all blocks: the same loss and the same gradients."""
