"""Floating-point operations of a pre-training step by part of the network, with what is known beforehand and without.

python bench/step_flops.py --patch-size 160 --mask-ratios 0.6 0.75 0.9

What is counted: see `flops`. Nothing is computed: the step of `s3d.model.S3D` runs on memory that nobody fills, and
the operators that it calls are counted instead.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from cases import Case
from torch import Tensor

from s3d.loss import masked_mse
from s3d.model import S3D
from s3d_kernels.flops import FlopCount, Shares

UP, SKIP, PHASE_WEIGHTS = "decoder, upsampled half", "decoder, skip half", "decoder, phase weights"
PARTS = ("encoder", "densification", UP, SKIP, PHASE_WEIGHTS, "head")
ours = torch.ops.s3d_kernels
# Of those whose weight is a product of weights, and of that product, which is counted as it is computed: by points,
# with the transforms to them and back.
OF_OPERATOR = {
    ours.upconv3d: UP,
    ours.upconv3d_grad_input: UP,
    ours.upconv3d_grad_weight: UP,
    torch.ops.aten.mm: PHASE_WEIGHTS,
    torch.ops.aten.bmm: PHASE_WEIGHTS,
}


def parts_of(model: S3D) -> Callable[[Tensor], Shares | None]:
    """What share each part of the autoencoder has in the work with a weight; None for tensors that are none."""
    unet = model.unet
    found: dict[int, tuple[str, int]] = {}  # storage: part, and how many of the input channels are upsampled ones
    modules = {"encoder": unet.encoder, "densification": model.densify, "head": unet.decoder.seg_layers}
    for part, module in modules.items():
        for parameter in module.parameters():
            found[_storage(parameter)] = (part, 0)
    for up, stage in zip(unet.decoder.transpconvs, unet.decoder.stages, strict=True):
        found[_storage(up.weight)] = (UP, 0)
        found[_storage(stage.convs[0].conv.weight)] = (SKIP, up.out_channels)

    def shares(tensor: Tensor) -> Shares | None:
        if tensor.dim() < 2 or _storage(tensor) not in found:
            return None
        part, upsampled = found[_storage(tensor)]
        if not upsampled:
            return {part: 1.0}
        first, channels = tensor.storage_offset() // tensor.stride(1), tensor.shape[1]
        of_up = min(channels, max(0, upsampled - first)) / channels
        return {UP: of_up, SKIP: 1 - of_up}

    return shares


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def step_flops(case: Case, shortcuts: bool) -> dict[str, float]:
    """Operations of forward and backward of one step of a case, of each part."""
    model = case.network()
    assert isinstance(model, S3D)
    model.shortcuts = shortcuts
    mask = case.mask("cpu")
    x = case.input(mask)
    with FlopCount(parts_of(model), OF_OPERATOR) as count:
        masked_mse(model(x, mask, masked_only=True), x, mask).backward()
    assert set(count.flops) <= set(PARTS), f"work that belongs to no part: {count.flops}"
    return {part: count.flops[part] for part in PARTS}


def table(preset: str, patch_size: int, block: int, mask_ratios: Sequence[float]) -> str:
    """Markdown: a row for each part, the sum, and how much less that is than of the dense step."""

    def column(mask_ratio: float, shortcuts: bool) -> dict[str, float]:
        return step_flops(Case("step", "", preset, patch_size, 1, block, "blocks", mask_ratio, "float32"), shortcuts)

    # With everything visible the plain step is the dense one.
    columns = {"dense": column(0.0, False)}
    for ratio in mask_ratios:
        columns[f"{100 * ratio:g} %, plain decoder"] = column(ratio, False)
        columns[f"{100 * ratio:g} %"] = column(ratio, True)
    sums = [sum(flops.values()) for flops in columns.values()]
    rows = [["GFLOP", *columns], ["---", *("---:" for _ in columns)]]
    rows += [[part, *(f"{flops[part] / 1e9:,.1f}" for flops in columns.values())] for part in PARTS]
    rows += [["sum", *(f"{total / 1e9:,.1f}" for total in sums)]]
    rows += [["dense / this", *(f"{sums[0] / total:.2f}" for total in sums)]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="resenc-l")
    parser.add_argument("--patch-size", type=int, default=160)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--mask-ratios", type=float, nargs="+", default=(0.6, 0.75, 0.9))
    given = parser.parse_args()
    print(table(given.preset, given.patch_size, given.block, given.mask_ratios))


if __name__ == "__main__":
    main()
