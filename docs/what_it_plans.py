"""Rewrites the table of docs/scale.md, between two comments, by what ``qadapter plan`` computes.

    python docs/what_it_plans.py
"""

from __future__ import annotations

import json

import numpy as np
from what_serves_it import ROOT, put

from qadapter import QAdapterConfig
from qadapter.commands.plan import duration
from qadapter.commands.train import DEFAULTS
from qadapter.planning import Lengths, machine_of, outline_of, plan_of
from qadapter.system.room import size

SCALE = ROOT / "docs/scale.md"
LENGTHS = ROOT / "benchmarks/lengths/dsp.json"
PAIRS = 60_000
RUNS = (
    ("Llama-3.2-1B", "1xL4"), ("Llama-3.2-1B", "1xH100"), ("Llama-3.1-8B", "1xRTX4090"),
    ("Llama-3.1-8B", "1xH100"), ("Llama-3.1-8B", "8xH100"), ("Llama-3.1-70B", "8xA100"),
    ("Llama-3.1-70B", "8xH100"), ("Llama-3.1-70B", "2x8xH100"), ("Llama-3.1-405B", "2x8xH100"),
    ("Llama-3.1-405B", "4x8xH100"), ("Llama-3.1-405B", "8xH200"), ("Llama-3.1-405B", "8xB200"),
)


def planned() -> str:
    """A row for each base and machine."""
    rows = np.array(json.loads(LENGTHS.read_text(encoding="utf-8")))
    config = QAdapterConfig(output_dir="run", use_cpu=True, **DEFAULTS)
    prompt, chosen, rejected = np.minimum(rows, config.max_length).T
    lengths = Lengths(PAIRS, prompt, chosen, rejected, "")
    lines = [
        f"{PAIRS:,} pairs of {lengths.tokens:.0f} tokens each ({lengths.actions:.0f} in answers, "
        "real lengths), `qadapter train`'s defaults: a LoRA in the upper 2 blocks, "
        f"{config.per_device_train_batch_size} pairs a GPU and step. Estimates:",
        "",
        "| base | GPUs | laid out | memory of a GPU | of it weights | the base reads the pairs | a "
        "step | steps | in all | features |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, text in RUNS:
        base, _ = outline_of(f"meta-llama/{name}")
        plan = plan_of(base, lengths, config, machine_of(text))
        way = plan.chosen
        if way is None:
            least = min(plan.ways, key=lambda way: way.needs)
            cells = ("doesn't fit", f"{size(least.needs)} of {size(least.room)}", *["–"] * 6)
        else:
            weights = way.parts["the base's weights"] + way.parts["gathered at a time"]
            cells = (
                way.name, f"{size(way.needs)} of {size(way.room)}", size(weights),
                duration(way.read_seconds), duration(way.step_seconds), f"{way.steps:,}",
                duration(way.seconds), size(plan.costs.features * PAIRS),
            )
        lines.append(f"| {' | '.join((name, text, *cells))} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the table."""
    put(SCALE, "planned", planned())


if __name__ == "__main__":
    main()
