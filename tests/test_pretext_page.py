"""docs/pretext.md: its tables are those of the code of today, and its method of one's own runs."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from s3d.checkpoint import load_checkpoint
from s3d.comparison.step_cost import step_flops
from s3d.data import preprocess
from s3d.model import PRESETS, build_network, build_unet, preset_shape
from s3d.pretext.registry import METHODS
from s3d.pretrain import load_model
from s3d.pretrain_config import PretrainConfig
from s3d.segmentation.transfer import transfer
from s3d.training_log import read_log

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "pretext.md").read_text(encoding="utf-8")


def rows_below(head: str) -> list[list[str]]:
    """Cells of the table whose head begins so."""
    table = PAGE.split(f"\n{head}")[1].split("\n\n")[0]
    return [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]


def configured(method: str, preset: str, **switches: Any) -> PretrainConfig:
    return PretrainConfig(
        output_dir=Path(),
        method=method,
        preset=preset,
        patch_size=(40, 56, 40) if PRESETS[preset].total_stride == 8 else (64, 64, 64),
        mask_block=8 if PRESETS[preset].total_stride == 8 else 32,
        batch_size=2,
        device="cpu",
        **switches,
    )


def accepted(method: str, preset: str, **switches: Any) -> bool:
    try:
        configured(method, preset, **switches)
    except ValueError as error:
        if not str(error).startswith("preset"):
            raise
        return False
    return True


def test_the_table_of_methods_is_the_registry() -> None:
    rows = rows_below("| `--method` | source |")
    assert [row[0] for row in rows] == [f"`{method}`" for method in METHODS]
    for (*_, handed_over, architectures), (method, pretext) in zip(rows, METHODS.items(), strict=True):
        assert handed_over == pretext.trained.replace("+", " and ")
        # Larger patches for a stride of 32 and two crops of it.
        taken = {
            size.architecture for preset, size in PRESETS.items() if "small" in preset and accepted(method, preset)
        }
        every = {size.architecture for size in PRESETS.values()}
        assert taken == (every if architectures == "all" else set(architectures.split(", ")))


def test_the_table_of_networks_counts_their_parameters() -> None:
    rows = rows_below("| `--preset` | architecture |")
    assert {row[0] for row in rows} == {f"`{preset}`" for preset in PRESETS}
    for name, architecture, parameters, of_encoder, stride, _ in rows:
        size = PRESETS[name.strip("`")]
        with torch.device("meta"):
            network = build_unet(name.strip("`"))
        assert architecture == size.architecture
        assert stride == str(size.total_stride)
        counts = [sum(weight.numel() for weight in part.parameters()) for part in (network, network.encoder)]
        assert [parameters, of_encoder] == [f"{count:,}" for count in counts]


def test_the_table_of_costs_counts_operations() -> None:
    presets = ["small", "convnext-small", "mednext-small", "swin-unetr-small"]
    rows = rows_below("| GFLOP | `small` |")
    assert {row[0].split(",")[0].strip("`") for row in rows} == METHODS.keys()
    for name, *cells in rows:
        method, *options = re.findall(r"[\w-]+", name)
        switches = {option.removeprefix("--no-").replace("-", "_"): False for option in options}
        assert [cell != "-" for cell in cells] == [accepted(method, preset, **switches) for preset in presets]
        # One of each, as the others take their time.
        preset, cell = next(pair for pair in zip(presets, cells, strict=True) if pair[1] != "-")
        config = configured(method, preset, **switches)
        assert cell == f"{step_flops(METHODS[method](config), config) / 2e9:.2f}", (name, preset)


def test_the_method_of_the_page_trains_and_is_taken_over(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    (command,) = re.findall(r"^python denoising.py (.*?[^\\])\n", PAGE, flags=re.DOTALL | re.MULTILINE)
    preprocess([str(path) for path in sorted(images.iterdir())], tmp_path / "volumes", progress=False)
    (tmp_path / "denoising.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(METHODS, "denoising", None)  # such that it is gone afterwards
    arguments = shlex.split(command.replace("\\\n", ""))
    arguments[arguments.index("--steps") + 1] = "8"
    importlib.import_module("denoising").main([*arguments, "--device", "cpu", "--workers", "0"])
    run = tmp_path / "runs" / "denoising"
    rows = read_log(run / "log.csv")
    before, after = (row["validation_loss"] for row in rows if "validation_loss" in row)
    assert after < before
    assert (run / "reconstruction_000008.png").exists()
    checkpoint = run / "checkpoint.pt"
    assert type(load_model(checkpoint)).__name__ == "WholeNetwork"
    network = build_network(preset_shape("small"), 1, 2)
    taken = transfer(network, load_checkpoint(checkpoint), "encoder+decoder")
    assert {row.reason for row in taken if row.action == "initialised"} == {"heads start anew"}
