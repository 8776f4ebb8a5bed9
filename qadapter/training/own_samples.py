"""The base's own answers to the training prompts, for a retention term to be held to."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from qadapter.data import padding_id
from qadapter.data.collation import left_padded
from qadapter.data.columns import pieces
from qadapter.data.ends import configured_ends, until_end
from qadapter.data.vocabulary import num_positions
from qadapter.errors import QAdapterError
from qadapter.policy.model import QAdapterModel
from qadapter.policy.sampling import fused_sample
from qadapter.system.caches import cache_dir as default_cache_dir
from qadapter.system.documents import read_json
from qadapter.system.locking import exclusive
from qadapter.system.progress import Progress
from qadapter.system.scratch import remove_abandoned, replacing
from qadapter.system.sealed import opened, sealed
from qadapter.training.crew import Crew
from qadapter.trunk.identity import digest_of
from qadapter.trunk.lm_head import input_device

COUNT, MAX_NEW_TOKENS, BATCH_SIZE, SEED = 96, 64, 16, 0

OWN = "own"
"""Names them where a file of texts could stand."""

Sample = tuple[list[int], list[int]]
"""(prompt ids, answer ids)."""


def different_prompts(dataset: Dataset) -> Sequence[list[int]]:
    """The prompts of tokenized pairs, each once, in order."""
    digests = [
        np.frombuffer(hashlib.blake2b(ids.tobytes(), digest_size=8).digest(), np.uint64)[0]
        for lists in pieces(dataset, "prompt_ids") for ids in lists.to_numpy(zero_copy_only=False)
    ]
    _, first = np.unique(np.array(digests, dtype=np.uint64), return_index=True)
    return _Prompts(dataset.select_columns(["prompt_ids"]), np.sort(first))


class _Prompts(Sequence):
    """Those of some pairs, read as they are asked for.

    Args:
        pairs: their numbers.
    """

    def __init__(self, dataset: Dataset, pairs: np.ndarray) -> None:
        self.dataset, self.pairs = dataset, pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> list[int]:
        return list(self.dataset[int(self.pairs[index])]["prompt_ids"])


def load_or_sample(
    model: QAdapterModel, prompts: Sequence[list[int]],
    tokenizer: PreTrainedTokenizerBase | None, *, cache_dir: str | Path | None = None,
    progress: Progress | None = None, say: Callable[[str], None] | None = None,
    crew: Crew | None = None,
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
        crew: the processes of this launch, which draw together where a forward of the base is a
            collective.

    Raises:
        QAdapterError: the ``cache_dir`` asked for can't be written; no prompt leaves room for an
            answer within the base's positions (those that don't are left out).
    """
    positions = num_positions(model)
    if positions is not None:
        prompts = [prompt for prompt in prompts if len(prompt) + MAX_NEW_TOKENS <= positions]
        if not prompts:
            raise QAdapterError(
                f"no prompt leaves room for {MAX_NEW_TOKENS} tokens of the base's own answer in "
                f"the {positions:,} positions it has: take other texts (retention_dataset_name "
                "built-in)"
            )
    rng = random.Random(SEED)
    prompts = [prompts[i] for i in sorted(rng.sample(range(len(prompts)),
                                                     min(COUNT, len(prompts))))]
    cache = _Cache(Path(cache_dir or default_cache_dir() / "own_samples"), model, prompts)
    folder, pad = cache.path.parent, padding_id(model, tokenizer)
    remove_abandoned(folder)
    crew = crew or Crew()
    answers = crew.first(cache.read())
    try:
        if answers is None and crew.lockstep:
            answers = crew.first(_sample(model, prompts, pad, progress))
            _write_together(cache, answers, crew)
        elif answers is None:
            with exclusive(cache.path, say):
                answers = cache.read()
                if answers is None:
                    if say is not None and cache.path.exists():
                        say(f"{cache.path} is not what was written: drawn again")
                    answers = _sample(model, prompts, pad, progress)
                    cache.write(answers)
    except OSError as error:
        if cache_dir is not None:
            raise QAdapterError(
                f"feature_cache_dir {cache_dir}: the base's own samples can't be kept there "
                f"({error}); free some space or choose another, and run it again"
            ) from error
        if say is not None:
            say(f"{folder} can't be written ({error.strerror or error}): the base's own samples "
                "are kept for this run alone; name a feature_cache_dir to keep them")
        answers = answers or _sample(model, prompts, pad, progress)
    return list(zip(prompts, answers, strict=True))


def _write_together(cache: _Cache, answers: list[list[int]], crew: Crew) -> None:
    """The first process writes; raises OSError in all of them."""
    failure = None
    if crew.index == 0:
        try:
            cache.write(answers)
        except OSError as error:
            failure = str(error.strerror or error)
    if (failure := crew.first(failure)) is not None:
        raise OSError(failure)


class _Cache:
    """The file of one base's answers to one list of prompts."""

    def __init__(self, folder: Path, model: QAdapterModel, prompts: Sequence[list[int]]) -> None:
        self.count, self.vocabulary = len(prompts), model.head.shape[0]
        key = json.dumps([
            dataclasses.asdict(model.base_identity), digest_of(model.bare_base()),
            str(model.base.dtype),
            sorted(configured_ends(model)), prompts, MAX_NEW_TOKENS, BATCH_SIZE, SEED,
        ])
        self.key = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
        self.path = folder.expanduser() / f"samples-{self.key}.json"

    def read(self) -> list[list[int]] | None:
        """None where they are not there, or are not what was drawn."""
        try:
            found = opened(read_json(self.path))
        except QAdapterError:
            return None
        answers = found.get("answers")
        whole = (
            found.get("key") == self.key and isinstance(answers, list)
            and len(answers) == self.count and all(map(self._could_be, answers))
        )
        return answers if whole else None

    def _could_be(self, answer: Any) -> bool:
        return isinstance(answer, list) and 0 < len(answer) <= MAX_NEW_TOKENS and all(
            type(token) is int and 0 <= token < self.vocabulary for token in answer
        )

    def write(self, answers: list[list[int]]) -> None:
        text = json.dumps(sealed({"key": self.key, "answers": answers}))
        with replacing(self.path) as written:
            written.write_text(text, encoding="utf-8")


@torch.no_grad()
def _sample(
    model: QAdapterModel, prompts: Sequence[list[int]], pad: int, progress: Progress | None
) -> list[list[int]]:
    ends = configured_ends(model)
    answers: dict[int, list[int]] = {}
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    training, before = model.training, model.policy
    model.eval()
    model.set_policy(strength=0.0)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            on_cpu = input_device(model.base).type == "cpu"
            for start in range(0, len(order), BATCH_SIZE):
                indices = order[start : start + BATCH_SIZE]
                drawn = generate(
                    model, [prompts[i] for i in indices], pad, max_new_tokens=MAX_NEW_TOKENS,
                    do_sample=True, temperature=1.0, top_p=1.0, top_k=0,
                    custom_generate=fused_sample if on_cpu else None,
                )
                for i, ids in zip(indices, drawn, strict=True):
                    answers[i], _ = until_end(ids, ends)
                if progress is not None:
                    progress(len(answers), len(order))
    finally:
        model.policy = before
        model.train(training)
    return [answers[i] for i in range(len(prompts))]


def generate(
    model: QAdapterModel, prompts: Sequence[list[int]], pad: int, **options: Any
) -> list[list[int]]:
    """What ``model.generate`` adds to prompts of token ids, in one batch."""
    batch = left_padded(prompts, pad, input_device(model.base))
    output = model.generate(**batch, pad_token_id=pad, **options)
    return output[:, batch["input_ids"].shape[1] :].tolist()
