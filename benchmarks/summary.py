"""A run in one screen: what the records in a folder say, a line a shape.

    python benchmarks/summary.py benchmarks/results
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from report import Record, number, refusal

AGAINST_OURS = ("linear_loss", "logits_loss", "decoding")
"""Benchmarks that set everybody beside "ours"; the others' providers are listed one by one."""
FIELDS = {
    "ms": " ms", "ms_per_token": " ms/token", "tokens_per_s": " tokens/s",
    "speedup_over_authors": "× the authors'", "times_base": "× the base", "peak_mib": " MiB",
    "peak_extra_mib": " MiB extra",
}


def read(folder: Path, device: str) -> Iterator[tuple[str, list[Record]]]:
    """Each benchmark's records on a device, of every case the last."""
    for path in sorted(folder.glob("*.jsonl")):
        last: dict[tuple[str, ...], Record] = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if {"shape", "status", "mode"} <= set(record) and device == record["device"]:
                last[title(record), record["provider"], record["dtype"]] = record
        if last:
            yield path.stem, list(last.values())


def title(record: Record) -> str:
    parts = [f"{key} {value:,}" if isinstance(value, int) else str(value)
             for key, value in record["shape"].items() if key not in ("vocab", "hidden", "V")]
    base = f"base {record['base']}" if "base" in record else ""
    return ", ".join(filter(None, [*parts, record["mode"], base]))


def against_ours(records: Sequence[Record]) -> Iterator[str]:
    """Ours and the fastest of the others, and of the floor what there is."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        if record["status"] == "ok":
            groups.setdefault(title(record), []).append(record)
    for name, group in groups.items():
        ours = next((r for r in group if r["provider"] == "ours"), None)
        if ours is None:
            continue
        parts = [f"{number(ours['ms'])} ms"]
        for key, of in (("percent_of_products", "products"), ("percent_of_copy", "copy")):
            if ours.get(key) is not None:
                parts.append(f"{number(ours[key])}% of {of}")
        if ours.get("peak_extra_mib") is not None:
            parts.append(f"{number(ours['peak_extra_mib'])} MiB")
        rivals = [r for r in group if r.get("times_ours") is not None
                  and not r["provider"].startswith(("ours", "products", "copy"))]
        if rivals:
            best = min(rivals, key=lambda r: r["times_ours"])  # of its own run
            parts.append(f"next {best['provider']} {number(best['times_ours'])}×")
        yield f"{name}: {', '.join(parts)}"


def one_by_one(records: Sequence[Record]) -> Iterator[str]:
    groups: dict[str, list[str]] = {}
    for record in records:
        if record["status"] == "ok":
            found = [number(record[key], unit) for key, unit in FIELDS.items()
                     if isinstance(record.get(key), int | float)]
            groups.setdefault(title(record), []).append(
                f"  {record['provider']}: {', '.join(found)}"
            )
    for name, rows in groups.items():
        yield f"{name}:"
        yield from rows


def refusals(records: Sequence[Record]) -> list[str]:
    """Each provider's reasons, once."""
    lines = (refusal(r["provider"], r["status"]) for r in records if r["status"] != "ok")
    return list(dict.fromkeys(lines))


def lines(folder: Path, device: str) -> Iterator[str]:
    for benchmark, records in read(folder, device):
        yield f"{benchmark}:"
        told = against_ours if benchmark in AGAINST_OURS else one_by_one
        yield from (f"  {line}" for line in told(records))
        yield from refusals(records)


def main(arguments: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("folder", type=Path)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    options = options.parse_args(arguments)
    for line in lines(options.folder, options.device):
        print(line)


if __name__ == "__main__":
    main()
