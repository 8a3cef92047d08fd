"""VoCo: where crops lie, which targets they have, and that the teacher follows."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import configure, losses, write_images
from toy_training import losses_of_fixed_problems

from s3d.checkpoint import NEWEST
from s3d.pretext.method import Draw
from s3d.pretext.voco import MOMENTUM, CropProblem, VoCo, base_crops, overlap_loss, overlap_shares
from s3d.pretrain import load_model, pretrain

PATCH = (16, 24, 16)


def method(**changes: object) -> VoCo:
    settings: dict[str, object] = {"method": "voco", "patch_size": PATCH, "mask_block": 4, **changes}
    return VoCo(configure(None, Path(), **settings))


def images(samples: int = 2) -> torch.Tensor:
    """Smooth, and other in each corner."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(samples, 1, 4, 6, 4, generator=generator)
    return torch.nn.functional.interpolate(coarse, PATCH, mode="trilinear")


def posed(step: int = 0, first: int = 0, wanted: int = 2) -> CropProblem:
    return method().pose(images()[first : first + wanted], None, Draw(0, (0, step), 2, first, wanted))


@pytest.mark.parametrize(
    ("patch", "stride", "grid", "size"),
    [
        ((40, 56, 40), 8, (2, 3, 2), (16, 16, 16)),
        ((160, 160, 160), 32, (2, 2, 2), (64, 64, 64)),
        ((96, 96, 24), 8, (4, 4, 1), (24, 24, 24)),
        ((16, 24, 16), 4, (2, 3, 2), (8, 8, 8)),
    ],
)
def test_base_crops(patch: tuple[int, ...], stride: int, grid: tuple[int, ...], size: tuple[int, ...]) -> None:
    assert base_crops(patch, stride) == (grid, size)


@pytest.mark.parametrize("patch", [(16, 24, 24), (64, 24, 24), (8, 64, 64)])
def test_patches_without_room_are_refused(patch: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"patch_size of voco must hold two base crops of at least 16 voxels"):
        configure(None, Path(), method="voco", preset="small", patch_size=patch)


def test_overlaps_by_hand() -> None:
    bases = [(0, 0, 0), (0, 4, 0), (2, 0, 0), (2, 4, 0)]
    assert overlap_shares((2, 4, 0), bases, (2, 4, 3)) == [0, 0, 0, 1]
    assert overlap_shares((1, 1, 0), bases, (2, 4, 3)) == [3 / 8, 1 / 8, 3 / 8, 1 / 8]


def test_shares_are_those_of_counted_voxels_and_add_up() -> None:
    problem, voco = posed(), method()
    assert problem.overlaps.shape == (2, 2, 12)
    torch.testing.assert_close(problem.overlaps.sum(2), torch.ones(2, 2))
    for sample in range(2):
        for crop, corner in enumerate(problem.corners[sample][12:]):
            covered = np.zeros(PATCH, dtype=bool)
            covered[tuple(slice(low, low + side) for low, side in zip(corner, voco.size))] = True
            for base, low in enumerate(voco.bases):
                part = covered[tuple(slice(first, first + side) for first, side in zip(low, voco.size))]
                assert float(problem.overlaps[sample, crop, base]) == pytest.approx(part.mean())


def test_bases_tile_the_patch_without_overlap() -> None:
    image = torch.arange(math.prod(PATCH), dtype=torch.float32).reshape(1, 1, *PATCH)
    problem = method().pose(image, None, Draw(0, (0, 0), 1, 0, 1))
    voxels = problem.crops[0, :12].flatten()
    assert torch.equal(voxels.sort().values, image.flatten())
    d, h, w = problem.corners[0][12]
    assert torch.equal(problem.crops[0, 12, 0], image[0, 0, d : d + 8, h : h + 8, w : w + 8])


def test_problems_depend_on_seed_step_and_sample_alone() -> None:
    whole, second = posed(), posed(first=1, wanted=1)
    assert torch.equal(whole.crops, posed().crops)
    assert torch.equal(whole.crops[1:], second.crops)
    assert torch.equal(whole.overlaps[1:], second.overlaps)
    assert not torch.equal(whole.overlaps, posed(step=1).overlaps)


