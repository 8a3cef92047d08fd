"""Logits of a whole volume from a network that sees one window at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor

from s3d.segmentation.plan import Voxels


def check_windows(overlap: float, batch: int) -> None:
    """ValueError unless neighbouring windows can share this part of their sides, and be shown so many at a time."""
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap must be at least 0 and below 1, got {overlap}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1 window, got {batch}")


@torch.no_grad()
def predict_logits(
    network: Callable[[Tensor], Tensor],
    voxels: Tensor,  # [C, D, H, W] float32, on the CPU
    patch_size: Voxels,
    *,
    overlap: float = 0.5,
    mirror: bool = False,
    device: torch.device | str = "cpu",
    batch: int = 1,
) -> Tensor:
    """Slides a window over a volume; where windows overlap, their logits are averaged with Gaussian weights.

    Source: nnU-Net (Isensee et al., Nature Methods 2021): standard deviation of the Gaussian an eighth of the window,
    mirroring along all combinations of axes. A volume that is smaller than the window is centred in it and surrounded
    by the minimum of each channel, as in training. Only windows are on the device: the volume and its logits stay on
    the CPU. The caller sets the network's mode and autocast.

    Args:
        network: [N, C, *patch_size] -> logits [N, K, *patch_size], on `device`; without deep supervision.
        voxels: the volume.
        patch_size: the window.
        overlap: of neighbouring windows, a share of their side.
        mirror: average over the eight mirror images of each window, for eight times the work.
        device: where the network is.
        batch: windows that the network is shown at a time.
    Returns: logits, [K, D, H, W] float32, on the CPU.
    Raises:
        ValueError: the overlap or the batch makes no sense.
    """
    # Imported late: it takes seconds, and `s3d --help` should not.
    from monai.inferers.utils import sliding_window_inference

    check_windows(overlap, batch)
    flips = list(product((False, True), repeat=3)) if mirror else [(False, False, False)]

    def predictor(windows: Tensor) -> Tensor:  # [N, C, *patch_size]
        logits = _mirrored(network, windows, flips[0])
        for others in flips[1:]:
            logits += _mirrored(network, windows, others)
        return logits / len(flips)

    padded, inside = _padded(voxels, patch_size)
    logits = sliding_window_inference(
        padded[None],
        patch_size,
        batch,
        predictor,
        overlap=overlap,
        mode="gaussian",
        sw_device=device,
        device="cpu",
    )
    assert isinstance(logits, Tensor)
    return logits[0][inside]


def _mirrored(network: Callable[[Tensor], Tensor], windows: Tensor, flips: Sequence[bool]) -> Tensor:
    """Logits of the mirrored windows, mirrored back; float32, whatever autocast makes of them."""
    axes = [axis + 2 for axis, flipped in enumerate(flips) if flipped]
    return network(windows.flip(axes)).flip(axes).float()


def _padded(voxels: Tensor, patch_size: Voxels) -> tuple[Tensor, tuple[slice, ...]]:
    """The volume, at least as large as the window, and where in it, all channels, the volume is."""
    shape = [max(side, window) for side, window in zip(voxels.shape[1:], patch_size)]
    starts = [(large - side) // 2 for large, side in zip(shape, voxels.shape[1:])]
    inside = (slice(None), *(slice(start, start + side) for start, side in zip(starts, voxels.shape[1:])))
    if tuple(shape) == tuple(voxels.shape[1:]):
        return voxels, inside
    padded = voxels.amin(dim=(1, 2, 3), keepdim=True).expand(-1, *shape).clone()
    padded[inside] = voxels
    return padded, inside
