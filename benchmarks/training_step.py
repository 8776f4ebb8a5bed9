"""What does a training step cost: time, memory, and the loss's share of it?

Llama-3.1-8B's architecture (on a CPU SmolLM2-135M's) with random weights, four
preference pairs whose longest sequence has 512 or 2,048 tokens, one optimizer step: forward,
backward, AdamW.

LoRA of rank 8 on q and v:
  eager, authors       all positions' logits of both streams in float32, both streams in a graph
  eager, one product   answers' states only, W·h_z once with a graph, the base without one
  ours, padded         the library's own batch_loss on a padded batch
  ours, packed         no padding, a prompt run once for both of its answers
A linear head adapter:
  ours, head           batch_loss on a padded batch; the trunk runs without a graph
  ours, head, cached   batch_loss on cached features: no trunk at all

Each minimises the same loss. *trunk* is the step without head and loss, in the same run; what it
leaves of the step is the loss's share.

    python benchmarks/training_step.py
    python benchmarks/training_step.py --device cpu --lengths 256
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import peft
import report
import torch
import torch.nn.functional as F
from generation import SHAPES
from harness import (
    MEBIBYTE,
    Case,
    Recorder,
    Timing,
    Unavailable,
    chosen,
    free,
    interleave,
    parser,
    peak_cuda,
    peak_extra_memory,
    reason,
    start,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from qadapter import AdapterConfig, ObjectiveConfig, QAdapterModel
from qadapter.data.collation import PreferenceCollator
from qadapter.objective import find_actions, sequence_loss
from qadapter.training.losses import batch_loss
from qadapter.trunk.lm_head import trunk
from qadapter.trunk.packing import Packing, can_pack, hidden_states
from qadapter_kernels import linear_logsumexp

MODELS = SHAPES | {
    "SmolLM2-135M": {
        "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}
DEFAULT = {"cpu": ("SmolLM2-135M", (512,)), "cuda": ("Llama-3.1-8B", (512, 2048))}
PROVIDERS = (
    "ours, padded", "ours, packed", "eager, authors", "eager, one product", "ours, head",
    "ours, head, cached",
)
PAIRS = 4
ALPHA = 0.5
OBJECTIVE = ObjectiveConfig(
    alpha_0=ALPHA, alpha_tilde=ALPHA, parametrization="q", bootstrap="current",
    length_normalization="completion",
)
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}

Batch = dict[str, Tensor]
Streams = tuple[Tensor, Tensor]
"""Adapted and base hidden states."""


def draw_pairs(length: int, vocabulary: int) -> list[dict[str, Tensor]]:
    """Prompts of 10 to 60% of the length; answers' lengths log-normal around a third of what is
    left, as chats' are skewed; one answer fills its sequence."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for number in range(PAIRS):
        prompt = int(length * (0.1 + 0.5 * torch.rand((), generator=generator)))
        room = length - prompt
        sizes = (room / 3 * (0.7 * torch.randn(2, generator=generator)).exp()).int()
        sizes = sizes.clamp(8, room).tolist()
        if number == 0:
            sizes[1] = room
        pairs.append({
            f"{name}_ids": torch.randint(vocabulary, (size,), generator=generator)
            for name, size in zip(("prompt", "chosen", "rejected"), (prompt, *sizes), strict=True)
        })
    return pairs


class Step(NamedTuple):
    """What one optimizer step is made of."""

    loss: Callable[[], Tensor]
    trunk: str
    """Which of the trunks it runs."""
    around: Callable[[], Any] = contextlib.nullcontext
    """Entered before the step and left within it."""


