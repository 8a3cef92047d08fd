"""A whole S3D training step: sparse encoder, tokens, densification, dense decoder, loss, gradients."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from cases import Case
from settings import Settings
from turns import CLOCK, Report

# Networks of depthwise convolutions that are measured beside one of the same size, in its first setting.
MEDNEXT = {"resenc-l": "mednext-b", "tiny": "mednext-small"}


def cases(settings: Settings) -> list[Case]:
    """The step with masks of blocks; the method has no others. Then one with MedNeXt."""
    combined = itertools.product(settings.patch_sizes, settings.batch_sizes, settings.blocks, settings.dtypes)
    found = [
        Case("step", "", settings.preset, patch, batch, block, "blocks", ratio, dtype)
        for patch, batch, block, dtype in combined
        for ratio in settings.ratios((0.75,))
        if ratio > 0
    ]
    if settings.preset in MEDNEXT:
        found += [dataclasses.replace(case, preset=MEDNEXT[settings.preset]) for case in found[:1]]
    return found


@pytest.mark.timeout(0)
@pytest.mark.benchmark(timer=CLOCK)
def test_step(case: Case, contender: str, phase: str, report: Report) -> None:
    """All contenders must find the same loss, see ``turns.measure``."""
    report(case, contender, phase)
