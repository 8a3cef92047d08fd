"""Records one S3D training step: a trace for a browser (trace.json) and a table of its kernels (kernels.txt).

Usage: python bench/profile_step.py FOLDER [--patch-size 160] [--preset resenc-l]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from s3d.loss import masked_mse
from s3d.model import PRESETS, S3D, build_unet
from s3d_kernels import BlockMask

BLOCK = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the files are written")
    parser.add_argument("--patch-size", type=int, default=160, help="voxels along each axis (default: %(default)s)")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="resenc-l")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = S3D(build_unet(options.preset)).to(device)
    x = torch.randn(1, 1, *(options.patch_size,) * 3, device=device)
    generator = torch.Generator().manual_seed(0)
    mask = BlockMask.random(1, options.patch_size // BLOCK, BLOCK, 0.75, generator, device=device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            loss = masked_mse(model(x, mask), x, mask)
        loss.backward()
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(2):
        step()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as recorded:
        step()
    options.folder.mkdir(parents=True, exist_ok=True)
    recorded.export_chrome_trace(str(options.folder / "trace.json"))
    table = recorded.key_averages().table(sort_by=f"self_{device}_time_total", row_limit=60, max_name_column_width=80)
    (options.folder / "kernels.txt").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