class Bench:
    """A model with one adapter, a batch, and the steps that train it."""

    def __init__(
        self, name: str, kind: str, length: int, device: str, dtype: torch.dtype = torch.bfloat16
    ):
        torch.manual_seed(0)
        config = LlamaConfig(**MODELS[name], max_position_embeddings=8192)
        with torch.device(device):
            base = AutoModelForCausalLM.from_config(config, dtype=dtype)
        adapter = peft.LoraConfig(**LORA) if kind == "lora" else AdapterConfig()
        self.model = QAdapterModel.from_base(base, adapter, OBJECTIVE).train()
        self.device = device
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5)
        self.checkpointed = False
        self.set_length(length)

    def set_length(self, length: int, checkpointed: bool = False) -> None:
        model = self.model
        self.pairs = draw_pairs(length, model.config.vocab_size)
        batch = PreferenceCollator(pad_token_id=0)(self.pairs)
        self.tokens = int(batch["attention_mask"].sum())
        self.batch = {name: x.to(self.device) for name, x in batch.items()}
        self.actions = find_actions(self.batch["input_ids"], self.batch["completion_mask"])
        if checkpointed and model.adapts_trunk and not self.checkpointed:
            model.gradient_checkpointing_enable()
            model.train()
            self.checkpointed = True
        if model.adapts_trunk:
            self.packing, self.packed_states_N = self._pack()
        else:
            self.features = self._features()

    def _pack(self) -> tuple[Packing, Tensor]:
        """The pairs in one row, and where in it each action's state is."""
        texts = [
            torch.cat([pair["prompt_ids"], pair[f"{side}_ids"]])
            for pair in self.pairs for side in ("chosen", "rejected")
        ]
        packing = Packing.of(texts, torch.device(self.device))
        states = [
            line[len(pair["prompt_ids"]) - 1 : -1]
            for side in range(2)
            for pair, line in zip(self.pairs, packing.lines[side::2], strict=True)
        ]
        return packing, torch.cat(states).to(self.device)

    @torch.no_grad()
    def _features(self) -> Batch:
        """What the library's feature cache keeps of this batch."""
        hidden = self.model.base_hidden(self.batch["input_ids"], self.batch["attention_mask"])
        (hidden_ND,) = self.scored(hidden)
        tokens_N = self.actions.token_N
        return {
            "hidden": hidden_ND, "tokens": tokens_N, "offsets": self.actions.offsets_S1,
            "base_logsumexp": linear_logsumexp(hidden_ND, self.model.head.weight, tokens_N),
            "padded_length": hidden.shape[1],
        }

    # --- trunks: hidden states of the adapted stream and of the base -------------------------

    def padded(self) -> Streams:
        return self.model.hidden_streams(self.batch["input_ids"], self.batch["attention_mask"])

    def both_in_graphs(self) -> Streams:
        """As in the authors' code: the embeddings require gradients, so the base's pass builds a
        graph as well; only its result is detached."""
        model, inputs = self.model, (self.batch["input_ids"], self.batch["attention_mask"])
        model.base.enable_input_require_grads()
        try:
            body = functools.partial(trunk(model.base), *inputs, use_cache=False)
            adapter_hidden = body().last_hidden_state
            with model.adapter.off():
                base_hidden = body().last_hidden_state
        finally:
            model.base.disable_input_require_grads()
        return adapter_hidden, base_hidden

    def packed(self) -> Streams:
        adapter_hidden = hidden_states(self.model.base, self.packing, packed=True)
        with torch.no_grad(), self.model.adapter.off():
            return adapter_hidden, hidden_states(self.model.base, self.packing, packed=True)

    @contextlib.contextmanager
    def packed_attention(self) -> Iterator[None]:
        longest = self.batch["input_ids"].shape[1]
        if (reason := can_pack(self.model.base, longest, gradients=True)) is not None:
            raise Unavailable(reason)
        yield

    # --- losses -------------------------------------------------------------------------------

    def eager_authors(self) -> Tensor:
        adapter_hidden, base_hidden = self.both_in_graphs()
        head = self.model.base.get_output_embeddings()
        q_STV = head(adapter_hidden).float()
        base_logprobs_STV = head(base_hidden).float().log_softmax(-1).detach()
        value_ST = ALPHA * ((q_STV + ALPHA * base_logprobs_STV) / ALPHA).logsumexp(-1)
        tokens_ST = self.batch["input_ids"][:, 1:]
        q_ST = q_STV[:, :-1].gather(-1, tokens_ST[..., None])[..., 0]
        mask_ST = self.batch["completion_mask"][:, 1:]
        rewards_ST = (q_ST - value_ST[:, :-1]) * mask_ST
        return eager_loss(rewards_ST.sum(1), rewards_ST, mask_ST.sum(1))

    def eager_one_product(self) -> Tensor:
        adapter_ND, base_ND = self.scored(*self.padded())
        weight, actions = self.model.head.weight, self.actions
        policy_ND = (adapter_ND / ALPHA + base_ND).to(weight.dtype)
        policy_lse_N = F.linear(policy_ND, weight).float().logsumexp(-1)
        with torch.no_grad():
            base_lse_N = F.linear(base_ND, weight).float().logsumexp(-1)
        q_N = (adapter_ND.float() * weight[actions.token_N].float()).sum(-1)
        rewards_N = q_N - ALPHA * (policy_lse_N - base_lse_N)
        return eager_loss(actions.sum(rewards_N), rewards_N, actions.offsets_S1.diff())

    def scored(self, *streams: Tensor) -> list[Tensor]:
        return [h[self.actions.sequence_N, self.actions.state_N] for h in streams]

    def ours_packed(self) -> Tensor:
        adapter_ND, base_ND = (h[self.packed_states_N] for h in self.packed())
        soft, _ = self.model.soft_value(
            adapter_ND, base_ND, self.actions.token_N, return_statistics=True
        )
        return sequence_loss(soft, self.actions.offsets_S1, OBJECTIVE).loss

    # --- steps --------------------------------------------------------------------------------

    def steps(self) -> dict[str, Step]:
        if self.model.adapts_trunk:
            return {
                "ours, padded": Step(lambda: batch_loss(self.model, self.batch).loss, "padded"),
                "ours, packed": Step(self.ours_packed, "packed", self.packed_attention),
                "eager, authors": Step(self.eager_authors, "both in graphs"),
                "eager, one product": Step(self.eager_one_product, "padded"),
            }
        return {
            "ours, head": Step(lambda: batch_loss(self.model, self.batch).loss, "base"),
            "ours, head, cached": Step(lambda: batch_loss(self.model, self.features).loss, "none"),
        }

    def trunks(self) -> dict[str, Step]:
        """Each trunk's own part of a step, as a step of its own."""
        def through(streams: Callable[[], Streams]) -> Callable[[], Tensor]:
            return lambda: streams()[0].float().mean()

        def base() -> Tensor:  # its adapter belongs to the loss
            self.model.base_hidden(self.batch["input_ids"], self.batch["attention_mask"])
            return nothing()

        def nothing() -> Tensor:
            return sum(p.sum() for p in self.parameters) * 0.0

        if self.model.adapts_trunk:
            return {
                "padded": Step(through(self.padded), "padded"),
                "packed": Step(through(self.packed), "packed", self.packed_attention),
                "both in graphs": Step(through(self.both_in_graphs), "both in graphs"),
            }
        return {"base": Step(base, "base"), "none": Step(nothing, "none")}

    def case(self, step: Step) -> Case:
        def prepare() -> contextlib.ExitStack:
            stack = contextlib.ExitStack()
            stack.enter_context(step.around())
            return stack

        def run(stack: contextlib.ExitStack) -> None:
            with stack:
                step.loss().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

        return Case(run, prepare)


