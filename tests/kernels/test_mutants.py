"""The proof that the suite can fail: each of these faults, put into a copy of the package, must turn it red."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import s3d_kernels

PACKAGE = Path(s3d_kernels.__file__).parent
HERE = Path(__file__).parent

# name: (file, text, replacement)
MUTANTS: dict[str, tuple[str, str, str]] = {
    "tap flipped": ("backends/torch_gather.py", "weight, bias, geometry.stride", "weight.flip(2), bias, geometry.stride"),
    "halo piece dropped": ("backends/torch_gather.py", "for z, y, x in itertools.product(*per_axis)", "for z, y, x in list(itertools.product(*per_axis))[1:]"),
    "masked neighbours read": ("backends/torch_gather.py", "place.masked_fill_((rows < 0)[:, None, None, None, None], 0)", "pass"),
    "reverse table not mirrored": ("backends/interface.py", "rows).long().flip(1)", "rows).long()"),
    "voxel mask of the input ignored": ("backends/torch_gather.py", "x = _zero_masked(x, geometry.source_voxels)", "pass"),
    "voxel mask of the gradient ignored": ("backends/torch_gather.py", "grad = _zero_masked(grad, geometry.target_voxels)\n        windows", "windows"),
    "unbiased variance": ("backends/torch_gather.py", "correction=0", "correction=1"),
    "squares without the spread of the means": ("backends/torch_gather.py", "squares + count * deviation.square()", "squares"),
    "fill gradient over all voxels": ("operators/blocks.py", "torch.where(visible > 0, 0, grad)", "grad"),
    "neighbour columns in another order": ("block_mask.py", "windows[n, z, y, x]", "windows[n, z, y, x].transpose(1, 3)"),
    "maximum sees padding": ("backends/torch_gather.py", "-math.inf) if any(geometry.padding) else windows", "0) if any(geometry.padding) else windows"),
    "norm gradient without its mean term": ("operators/norm.py", "offset, tilt = of_grad * share", "offset, tilt = 0 * of_grad * share"),
    "sign of the activation from the wrong side": ("operators/norm.py", "saved_y = y if residual", "saved_y = residual if residual"),
    "features computed again without activation": ("recompute.py", "*block, self.slope, self", "*block, 1.0, self"),
    "features computed again without residual": ("recompute.py", "*tables, residual, *block", "*tables, None, *block"),
    "convolution computed again without bias": ("recompute.py", "self.weight, self.bias, *self", "self.weight, None, *self"),
    "recipe in the place of another tensor": ("operators/norm.py", "SAVED_X, SAVED_Y = 0, 1", "SAVED_X, SAVED_Y = 1, 0"),
    "bias forgotten in reference": ("backends/reference.py", "F.conv3d(dense, weight, bias,", "F.conv3d(dense, weight, None,"),
    "phases from the wrong positions": ("backends/stacked_phases.py", "part[:, p : p + d,", "part[:, 1 - p : 1 - p + d,"),
    "phases in another order": ("backends/stacked_phases.py", "y[:, p::2, q::2, r::2]", "y[:, r::2, q::2, p::2]"),
    "product of weights in the wrong tap": ("fused_upconv.py", "sums.permute(0, 1, 2, 6, 7, 3, 4, 5)", "sums.permute(0, 1, 2, 6, 7, 3, 5, 4)"),
    "border of a constant forgotten": ("fused_upconv.py", "y = known.add_border(y)", "pass"),
}  # fmt: skip


def suite(package: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """A small part of the operator suite against a copy of the package."""
    chosen = "(against_the_oracle or equals_two_steps) and float32 or gradients_of_blocks"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen]
    command += [str(HERE / name) for name in ("test_upconv.py", "test_operators.py", "test_block_sparse.py")]
    environment = {**os.environ, "PYTHONPATH": str(package.parent)}
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)


def copied(folder: Path) -> Path:
    """A copy of the package that comes first on the path."""
    return Path(shutil.copytree(PACKAGE, folder / "copy" / "s3d_kernels", ignore=shutil.ignore_patterns("__pycache__")))


@pytest.mark.slow
def test_the_copy_itself_is_green(tmp_path: Path) -> None:
    result = suite(copied(tmp_path), tmp_path)
    assert result.returncode == 0, result.stdout[-2000:]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in list(MUTANTS)[:3] else [pytest.mark.slow]) for n in MUTANTS]
)
def test_mutant_is_caught(name: str, tmp_path: Path) -> None:
    package = copied(tmp_path)
    file, text, replacement = MUTANTS[name]
    source = (package / file).read_text()
    assert text in source, f"the mutant no longer applies: {text!r} is not in {file}"
    (package / file).write_text(source.replace(text, replacement))
    result = suite(package, tmp_path)
    assert result.returncode == 1, result.stdout[-2000:]
    assert " failed" in result.stdout
    assert "ERROR collecting" not in result.stdout


def test_every_mutant_still_applies() -> None:
    for file, text, _ in MUTANTS.values():
        assert text in (PACKAGE / file).read_text(), f"{text!r} is not in {file}"