def test_loss_by_hand() -> None:
    overlaps = torch.tensor([[[0.75, 0.25, 0.0, 0.0]]])
    predicted = torch.tensor([[[0.5, 0.25, 0.1, 0.3]]])
    expected = 0.75 * -math.log(0.75) + (0.1**2 + 0.3**2) / 2
    assert float(overlap_loss(predicted, overlaps)) == pytest.approx(expected, abs=1e-5)
    assert float(overlap_loss(overlaps, overlaps)) == pytest.approx(0, abs=1e-5)
    wrong = torch.tensor([[[0.0, 0.0, 1.0, 1.0]]])
    assert math.isfinite(float(overlap_loss(wrong, torch.tensor([[[1.0, 0.0, 0.0, 0.0]]]))))


def test_likeness_of_bases_is_punished() -> None:
    voco, problem = method(), posed()
    perfect = problem.overlaps
    unlike, alike = torch.eye(12).expand(2, -1, -1), torch.ones(2, 12, 12)
    assert float(voco.loss((perfect, unlike), problem, 2)) == pytest.approx(0, abs=1e-5)
    assert float(voco.loss((perfect, alike), problem, 2)) == pytest.approx(1, abs=1e-5)


def test_loss_is_the_mean_over_all_parts() -> None:
    torch.manual_seed(0)
    voco = method()
    model = voco.build_model()
    whole, parts = posed(), [posed(first=i, wanted=1) for i in range(2)]
    by_parts = [voco.loss(voco.answer(model, part), part, 2) for part in parts]
    torch.testing.assert_close(voco.loss(voco.answer(model, whole), whole, 2), sum(by_parts))


def test_only_the_encoder_learns_and_the_teacher_follows() -> None:
    torch.manual_seed(0)
    voco, problem = method(), posed()
    model = voco.build_model()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    voco.loss(voco.answer(model, problem), problem, 2).backward()
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
    assert all(p.requires_grad for p in model.unet.encoder.parameters())
    optimizer.step()
    voco.after_step(model)
    changed = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    assert changed == {"unet", "projection", "teacher"}
    assert not any(
        name.startswith(("unet.decoder.stages", "unet.decoder.seg_layers")) and not torch.equal(value, start[name])
        for name, value in model.state_dict().items()
    )
    for part, student in (("encoder", model.unet.encoder), ("projection", model.projection)):
        for name, new in student.named_parameters():
            taught = model.get_parameter(f"teacher.{part}.{name}")
            old = start[f"teacher.{part}.{name}"]
            torch.testing.assert_close(taught, MOMENTUM * old + (1 - MOMENTUM) * new)


def test_loss_falls_on_a_few_problems() -> None:
    voco, problems = method(), [posed(step) for step in range(4)]
    history = losses_of_fixed_problems(voco, problems, 60)
    trivial = np.mean([voco.trivial_loss(problem) for problem in problems])
    assert np.mean(history[-8:]) < 0.5 * min(np.mean(history[:8]), trivial)


def test_stopped_run_goes_on_with_its_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_images(tmp_path)
    settings = {"method": "voco", "patch_size": PATCH, "mask_block": 4, "steps": 4}
    whole = configure(images, tmp_path / "whole", **settings)
    pretrain(whole)
    original = VoCo.pose

    def interrupted(self: VoCo, image: torch.Tensor, valid: torch.Tensor | None, draw: Draw) -> CropProblem:
        if draw.stream == (0, 1):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, image, valid, draw)

    parts = configure(images, tmp_path / "parts", **settings)
    monkeypatch.setattr(VoCo, "pose", interrupted)
    assert pretrain(parts).steps == 2
    monkeypatch.undo()
    assert pretrain(parts).steps == 4
    assert losses(parts.output_dir) == losses(whole.output_dir)
    models = [load_model(config.output_dir / NEWEST) for config in (whole, parts)]
    for one, other in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(one, other)
    pairs = zip(models[0].unet.encoder.parameters(), models[0].teacher["encoder"].parameters(), strict=True)
    assert any(not torch.equal(student, taught) for student, taught in pairs)
    torch.manual_seed(whole.seed)
    start = VoCo(whole).build_model().teacher["encoder"].parameters()
    taught = models[0].teacher["encoder"].parameters()
    assert not any(torch.equal(first, last) for first, last in zip(start, taught, strict=True) if first.any())
    assert (whole.output_dir / f"reconstruction_{0:06d}.png").exists()