def eager_loss(sums_S: Tensor, rewards: Tensor, counts_S: Tensor) -> Tensor:
    """Bradley–Terry over mean rewards, and χ²."""
    chosen_B, rejected_B = (sums_S / counts_S).tensor_split(2)
    squares = rewards.square().sum() / counts_S.sum()
    return -F.logsigmoid(chosen_B - rejected_B).mean() + OBJECTIVE.chi2_coef * squares


def build(
    name: str, kind: str, dtype: torch.dtype, provider: str, device: str, checkpointed: bool,
    length: int,
) -> Case:
    """One case from nothing. At module level, for a fresh process to find it."""
    bench = Bench(name, kind, length, device, dtype)
    bench.set_length(length, checkpointed)
    return bench.case(bench.steps()[provider])


def peak_mib(bench: Bench, name: str, kind: str, provider: str, length: int) -> float | None:
    """Beyond weights, optimizer state and batch, MiB."""
    try:
        if bench.device == "cuda":
            free(bench.device)
            return peak_cuda(bench.case(bench.steps()[provider])) / MEBIBYTE
        arguments = name, kind, bench.model.base.dtype, provider, bench.device, bench.checkpointed
        return peak_extra_memory(build, arguments, length, bench.device, True) / MEBIBYTE
    except Exception as error:
        print(f"{provider}: peak memory not measured: {reason(error)}")
        return None


