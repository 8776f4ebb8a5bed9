"""Tables and pictures of benchmark records."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Record = dict[str, Any]
FAILED = "failed: "
"""Begins the status of a row whose fast path did not serve."""
OURS, GRID = "#c2410c", "#d4d4d8"
OTHERS = ("#334155", "#64748b", "#0f766e", "#5eead4", "#7c3aed", "#2563eb", "#a16207", "#93c5fd")


def number(value: float | None, unit: str = "") -> str:
    """Three significant digits."""
    if value is None:
        return "—"
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return text + unit


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table as wide as it needs to be; the first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left", min_width=min(len(title), 130))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=index > 0)
    for row in rows:
        table.add_row(*row, style="bold" if row[0].startswith("ours") else None)
    console = Console()
    if not console.is_terminal:  # a log: nothing to fit into
        console = Console(width=140)
    console.print(table)


def refusal(name: str, status: str) -> str:
    """The line of a case without a time."""
    if status.startswith(FAILED):
        return f"  FAILED: {name}: {status.removeprefix(FAILED)}"
    return f"  not run: {name}: {status}"


def spread(record: Record) -> str:
    low, high = record["ms_quartiles"]
    return f"{number(low)} – {number(high)}"


def print_group(title: str, records: Sequence[Record]) -> None:
    """One table a mode; what could not run is listed with its reason."""
    for mode in dict.fromkeys(record["mode"] for record in records):
        rows, refused = [], []
        for record in (r for r in records if r["mode"] == mode):
            name = record["provider"] + (", base cached" if record.get("base") == "cached" else "")
            if record["status"] != "ok":
                refused.append(refusal(name, record["status"]))
                continue
            rows.append((
                name, number(record["ms"]), spread(record), number(record.get("times_ours"), "×"),
                number(record.get("percent_of_products") or record.get("percent_of_copy"), "%"),
                number(record.get("peak_extra_mib")), number(record.get("loss_error")),
                number(record.get("gradient_error")),
            ))
        relative = "copy" if any("percent_of_copy" in r for r in records) else "products"
        print_table(
            f"{title}, {mode}",
            ("provider", "ms", "quartiles", "/ ours", f"of {relative}", "peak MiB", "loss error",
             "gradient error"),
            rows,
        )
        for line in refused:
            print(line)


def latest(path: Path, device: str, dtype: str = "bfloat16") -> list[Record]:
    """The last record of every case on a device, in one data type: shapes may have been measured
    one by one."""
    last: dict[tuple[str, ...], Record] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if (record["device"], record["dtype"]) == (device, dtype):
            key = (record["provider"], record["mode"], record.get("base"), str(record["shape"]))
            last[tuple(map(str, key))] = record
    return list(last.values())


def draw_linear_loss(records: Sequence[Record], folder: Path) -> None:
    """Time over N, and time and memory at N = 1,024 (or the largest there is)."""
    usable = [r for r in records if r["status"] == "ok" and r["mode"] == "both"]
    if not usable:
        return
    head = usable[0]["shape"]["head"]
    mine = sorted((r for r in usable if r["shape"]["head"] == head), key=lambda r: r["shape"]["N"])
    counts = sorted({r["shape"]["N"] for r in mine})
    at = 1024 if 1024 in counts else counts[-1]
    names = list(dict.fromkeys(label(r) for r in mine))

    chosen = {label(r): r for r in mine if r["shape"]["N"] == at}
    peaks = {name: r["peak_extra_mib"] for name, r in chosen.items()
             if r.get("peak_extra_mib") is not None}
    widths = [1.5] * (len(counts) > 1) + [1.0] + [1.0] * bool(peaks)
    figure, axes = _figure(len(widths), (5 * len(widths), 4.6), width_ratios=widths)
    if len(counts) > 1:
        lines, *axes = axes
        for name in names:
            points = [(r["shape"]["N"], r["ms"]) for r in mine if label(r) == name]
            lines.plot(*zip(*points, strict=True), **style(name, names), label=name)
        lines.set(xscale="log", yscale="log", xlabel="rows N", ylabel="milliseconds")
        lines.set_xticks(counts, [f"{n:,}" for n in counts])
        lines.minorticks_off()
        # Above the lines: room for the legend, in two columns.
        low, high = lines.get_ylim()
        lines.set_ylim(low, high * (high / low) ** 0.7)
        lines.legend(fontsize=6, frameon=False, ncol=2, loc="upper left")
        lines.set_title("time over N", fontsize=10, loc="left")
    bars(axes[0], {name: r["ms"] for name, r in chosen.items()}, names, "milliseconds")
    axes[0].set_title(f"time at N = {at:,}", fontsize=10, loc="left")
    if peaks:
        bars(axes[1], peaks, names, "peak extra memory, MiB")
        axes[1].set_title(f"memory at N = {at:,}", fontsize=10, loc="left")
    title = f"Hidden-level loss, forward and backward: {head} head, {records[-1]['dtype']}"
    _save(figure, records, title, folder)


def label(record: Record) -> str:
    return record["provider"] + (", base cached" if record.get("base") == "cached" else "")


def style(name: str, names: Sequence[str]) -> dict[str, Any]:
    if name.startswith("ours"):
        return {"color": OURS, "linewidth": 2.2, "marker": "o", "markersize": 4,
                "linestyle": "--" if "cached" in name or "(" in name else "-", "zorder": 3}
    if name.startswith("products"):
        return {"color": "black", "linewidth": 1, "linestyle": ":"}
    others = [n for n in names if not n.startswith(("ours", "products"))]
    return {"color": OTHERS[others.index(name) % len(OTHERS)], "linewidth": 1.2, "marker": ".",
            "linestyle": "--" if "cached" in name else "-"}


def bars(axes: Any, values: dict[str, float], names: Sequence[str], what: str) -> None:
    """Horizontal bars, shortest on top, each with its number."""
    ordered = sorted(values, key=values.get, reverse=True)
    axes.barh(ordered, [values[n] for n in ordered],
              color=[style(n, names)["color"] for n in ordered], height=0.7)
    for index, name in enumerate(ordered):
        axes.annotate(number(values[name]), (values[name], index), (3, 0), va="center",
                      textcoords="offset points", fontsize=7)
    axes.tick_params(axis="y", labelsize=7)
    axes.margins(x=0.18)
    axes.set_xlabel(what)


def _figure(
    columns: int, size: tuple[float, float], sharey: bool = False, **layout: Any
) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=size, sharey=sharey, layout="constrained",
                                squeeze=False, gridspec_kw=layout)
    for one in axes[0]:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(color=GRID, linewidth=0.5)
        one.set_axisbelow(True)
    return figure, axes[0]


def _save(figure: Any, records: Sequence[Record], title: str, folder: Path) -> None:
    import matplotlib.pyplot as plt

    where = records[0]["environment"]
    letters = int(9 * figure.get_figwidth())  # of this size in a line
    figure.suptitle(textwrap.fill(title, letters), x=0.01, ha="left", fontsize=12)
    told = (
        where["machine"], where.get("instructions"), f"{where['threads']} threads",
        f"torch {where['torch']}", where["date"][:10], f"commit {where['commit']}",
    )
    figure.supxlabel(", ".join(filter(None, told)), x=0.01, ha="left", fontsize=7)
    kind = "" if records[0]["dtype"] == "bfloat16" else f".{records[0]['dtype']}"
    path = folder / f"{records[0]['kernel']}.{records[0]['device']}{kind}.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"picture: {path}")


def draw_logits_loss(records: Sequence[Record], folder: Path) -> None:
    """Bandwidth against that of a copy, over N, forward and backward."""
    usable = [r for r in records if r["status"] == "ok"]
    head = usable[-1]["shape"]["head"]
    mine = [r for r in usable if r["shape"]["head"] == head]
    names = list(dict.fromkeys(r["provider"] for r in mine if r["provider"] != "copy"))
    figure, axes = _figure(2, (10, 4), sharey=True)
    for axis, mode in zip(axes, ("forward", "backward"), strict=True):
        for name in names:
            points = [(r["shape"]["N"], r["percent_of_copy"]) for r in mine
                      if r["provider"] == name and r["mode"] == mode]
            axis.plot(*zip(*points, strict=True), **style(name, names), label=name)
        axis.axhline(100, color="black", linewidth=1, linestyle=":", label="a copy")
        axis.set(xscale="log", ylim=(0, None), xlabel="rows N")
        axis.set_title(mode, fontsize=10, loc="left")
    axes[0].set_ylabel("% of the copy's bandwidth")
    axes[1].legend(fontsize=7, frameon=False)
    vocab = mine[0]["shape"]["V"]
    _save(figure, records, f"soft_value on {mine[0]['dtype']} logits, V = {vocab:,}", folder)


def print_generation(title: str, records: Sequence[Record]) -> None:
    """Tokens a second, and the share of the base's."""
    rows = [
        (r["provider"], number(r["tokens_per_s"]), number(r["ms_per_token"]), spread(r),
         number(r["times_base"], "×"))
        for r in records if r["status"] == "ok"
    ]
    print_table(title, ("provider", "tokens/s", "ms a step", "quartiles, ms", "base's time"), rows)
    for record in records:
        if record["status"] != "ok":
            print(refusal(record["provider"], record["status"]))


