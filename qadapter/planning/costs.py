"""What a run costs one process: bytes by part, arithmetic of a step, of the base's one reading.

Per token of a trunk's block: 2 operations a weight forward, 2 for the gradient of what enters (its
weights get none); attention 4 a query's width and token looked back on, twice that backward. The
head takes a product for the policy, one for its gradient, one more for lse(b) where it is not
cached (design §5, §6).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from qadapter.planning.lengths import Lengths
from qadapter.planning.shapes import Shape, Trained
from qadapter.training.config import QAdapterConfig
from qadapter.training.feature_set import Kept
from qadapter.training.features import sizes
from qadapter_kernels.linear import CPU_CHUNK_ROWS

TRUNK_RATE, HEAD_RATE = 0.47, 0.79
"""Of a processor's rate of products, what trunk and head reach: as measured on two CPU cores, at
steps of SmolLM2 in bfloat16 (benchmarks/results/training_step.jsonl)."""
_NUMBERS = 16
"""Bytes a trained parameter: itself, its gradient and Adam's two means in float32."""


class Run(NamedTuple):
    """A training run, as far as its costs go."""

    pairs_a_step: int
    """Of one process."""
    cached: bool
    """The base is read once."""
    hidden: bool
    """Of the base more than two numbers an action is wanted."""
    packed: bool
    checkpointing: bool
    retention: int
    """States a step."""
    workspace: int
    reading_tokens: int
    """In a batch of the base's one reading."""

    @classmethod
    def of(cls, config: QAdapterConfig, checkpointing: bool) -> Run:
        head = config.adapter_kind == "head"
        return cls(
            config.per_device_train_batch_size, config.cache_features != "none",
            head or config.objective_config().coefficients.base_weight != 0,
            config.padding_free is not False, checkpointing,
            config.retention_states if config.retention_coef != 0 else 0,
            config.workspace_mb << 20, config.feature_batch_tokens,
        )


class Work(NamedTuple):
    """Arithmetic, operations."""

    trunk: float
    head: float

    def seconds(self, rate: float) -> float:
        """On a processor of a rate of products."""
        return (self.trunk / TRUNK_RATE + self.head / HEAD_RATE) / rate


class Costs(NamedTuple):
    """Of one process, and of one forward and backward of its batch; bytes and operations."""

    weights: int
    """Bytes of the whole base."""
    in_flight: int
    """Bytes that a process needs whole at once, where the rest is sharded: embeddings, head, and
    two blocks, the one that runs and the next."""
    adapter: int
    """With gradients and Adam's state."""
    activations: int
    """Kept for the backward pass."""
    head: int
    """Logits at a time, and hidden states of the actions."""
    step: Work
    read: int
    """Bytes of the base that products read."""
    gathered: int
    """Bytes of a sharded base that every process gathers: the blocks of each pass. Embeddings and
    head stay once they are gathered."""
    reading: Work
    """Of the base's one pass over a pair."""
    features: int
    """Bytes a pair, in memory or on disk."""

    @property
    def process(self) -> int:
        """Bytes of a process with the whole base."""
        return self.weights + self.working

    @property
    def working(self) -> int:
        """Bytes beside the base."""
        return self.adapter + self.activations + self.head

def costs_of(
    shape: Shape, trained: Trained, lengths: Lengths, run: Run, cpu: bool = False
) -> Costs:
    """What one process pays for a run on one base.

    Args:
        cpu: it runs on one, where logits are made in smaller pieces.
    """
    head_adapter = trained.first_block is None
    blocks = 0 if trained.first_block is None else shape.depth - trained.first_block
    split = run.cached and 0 < blocks < shape.depth
    actions = run.pairs_a_step * lengths.actions + run.retention
    of_pair = lengths.tokens if run.packed else lengths.padded(run.pairs_a_step)
    tokens = run.pairs_a_step * of_pair + run.retention
    attended = run.pairs_a_step * lengths.attended + run.retention**2 / 2

    def forward(count: int) -> float:
        return count * (2 * shape.active * tokens + 4 * shape.query * attended)

    ran = blocks if split or head_adapter else shape.depth
    backward = blocks * (2 * shape.active * tokens + 8 * shape.query * attended)
    trunk_flops = 0.0 if head_adapter and run.cached else forward(ran) + backward
    if run.checkpointing:
        trunk_flops += forward(blocks)
    passes = 2
    if not run.cached:  # the base's own pass, and its lse(b)
        trunk_flops += forward(shape.depth)
        passes += 1
    trunk_flops += 6 * trained.parameters * (actions if head_adapter else tokens)
    of_base = 0 if run.cached else shape.depth * shape.block
    again = 2 if run.retention and blocks else 1  # its texts run in a pass of their own
    gathered = 2 * again * blocks * shape.block + of_base
    return Costs(
        weights=shape.weights * shape.itemsize,
        in_flight=(shape.embeddings + shape.head + 2 * shape.block) * shape.itemsize,
        adapter=_NUMBERS * trained.parameters,
        activations=round(tokens * _kept(shape, trained, blocks, run.checkpointing)),
        head=_head_bytes(shape, actions, run, head_adapter, cpu),
        step=Work(trunk_flops, 2 * passes * actions * shape.product),
        read=(2 * blocks * shape.block + of_base + passes * shape.product) * shape.itemsize,
        gathered=gathered * shape.itemsize,
        reading=_reading(shape, lengths) if run.cached else Work(0.0, 0.0),
        features=round(_features(shape, trained, lengths, run, split)),
    )


def _kept(shape: Shape, trained: Trained, blocks: int, checkpointing: bool) -> float:
    """Bytes that a token leaves in the adapted blocks for the backward pass."""
    size = shape.itemsize
    norms = 2 * max(4, size) * shape.hidden  # a block's two, which compute in float32
    # An adapter's layers compute in float32: where the base doesn't, each reads a copy of its own.
    own = 4 * (trained.inputs if size < 4 else trained.distinct) + 4 * trained.ranks
    attention = 2 * size * (shape.query + shape.key_value)
    one = norms + own + attention + 3 * size * shape.inner
    return one + blocks * size * shape.hidden if checkpointing and blocks else blocks * one


def _head_bytes(
    shape: Shape, actions: float, run: Run, head_adapter: bool, cpu: bool
) -> int:
    rows, size = (min(actions, CPU_CHUNK_ROWS), shape.itemsize) if cpu else (actions, 4)
    logits = min(run.workspace, rows * shape.vocabulary * size)
    # h_a and h_b, G′ and the gradient; an adapter on the head computes in float32.
    states = actions * shape.hidden * (4 * shape.itemsize + (16 if head_adapter else 4))
    return round(logits + states)


def _reading(shape: Shape, lengths: Lengths) -> Work:
    trunk = shape.depth * (2 * shape.active * lengths.tokens + 4 * shape.query * lengths.attended)
    return Work(trunk, 2 * lengths.actions * shape.product)


def _features(
    shape: Shape, trained: Trained, lengths: Lengths, run: Run, split: bool
) -> float:
    if not run.cached:
        return 0.0
    kept = Kept(run.hidden, trained.first_block is not None, trained.first_block if split else None)
    answers = lengths.chosen + lengths.rejected
    of_pairs = sizes(
        kept, shape.dtype, shape.hidden, shape.hidden, lengths.prompt, answers, answers
    )
    return float(of_pairs.mean())


def steps_of(lengths: Lengths, config: QAdapterConfig, processes: int) -> int:
    """Optimizer steps of a run."""
    if config.max_steps > 0:
        return config.max_steps
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes
    return math.ceil(math.ceil(lengths.pairs / batch) * config.num_train_epochs)
