"""s3d demo: pre-train a small model on real brain MRI that comes with the `demo` extra; show what it learned."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from s3d_kernels import use_backend

from .data import embedded_images
from .distributed import choose_device
from .loss import masked_mse
from .masking import MaskSampler
from .pretrain import PretrainResult, load_model, pretrain
from .pretrain_config import PretrainConfig


@dataclass(frozen=True)
class DemoConfig:
    """Pre-train a small model on embedded MRI volumes; a few minutes on two CPU cores."""

    output_dir: Path = Path("s3d-demo")
    """Where pictures, plots, logs and the checkpoint go. A stopped demo goes on when called again."""
    steps: int = 200
    """Optimiser steps."""
    seed: int = 0
    """Of weights, patches and masks."""


def demo(config: DemoConfig) -> PretrainResult | None:
    """Pre-train, then print a table: loss, what predicting the mean would give, and the time of a step.

    Returns: the result of the pre-training, or None if a signal stopped it.
    """
    images = embedded_images()
    print("images: " + ", ".join(image.name for image in images))
    run = PretrainConfig(
        images=tuple(str(image.path) for image in images),
        output_dir=config.output_dir,
        preset="small",
        # At 2 mm a patch of 64 voxels shows most of a brain.
        spacing_mm=2.0,
        patch_size=(64, 64, 64),
        mask_block=8,
        mask_ratio=0.75,
        steps=config.steps,
        batch_size=2,
        # A short run: the published momentum of 0.99 averages over 100 steps, too long a memory for so few. The larger
        # learning rate makes up for the shorter memory.
        momentum=0.9,
        learning_rate=5e-2,
        validate_every=max(1, config.steps // 4),
        checkpoint_every=100,
        workers=1,
        seed=config.seed,
    )
    result = pretrain(run)
    if result.steps < config.steps:
        return None
    sparse_seconds, dense_seconds = _step_seconds(run, load_model(result.checkpoint, choose_device(run.device)))
    picture = config.output_dir / f"reconstruction_{config.steps:06d}.png"
    rows = [
        ("validation loss before", f"{result.initial_loss:.4f}"),
        ("validation loss after", f"{result.final_loss:.4f}"),
        ("predicting the visible mean", f"{result.mean_loss:.4f}"),
        ("model / visible mean", f"{result.final_loss / result.mean_loss:.3f}"),
        ("seconds a step, sparse", f"{sparse_seconds:.3f}"),
        ("seconds a step, dense and masked", f"{dense_seconds:.3f}"),
        ("dense / sparse", f"{dense_seconds / sparse_seconds:.2f}"),
    ]
    table = "\n".join(f"| {name:<32} | {value:>8} |" for name, value in rows)
    table = f"| {'':<32} | {'':>8} |\n| {'-' * 32} | {'-' * 7}: |\n{table}\n"
    (config.output_dir / "summary.md").write_text(table, encoding="utf-8")
    print(f"\n{table}\npicture:    {picture}\nloss plot:  {config.output_dir / 'loss.png'}")
    print(f"checkpoint: {result.checkpoint}")
    return result


def _step_seconds(run: PretrainConfig, model: nn.Module, rounds: int = 5) -> tuple[float, float]:
    """Median seconds of a training step (forward, loss, backward) with sparse and with dense masked convolution.

    The two take turns, so that whatever else the machine does meets both.
    """
    device = next(model.parameters()).device
    x = torch.randn(run.batch_size, 1, *run.patch_size, device=device)
    mask = MaskSampler(run.patch_size, run.mask_block, run.mask_ratio, run.seed)(run.batch_size, 0, device=device)
    seconds: dict[str, list[float]] = {"auto": [], "reference": []}
    for _ in range(rounds + 1):
        for backend, measured in seconds.items():
            with use_backend(backend):
                begin = time.perf_counter()
                masked_mse(model(x, mask), x, mask).backward()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                measured.append(time.perf_counter() - begin)
            model.zero_grad(set_to_none=True)
    auto, reference = (statistics.median(measured[1:]) for measured in seconds.values())
    return auto, reference
