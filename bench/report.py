"""Turns the rows of a benchmark run into JSON, a Markdown table and a plot.

python bench/report.py FOLDER draws them again from the JSON in the folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def write_report(rows: list[Row], machine: dict[str, Any], folder: Path) -> str:
    """Write `results.json`, `results.md` and `encoder.png`. Returns: the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    text = markdown(rows, machine)
    (folder / "results.md").write_text(text)
    encoder = _encoder_rows(rows)
    if encoder:
        plot(encoder, machine, folder / "encoder.png")
    return text


def _encoder_rows(rows: list[Row]) -> list[Row]:
    """Those of the encoder, by masked share."""
    return sorted((row for row in rows if row["question"] == "encoder"), key=lambda row: float(row["mask_ratio"]))


def markdown(rows: list[Row], machine: dict[str, Any]) -> str:
    """Tables of the encoder and of its layers; ratios are against `reference` and `dense masked` of the same run."""
    parts = [
        f"{machine['device']} ({machine['instruction_set']}), torch {machine['torch']}, Python {machine['python']}",
        "",
    ]
    encoder = _encoder_rows(rows)
    if encoder:
        first = encoder[0]
        parts += [
            f"Encoder of {first['preset']}, one patch of {first['patch_size']}^3, forward and backward:",
            "",
            "| masked | contender | forward, s | step, s | faster than reference | than dense masked "
            "| peak memory, MiB | of reference | of dense masked |",
            "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in encoder:
            same = {r["contender"]: r for r in encoder if r["mask_ratio"] == row["mask_ratio"]}
            cells = [f"{100 * row['masked']:.0f} %", row["contender"]]
            cells += [f"{row['forward_seconds']:.2f}", f"{row['step_seconds']:.2f}"]
            cells += [_ratio(same.get(base), row, "step_seconds") for base in ("reference", "dense masked")]
            cells.append("" if row["peak_mebibytes"] is None else f"{row['peak_mebibytes']:.0f}")
            cells += [_ratio(row, same.get(base), "peak_mebibytes") for base in ("reference", "dense masked")]
            parts.append(f"| {' | '.join(cells)} |")
        parts.append("")
    steps = [row for row in rows if row["question"] == "training step"]
    if steps:
        first = steps[0]
        base = next((row for row in steps if row["contender"] == "reference"), None)
        parts += [
            f"Training step of S3D with {first['preset']}, one patch of {first['patch_size']}^3, "
            f"{100 * first['mask_ratio']:.0f} % masked:",
            "",
            "| backend | step, s | faster than reference |",
            "| --- | ---: | ---: |",
        ]
        for row in steps:
            parts.append(f"| {row['contender']} | {row['step_seconds']:.2f} | {_ratio(base, row, 'step_seconds')} |")
        parts.append("")
    layers = [row for row in rows if row["question"] == "layer"]
    for ratio in dict.fromkeys(row["mask_ratio"] for row in layers):
        parts += _layer_table([row for row in layers if row["mask_ratio"] == ratio])
    return "\n".join(parts)


def _layer_table(layers: list[Row]) -> list[str]:
    """Forward and step of every layer and contender, at one mask ratio."""
    names = list(dict.fromkeys(row["contender"] for row in layers))
    parts = [
        f"Layers at {100 * layers[0]['mask_ratio']:.0f} % masked, {layers[0]['patch_size']}^3, ms: forward / forward "
        "and backward. In brackets: arithmetic of forward, counting pairs of visible voxels only, as a share of a "
        "large float32 matrix product in the same run.",
        "",
        f"| layer | block of the input | {' | '.join(names)} |",
        f"| --- | ---: | {' | '.join('---:' for _ in names)} |",
    ]
    for layer in dict.fromkeys(row["layer"] for row in layers):
        of = {row["contender"]: row for row in layers if row["layer"] == layer}
        cells = [layer, str(next(iter(of.values()))["block"])]
        for name in names:
            if name not in of:
                cells.append("")
                continue
            row = of[name]
            cell = f"{1000 * row['forward_seconds']:.1f} / {1000 * row['step_seconds']:.1f}"
            if "pair_flop" in row and not name.startswith("dense"):
                share = row["pair_flop"] / row["forward_seconds"] / row["multiplication_flop_per_second"]
                cell += f" ({share:.2f})"
            cells.append(cell)
        parts.append(f"| {' | '.join(cells)} |")
    return [*parts, ""]


def _ratio(numerator: Row | None, denominator: Row | None, key: str) -> str:
    if numerator is None or denominator is None or numerator[key] is None or denominator[key] is None:
        return ""
    return f"{numerator[key] / denominator[key]:.2f}x"


def plot(encoder: list[Row], machine: dict[str, Any], path: Path) -> None:
    """Time and peak memory of a step against the masked share."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    time_axes, memory_axes = figure.subplots(1, 2)
    for name in dict.fromkeys(row["contender"] for row in encoder):
        mine = [row for row in encoder if row["contender"] == name]
        shares = [100 * row["masked"] for row in mine]
        time_axes.plot(shares, [row["step_seconds"] for row in mine], "o-", label=name)
        if all(row["peak_mebibytes"] is not None for row in mine):
            memory_axes.plot(shares, [row["peak_mebibytes"] for row in mine], "o-", label=name)
    time_axes.set_ylabel("seconds, forward and backward")
    memory_axes.set_ylabel("peak memory of the step, MiB")
    for axes in (time_axes, memory_axes):
        axes.set_xlabel("masked, %")
        axes.set_ylim(bottom=0)
        axes.legend()
    figure.suptitle(f"encoder of {encoder[0]['preset']}, {encoder[0]['patch_size']}^3, {machine['device']}")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    folder_ = Path(sys.argv[1])
    content = json.loads((folder_ / "results.json").read_text())
    print(write_report(content["rows"], content["machine"], folder_))
