"""Which layers gain: every distinct convolution, norm and pooling of the encoder, gathers, and a depthwise block."""

from __future__ import annotations

import itertools

import pytest
from cases import Case, layers_of
from settings import Settings
from turns import CLOCK, Report

pytestmark = pytest.mark.timeout(0)


def cases(settings: Settings) -> list[Case]:
    """Every layer in every setting; with nothing masked convolutions only, unless everything is asked for."""
    combined = itertools.product(
        settings.patch_sizes, settings.batch_sizes, settings.blocks, settings.mask_kinds, settings.dtypes
    )
    return [
        Case("layer", layer, settings.preset, patch, batch, block, kind, ratio, dtype)
        for patch, batch, block, kind, dtype in combined
        for ratio in settings.ratios((0.75,))
        if ratio > 0 or kind == "blocks"
        for layer in layers_of(settings.preset)
        if settings.full or ratio > 0 or layer.endswith("conv 3")
    ]


@pytest.mark.benchmark(timer=CLOCK)
def test_layer(case: Case, contender: str, phase: str, report: Report) -> None:
    report(case, contender, phase)