def measure(
    bench: Bench, name: str, kind: str, length: int, options: Any, recorder: Recorder,
    authors_ms: dict[int, float],
) -> list[dict[str, Any]]:
    """Records of one adapter at one length; ``authors_ms`` by length is filled and used."""
    steps, trunks = bench.steps(), bench.trunks()
    wanted = [n for n in steps if n in options.providers]
    needed = {steps[n].trunk for n in wanted}
    cases = {n: functools.partial(bench.case, steps[n]) for n in wanted}
    cases |= {("trunk", n): functools.partial(bench.case, trunks[n]) for n in trunks if n in needed}
    timings = interleave(cases, bench.device, budget=options.budget, max_rounds=options.rounds)
    weights = sum(p.nbytes for p in bench.model.parameters()) / MEBIBYTE
    if isinstance(authors := timings.get("eager, authors"), Timing):
        authors_ms[length] = authors.ms
    rows, padded = len(bench.actions.token_N), bench.batch["input_ids"].numel()
    shape = {"model": name, "pairs": PAIRS, "T": length, "tokens": bench.tokens,
             "padded_tokens": padded, "N": rows}
    records = []
    for provider in wanted:
        outcome, trunk_outcome = timings[provider], timings["trunk", steps[provider].trunk]
        record = {"provider": provider, "mode": "step", "shape": shape,
                  "gradient_checkpointing": bench.checkpointed}
        if isinstance(outcome, Timing):
            record |= {"status": "ok", **outcome._asdict(), "weights_mib": weights,
                       "tokens_per_s": bench.tokens / outcome.ms * 1e3}
            if length in authors_ms:
                record["speedup_over_authors"] = authors_ms[length] / outcome.ms
            if isinstance(trunk_outcome, Timing):
                record["trunk_ms"] = trunk_outcome.ms
                record["loss_percent"] = 100 * max(0.0, 1 - trunk_outcome.ms / outcome.ms)
            if not options.no_memory:
                record["peak_extra_mib"] = peak_mib(bench, name, kind, provider, length)
        else:
            record["status"] = outcome
        records.append(recorder.add(**record))
    return records


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__.splitlines()[0])
    options.add_argument("--model", choices=MODELS)
    options.add_argument("--lengths", nargs="*", type=int)
    options.add_argument("--checkpoint_from", type=int, default=2048, metavar="LENGTH",
                         help="recompute activations from this length on, in every LoRA case: "
                              "eager's would not fit otherwise")
    options.add_argument("--rounds", type=int, default=8, help="at most so many steps of each")
    options.add_argument("--providers", nargs="*", metavar="NAME")
    options.add_argument("--no-memory", action="store_true", help="skip the peak memory")
    options = options.parse_args(arguments)
    recorder = start(options, "training_step")
    name, lengths = DEFAULT[options.device]
    if options.dry_run:
        name, lengths, options.checkpoint_from = "tiny", (64, 96), 96
    name, lengths = options.model or name, sorted(options.lengths or lengths)
    options.providers = chosen(options.providers, PROVIDERS, "provider")
    found: dict[int, list[dict[str, Any]]] = {length: [] for length in lengths}
    authors_ms: dict[int, float] = {}
    for kind in ("lora", "head"):  # one after the other: a second copy of the weights may not fit
        bench = Bench(name, kind, lengths[0], options.device, options.dtype)
        for length in lengths:
            bench.set_length(length, length >= options.checkpoint_from)
            found[length] += measure(bench, name, kind, length, options, recorder, authors_ms)
        del bench
        free(options.device)
    for records in found.values():
        report.print_training_step(records)
    latest = report.latest(recorder.output, options.device, recorder.dtype)
    report.draw_training_step(latest, options.output)


if __name__ == "__main__":
    main()
