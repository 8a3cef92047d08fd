"""A few steps of a method on smooth volumes, without a trainer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s3d.pretext.method import Draw, Pretext

SHAPE = (16, 24, 16)


def smooth_volumes(count: int = 4) -> Tensor:
    """[count, 1, *SHAPE]: sums of slow waves, z-scored."""
    rng = np.random.default_rng(0)
    axes = np.meshgrid(*(np.arange(side) for side in SHAPE), indexing="ij")
    volumes = [sum(np.sin(rng.uniform(0.2, 0.5) * axis + rng.uniform(0, 6)) for axis in axes) for _ in range(count)]
    return torch.from_numpy(np.array([(v - v.mean()) / v.std() for v in volumes]).astype(np.float32))[:, None]


def draw(step: int, batch: int = 2, first: int = 0, wanted: int | None = None, seed: int = 0) -> Draw:
    return Draw(seed, (0, step), batch, first, batch if wanted is None else wanted)


def losses_before_and_after(pretext: Pretext[Any], steps: int, learning_rate: float) -> tuple[float, float]:
    """Loss of problems that are not trained on, before and after some steps on others."""
    torch.manual_seed(0)
    model = pretext.build_model()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, learning_rate)
    volumes = smooth_volumes()

    def loss(step: int) -> Tensor:
        first = step % 2 * 2
        problem = pretext.pose(volumes[first : first + 2], None, draw(step))
        return pretext.loss(pretext.answer(model, problem), problem, pretext.terms(problem))

    def mean_loss() -> float:
        with torch.no_grad():
            return sum(float(loss(1000 + problem)) for problem in range(4)) / 4

    before = mean_loss()
    for step in range(steps):
        optimizer.zero_grad(set_to_none=True)
        loss(step).backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimizer.step()
    return before, mean_loss()


def losses_of_fixed_problems(pretext: Pretext[Any], problems: Sequence[Any], steps: int) -> list[float]:
    """Loss of each step on a few problems of two samples, one after the other and again."""
    torch.manual_seed(0)
    model = pretext.build_model()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 2e-3)
    history = []
    for step in range(steps):
        problem = problems[step % len(problems)]
        optimizer.zero_grad()
        loss = pretext.loss(pretext.answer(model, problem), problem, 2)
        loss.backward()
        optimizer.step()
        pretext.after_step(model)
        history.append(loss.item())
    return history
