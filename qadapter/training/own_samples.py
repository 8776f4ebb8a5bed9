"""The base's own answers to the training prompts: what the retention term is held to by default."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from qadapter.data import padding_id
from qadapter.errors import QAdapterError
from qadapter.policy.model import QAdapterModel
from qadapter.policy.sampling import fused_sample
from qadapter.system.locking import exclusive
from qadapter.system.progress import Progress
from qadapter.system.scratch import scratch_folder
from qadapter.trunk.lm_head import input_device
from qadapter.trunk.loading import cache_dir as default_cache_dir

COUNT, MAX_NEW_TOKENS, BATCH_SIZE, SEED = 96, 64, 16, 0

Sample = tuple[list[int], list[int]]
"""(prompt ids, answer ids)."""


def load_or_sample(
    model: QAdapterModel, prompts: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase | None, *, cache_dir: str | Path | None = None,
    progress: Progress | None = None, say: Callable[[str], None] | None = None,
) -> list[Sample]:
    """One sample of the base for each of up to ``COUNT`` prompts; from the cache if it is there.
    Several processes may ask for the same at once: one draws, the others wait for it.

    Args:
        prompts: token ids up to where an answer begins, no two alike.
        tokenizer: knows the padding token.
        cache_dir: default: ``own_samples`` in qadapter's own cache folder. If that can't be
            written, samples are kept in memory alone.
        progress: called with (answers done, of how many).
        say: gets a line about another process that is waited for, or a cache that can't be used.

    Raises:
        QAdapterError: the ``cache_dir`` asked for can't be written.
    """
    rng = random.Random(SEED)
    prompts = [prompts[i] for i in sorted(rng.sample(range(len(prompts)),
                                                     min(COUNT, len(prompts))))]
    identity = dataclasses.asdict(model.base_identity)
    key = json.dumps([identity, prompts, MAX_NEW_TOKENS, BATCH_SIZE, SEED, str(model.base.dtype)])
    name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    folder = Path(cache_dir or default_cache_dir() / "own_samples").expanduser()
    path = folder / f"samples-{name}.json"
    pad = padding_id(model, tokenizer)
    answers = _read(path, len(prompts))
    try:
        if answers is None:
            with exclusive(path, say):
                answers = _read(path, len(prompts))
                if answers is None:
                    answers = _sample(model, prompts, pad, progress)
                    _write(path, answers)
    except OSError as error:
        if cache_dir is not None:
            raise QAdapterError(
                f"feature_cache_dir {cache_dir}: the base's own samples can't be kept there "
                f"({error})"
            ) from error
        if say is not None:
            say(f"{folder} can't be written ({error.strerror or error}): the base's own samples "
                "are kept for this run alone; name a feature_cache_dir to keep them")
        answers = answers or _sample(model, prompts, pad, progress)
    return list(zip(prompts, answers, strict=True))


def _read(path: Path, count: int) -> list[list[int]] | None:
    try:
        answers = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # not there, or damaged
    return answers if isinstance(answers, list) and len(answers) == count else None


def _write(path: Path, answers: list[list[int]]) -> None:
    with scratch_folder(path.parent, "writing") as scratch:
        written = scratch / path.name
        written.write_text(json.dumps(answers), encoding="utf-8")
        written.replace(path)


@torch.no_grad()
def _sample(
    model: QAdapterModel, prompts: Sequence[list[int]], pad: int, progress: Progress | None
) -> list[list[int]]:
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends]) - {None}
    answers: dict[int, list[int]] = {}
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    training, before = model.training, model.policy
    model.eval()
    model.set_policy(strength=0.0)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            for start in range(0, len(order), BATCH_SIZE):
                indices = order[start : start + BATCH_SIZE]
                drawn = _generate(model, [prompts[i] for i in indices], pad)
                for i, ids in zip(indices, drawn, strict=True):
                    stop = next((k + 1 for k, token in enumerate(ids) if token in ends), None)
                    answers[i] = ids[:stop]
                if progress is not None:
                    progress(len(answers), len(order))
    finally:
        model.policy = before
        model.train(training)
    return [answers[i] for i in range(len(prompts))]


def _generate(model: QAdapterModel, prompts: list[list[int]], pad: int) -> list[list[int]]:
    device, width = input_device(model.base), max(map(len, prompts))
    input_ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=device)
    lengths = torch.tensor([[len(p)] for p in prompts], device=device)
    mask = torch.arange(width, device=device) >= width - lengths
    output = model.generate(
        input_ids=input_ids, attention_mask=mask.long(), max_new_tokens=MAX_NEW_TOKENS,
        do_sample=True, temperature=1.0, top_p=1.0, top_k=0, pad_token_id=pad,
        custom_generate=fused_sample if device.type == "cpu" else None,
    )
    return output[:, width:].tolist()