def draw_generation(records: Sequence[Record], folder: Path) -> None:
    """Tokens a second, a panel for each batch size."""
    usable = [r for r in records if r["status"] == "ok"]
    if not usable:
        return
    model = usable[-1]["shape"]["model"]
    mine = [r for r in usable if r["shape"]["model"] == model]
    batches = sorted({r["shape"]["B"] for r in mine})
    figure, axes = _figure(max(2, len(batches)), (5.2 * max(2, len(batches)), 3.6))
    for axis, batch in zip(axes, batches, strict=False):
        rates = {r["provider"]: r["tokens_per_s"] for r in mine if r["shape"]["B"] == batch}
        bars(axis, rates, list(rates), "tokens a second")
        axis.set_title(f"batch {batch}", fontsize=10, loc="left")
    _save(figure, mine, f"Greedy decoding through generate: {model}, {mine[-1]['dtype']}", folder)


def print_evaluation(title: str, records: Sequence[Record]) -> None:
    """One table a mode."""
    for mode in dict.fromkeys(record["mode"] for record in records):
        mine = [record for record in records if record["mode"] == mode]
        print_table(
            f"{title}, {mode}",
            ("provider", "ms", "quartiles", "/ ours", "of products", "peak MiB", "largest error"),
            [
                (r["provider"], number(r["ms"]), spread(r), number(r.get("times_ours"), "×"),
                 number(r.get("percent_of_products"), "%"), number(r.get("peak_extra_mib")),
                 number(r.get("largest_error")))
                for r in mine if r["status"] == "ok"
            ],
        )
        for record in mine:
            if record["status"] != "ok":
                print(refusal(record["provider"], record["status"]))


