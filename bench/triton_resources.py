"""What Triton makes of every kernel, and how much of its work is useful: the tables in docs/performance.md.

Nothing is run on a GPU: the calls of a ResEnc-L encoder are made with tensors on the CPU, launches are recorded and
compiled ahead of time.

Usage: python bench/triton_resources.py [--targets 80 90 100] [--dtypes bfloat16 float32] [--stages 0 1 2 3 4 5]
           [--every-configuration] [--json] | --count | --variants
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if os.environ.pop("TRITON_INTERPRET", "0") != "0":  # in which nothing is compiled
    os.execv(sys.executable, [sys.executable, *sys.argv])

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton_launches import Launch, recorded

from s3d_kernels import BlockMask
from s3d_kernels.backends.interface import BlockGeometry, Triple, WindowGeometry
from s3d_kernels.backends.triton_kernels import TritonBackend, configs, conv3d, conv3d_depthwise, conv3d_grad_weight
from s3d_kernels.backends.triton_kernels.configs import ConvClass, ConvConfig, GradWeightClass
from s3d_kernels.backends.triton_kernels.window import forward_window
from s3d_kernels.block_sparse import block_geometry

# Block side and channels of each stage, of the convolutions 3x3x3; the first of a stage halves the resolution.
STAGES = ((32, 32), (16, 64), (8, 128), (4, 256), (2, 320), (1, 320))
MULTIPROCESSORS = 132  # of an H100; decides how many parts there are
REGISTERS, SHARED_BYTES = 65536, {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}  # of a multiprocessor
PROGRAMS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTIONS = {
    "mma": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "cp.async 16": r"cp\.async\.c[ag]\.shared\.global [^;]*, 0x10[,;]",
    "ld.global.v4": r"ld\.global\.[^;]*v4",
}


@dataclasses.dataclass(frozen=True)
class Resources:
    """Of one compiled kernel."""

    kernel: str
    what: str
    target: int
    dtype: str
    tiles: str
    registers: int
    stack_bytes: int
    at_step: bool  # whether with eight more registers fewer programs would fit on a multiprocessor
    shared_bytes: int
    programs: int  # on a multiprocessor
    instructions: dict[str, int]


# Which blocks are visible, of how many along an axis; changed by `variants`.
visible = {"mask_ratio": 0.5, "grid": 2}


def window(side: int, kernel: int = 3, stride: int = 1, partial: bool = False) -> tuple[BlockMask, WindowGeometry]:
    """A window over a few blocks; `side` is that of the output's."""
    mask = BlockMask.random(
        1, int(visible["grid"]), side * stride, visible["mask_ratio"], torch.Generator().manual_seed(0)
    )
    voxels = (torch.rand(mask.num_blocks, *mask.block) < 0.5) if partial else None
    coarse: Triple = (side, side, side)
    geometry = WindowGeometry(
        source_index=mask.index,
        source_voxels=voxels,
        target_index=mask.index,
        target_voxels=None if voxels is None else voxels[:, ::stride, ::stride, ::stride].contiguous(),
        table=mask.neighbours(),
        radius=(1, 1, 1),
        batch=1,
        shape=mask.shape,
        target_block=coarse,
        kernel_size=(kernel,) * 3,
        stride=(stride,) * 3,
        padding=(kernel // 2,) * 3,
    )
    return mask, geometry


def convolution(
    dtype: torch.dtype, side: int, channels: tuple[int, int], kernel: int = 3, stride: int = 1, partial: bool = False
) -> None:
    """All kernels of a convolution, fused ones too."""
    mask, geometry = window(side, kernel, stride, partial)
    backend = TritonBackend("recorded", ("cpu",))
    x = torch.empty(mask.num_blocks, *geometry.source_block, channels[0], dtype=dtype)
    grad = torch.empty(mask.num_blocks, *geometry.target_block, channels[1], dtype=dtype)
    weight = torch.empty(channels[1], channels[0], *geometry.kernel_size, dtype=dtype)
    backend.conv3d(x, weight, None, geometry, 1)
    backend.conv3d_grad_input(grad, weight, geometry, 1)
    backend.conv3d_grad_weight(grad, x, geometry, 1)
    if stride == 1 and side >= 4 and channels[0] >= 16:
        tables = tuple(torch.empty(1, channels[0]) for _ in range(3))
        backend.conv3d_fused(x, weight, None, tables, 0.01, geometry, mask.sample_offsets, 1)  # type: ignore[arg-type]


def depthwise(dtype: torch.dtype, side: int, channels: int) -> None:
    mask, geometry = window(side)
    backend = TritonBackend("recorded", ("cpu",))
    x = torch.empty(mask.num_blocks, *geometry.source_block, channels, dtype=dtype)
    weight = torch.empty(channels, 1, *geometry.kernel_size, dtype=dtype)
    backend.conv3d(x, weight, None, geometry, channels)
    backend.conv3d_grad_input(x, weight, geometry, channels)
    backend.conv3d_grad_weight(x, x, geometry, channels)


def others(dtype: torch.dtype, side: int, channels: int) -> None:
    """Norms, pooling and blocks."""
    mask, geometry = window(side, kernel=2, stride=2)
    backend = TritonBackend("recorded", ("cpu",))
    blocks: BlockGeometry = block_geometry(mask)
    x = torch.empty(mask.num_blocks, *mask.block, channels, dtype=dtype)
    grad = torch.empty(mask.num_blocks, *geometry.target_block, channels, dtype=dtype)
    table = torch.empty(1, channels)
    backend.norm_statistics(x, blocks)
    backend.norm_apply(x, table, table, table, x, 0.01, blocks)
    backend.norm_grad_activation(x, x, None, table, table, table, table, 0.01, blocks)
    backend.norm_grad_sums(x, x, table, table, blocks)
    backend.norm_grad_input(x, x, table, table, table, table, table, blocks)
    for kind, divisor in (("avg", 8), ("max", 0)):
        backend.pool3d(x, geometry, kind, divisor)  # type: ignore[arg-type]
        backend.pool3d_grad(grad, x, geometry, kind, divisor)  # type: ignore[arg-type]
    backend.gather_blocks(torch.empty(1, channels, *mask.shape, dtype=dtype), blocks)
    backend.scatter_blocks(x, torch.empty(channels, dtype=dtype), blocks)


def calls(stages: list[int]) -> Iterator[tuple[str, Callable[[torch.dtype], None]]]:
    """What is compiled, by name."""
    for stage in stages:
        side, channels = STAGES[stage]
        before = STAGES[max(stage - 1, 0)][1]
        yield f"stage {stage}", lambda dtype, s=side, c=channels: convolution(dtype, s, (c, c))
        if stage == 0:
            yield "stem", lambda dtype, s=side, c=channels: convolution(dtype, s, (1, c))
            yield "depthwise", lambda dtype, s=side, c=channels: depthwise(dtype, s, c)
            yield "norms, pooling, blocks", lambda dtype, c=channels: others(dtype, 8, c)
            yield "partly visible", lambda dtype, c=channels: convolution(dtype, 4, (c, c), partial=True)
        else:
            yield (
                f"to stage {stage}",
                lambda dtype, s=side, b=before, c=channels: convolution(dtype, s, (b, c), stride=2),
            )
            yield f"projection {stage}", lambda dtype, s=side, b=before, c=channels: convolution(dtype, s, (b, c), 1)


def resources(launch: Launch, what: str, dtype: torch.dtype, target: int) -> Resources:
    """Compile and look at the result."""
    compiled = launch.compile(GPUTarget("cuda", target, 32))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [str(PROGRAMS / "cuobjdump"), "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    fit, fit_with_more = (REGISTERS // ((-(-numbers["REG"] // 8) + more) * 8 * 32 * warps) for more in (0, 1))
    by_memory = SHARED_BYTES[target] // (shared + 1024)
    constants = launch.options
    if constants.get("AFFINE"):
        what += ", fused"
    elif "SHAPE" in constants and constants["SHAPE"].TRANSPOSED:
        what += ", gradient of the input"
    tiles = "x".join(str(constants[name]) for name in ("TILE_M", "TILE_N", "TILE_K") if name in constants)
    return Resources(
        kernel=launch.kernel.__name__,
        what=what,
        target=target,
        dtype=str(dtype).removeprefix("torch."),
        tiles=f"{tiles}, {warps} warps" if tiles else f"{warps} warps",
        registers=numbers["REG"],
        stack_bytes=numbers["STACK"] + numbers["LOCAL"],
        at_step=fit_with_more < fit,
        shared_bytes=shared,
        programs=min(fit, by_memory, 64 // warps),
        instructions={name: len(re.findall(pattern, compiled.asm["ptx"])) for name, pattern in INSTRUCTIONS.items()},
    )


def launches(
    function: Callable[[torch.dtype], None], dtype: torch.dtype, every_configuration: bool
) -> Iterator[Launch]:
    """Recorded with the default configurations, or with all of each class."""
    tried: set[tuple[object, ConvConfig]] = set()

    def run(choose: Callable[..., ConvConfig]) -> list[Launch]:
        for module in (conv3d, conv3d_grad_weight):
            module.choose = choose  # type: ignore[attr-defined]
        with recorded() as found:
            function(dtype)
        return found

    if not every_configuration:
        yield from run(configs.choose)
        return
    while True:
        new = 0

        def next_one(kind: ConvClass | GradWeightClass, *_: Any) -> ConvConfig:
            nonlocal new
            left = [config for config in kind.space() if (kind, config) not in tried]
            new += bool(left)
            config = left[0] if left else kind.space()[0]
            tried.add((kind, config))
            return config

        found = run(next_one)
        if not new:
            return
        yield from found


def table(found: list[Resources], targets: list[int]) -> str:
    """Registers, shared memory and programs on a multiprocessor of each kernel, by what it computes."""
    rows: dict[tuple[str, str, str, str], dict[int, Resources]] = defaultdict(dict)
    for each in found:
        rows[each.kernel, each.what, each.dtype, each.tiles][each.target] = each
    columns = " | ".join(f"sm_{target}" for target in targets)
    lines = [
        f"| kernel | of | dtype | tile | {columns} | stack |",
        f"| --- | --- | --- | --- |{' ---: |' * len(targets)} ---: |",
    ]
    for (kernel, what, dtype, tiles), by_target in rows.items():
        cells = [f"{r.registers} / {r.shared_bytes // 1024} / {r.programs}" for r in (by_target[t] for t in targets)]
        worst = max(each.stack_bytes for each in by_target.values())
        lines.append(f"| `{kernel}` | {what} | {dtype} | {tiles} | {' | '.join(cells)} | {worst} |")
    return "\n".join(lines)


def variants(stage: int) -> set[str]:
    """Of kernels that masks of all ratios compile, by names and what they are specialised on."""
    found: set[str] = set()
    for ratio in (0.3, 0.35, 0.5, 0.6, 0.75, 0.8):
        visible.update(mask_ratio=ratio, grid=4)
        side, channels = STAGES[stage]
        with recorded() as launches_:
            convolution(torch.bfloat16, side, (channels, channels))
            others(torch.bfloat16, max(side, 2) // 2, channels)
        found |= {launch.variant(GPUTarget("cuda", 90, 32)) for launch in launches_}
    return found


def visible_neighbours(mask: BlockMask, tap: Triple) -> Tensor:
    """[V, *block] bool: where the voxel under a tap of a 3x3x3 window is visible."""
    padded = torch.nn.functional.pad(mask.to_dense()[:, 0], (1, 1) * 3)
    (d, h, w), (z, y, x) = mask.shape, tap
    shifted = padded[:, z : z + d, y : y + h, x : x + w]
    grid, block = mask.grid_shape, mask.block
    bricks = shifted.view(-1, grid[0], block[0], grid[1], block[1], grid[2], block[2]).permute(0, 1, 3, 5, 2, 4, 6)
    return bricks[mask.tables.grid]


def count() -> str:
    """Useful multiplications / issued ones, forward and for the gradient of the weight: 160^3, 75 % masked."""
    lines = [
        "| stage | block | tile | `conv3d_kernel` useful / issued | `conv3d_grad_weight_kernel` |",
        "| ---: | --- | --- | ---: | ---: |",
    ]
    for stage, (side, channels) in enumerate(STAGES):
        mask = BlockMask.random(1, 5, side, 0.75, torch.Generator().manual_seed(0))
        _, geometry = window(side)
        shape = forward_window(geometry).shape
        forward = ConvClass(torch.bfloat16, False, channels, channels, 1, shape)
        config = configs.candidates(forward)[0]
        of_weight = configs.candidates(
            GradWeightClass(torch.bfloat16, False, channels, channels, 1, shape, flat=False)
        )[0]
        pairs = issued = 0
        for tap in range(27):
            found = visible_neighbours(mask, (tap // 9, tap // 3 % 3, tap % 3)).flatten()
            pairs += int(found.sum())
            rows = torch.nn.functional.pad(found, (0, -len(found) % config.tile_m)).view(-1, config.tile_m)
            issued += (int(rows.any(1).sum()) if forward.skips(config) else len(rows)) * config.tile_m
        padded = padded_size(channels, config.tile_k) * padded_size(channels, config.tile_n) / channels**2
        voxels = padded_size(mask.num_blocks * side**3, of_weight.tile_k) * 27
        padded_weight = padded_size(channels, of_weight.tile_m) * padded_size(channels, of_weight.tile_n) / channels**2
        lines.append(
            f"| {stage} | {side}^3 x {channels} | {config.tile_m} x {config.tile_n} x {config.tile_k} | "
            f"{pairs / (issued * padded):.3f} | {pairs / (voxels * padded_weight):.3f} |"
        )
    return "\n".join(lines)


def padded_size(size: int, tile: int) -> int:
    return -(-size // tile) * tile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--stages", type=int, nargs="+", default=list(range(len(STAGES))))
    parser.add_argument("--every-configuration", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--count", action="store_true")
    parser.add_argument("--variants", action="store_true")
    options = parser.parse_args()
    if options.count:
        print(count())
        return
    if options.variants:
        print("\n".join(sorted(found for stage in options.stages for found in variants(stage))))
        return
    for module in (conv3d, conv3d_depthwise, conv3d_grad_weight):
        module.multiprocessors = lambda device: MULTIPROCESSORS  # type: ignore[attr-defined]
    found: list[Resources] = []
    for what, function in calls(options.stages):
        for name in options.dtypes:
            dtype = getattr(torch, name)
            for launch in launches(function, dtype, options.every_configuration):
                for target in options.targets:
                    found.append(resources(launch, what, dtype, target))
                    if options.json:
                        print(json.dumps(dataclasses.asdict(found[-1])), flush=True)
    if not options.json:
        print(table(found, options.targets))


if __name__ == "__main__":
    main()