def draw_evaluation(records: Sequence[Record], folder: Path) -> None:
    """Time of each mode, at the last shape."""
    usable = [r for r in records if r["status"] == "ok" and r["shape"] == records[-1]["shape"]]
    if not usable:
        return
    modes = list(dict.fromkeys(r["mode"] for r in usable))
    names = list(dict.fromkeys(r["provider"] for r in usable))
    figure, axes = _figure(len(modes), (4.2 * len(modes), 2.6))
    for axis, mode in zip(axes, modes, strict=True):
        bars(axis, {r["provider"]: r["ms"] for r in usable if r["mode"] == mode}, names, mode)
        axis.set_xlabel("milliseconds")
    shape = usable[0]["shape"]
    _save(figure, usable, f"Scores of {shape['N']:,} states, {shape['head']}", folder)


def draw_scaling(sweeps: Sequence[Record], records: Sequence[Record], folder: Path) -> None:
    """Time over N and over V with the fitted line."""
    figure, axes = _figure(2, (10, 4))
    for axis, sweep in zip(axes, sweeps, strict=True):
        sizes = list(sweep["points"])
        line = [sweep["fixed_ms"] + sweep["ms_per_1000"] / 1000 * size for size in sizes]
        axis.plot(sizes, list(sweep["points"].values()), "o", color=OURS, label="measured")
        axis.plot(sizes, line, color="black", linewidth=1, linestyle=":",
                  label=f"line, r² = {sweep['r_squared']:.4f}")
        axis.set(xlabel={"N": "rows N", "V": "vocabulary V"}[sweep["axis"]], ylabel="milliseconds",
                 xlim=(0, None), ylim=(0, None))
        axis.set_title(f"time ~ {sweep['axis']}^{sweep['exponent']:.2f}", fontsize=10, loc="left")
        axis.legend(fontsize=8, frameon=False)
    title = f"Hidden-level loss, forward and backward, {records[-1]['dtype']}"
    _save(figure, records, title, folder)


def draw_decoding(records: Sequence[Record], folder: Path) -> None:
    """Microseconds of one decoding step's policy and draw, over the batch."""
    usable = [r for r in records if r["status"] == "ok"]
    settings = list(dict.fromkeys(r["mode"] for r in usable))
    names = list(dict.fromkeys(r["provider"] for r in usable))
    figure, axes = _figure(max(2, len(settings)), (4.2 * max(2, len(settings)), 4), sharey=True)
    for axis, setting in zip(axes, settings, strict=False):
        for name in names:
            points = [(r["shape"]["N"], r["ms"]) for r in usable
                      if r["provider"] == name and r["mode"] == setting]
            axis.plot(*zip(*points, strict=True), **style(name, names), label=name)
        axis.set(xscale="log", yscale="log", xlabel="sequences N")
        axis.set_title(setting, fontsize=10, loc="left")
    axes[0].set_ylabel("milliseconds a step")
    axes[0].legend(fontsize=7, frameon=False)
    vocab = usable[0]["shape"]["V"]
    _save(figure, records, f"Two streams to one token, V = {vocab:,}", folder)


def print_training_step(records: Sequence[Record]) -> None:
    """One table of one data set, a way a row."""
    shape = records[0]["shape"]
    again = ", activations recomputed" if shape["gradient_checkpointing"] else ""
    done = [r for r in records if r["status"] == "ok"]
    print_table(
        f"training step, {shape['model']}, {shape['pairs']} pairs of {shape['lengths']} cut at "
        f"{shape['T']:,}, {shape['pairs_a_step']} a step ({shape['tokens']:,} tokens, "
        f"{shape['padded_tokens']:,} padded, N = {shape['N']:,}){again}",
        ("provider", "ms", "quartiles", "tokens/s", "authors' / it", "TRL's / it",
         "of it the loss", "peak MiB", "with weights"),
        [
            (r["provider"], number(r["ms"]), spread(r), number(r["tokens_per_s"]),
             number(r.get("speedup_over_authors"), "×"), number(r.get("speedup_over_trl"), "×"),
             number(r.get("loss_percent"), "%"), number(r.get("peak_extra_mib")),
             number(_whole_peak(r)))
            for r in done
        ],
    )
    for record in records:
        if record["status"] != "ok":
            print(refusal(record["provider"], record["status"]))


def _whole_peak(record: Record) -> float | None:
    extra = record.get("peak_extra_mib")
    return None if extra is None else extra + record["weights_mib"]


def draw_training_step(records: Sequence[Record], folder: Path) -> None:
    """Tokens a second and peak memory with the weights, of the fullest table, the last of them."""
    usable = [r for r in records if r["status"] == "ok"]
    if not usable:
        return
    tables = [[r for r in usable if r["shape"] == shape] for shape in (r["shape"] for r in usable)]
    fullest = max(tables, key=lambda table: (len(table), table[0]["environment"]["date"]))
    shape, at = fullest[0]["shape"], {r["provider"]: r for r in fullest}
    figure, (speed, memory) = _figure(2, (11, 3.8))
    bars(speed, {name: r["tokens_per_s"] for name, r in at.items()}, list(at), "tokens a second")
    speed.set_xscale("log")
    speed.xaxis.set_minor_formatter("")  # the bars say their numbers
    bars(memory, {name: _whole_peak(r) / 1024 for name, r in at.items() if _whole_peak(r)},
         list(at), "peak memory with the weights, GiB")
    what = f"{shape['model']}, {shape['pairs_a_step']} pairs of {shape['lengths']} a step"
    _save(figure, usable, f"Training step: {what}", folder)
