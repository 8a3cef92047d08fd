"""How long does a step of the encoder take, and how much memory, against dense masked convolution?"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from cases import Case
from contenders import CONTENDERS
from memory import peak_of
from settings import Settings
from turns import CLOCK, Report

from s3d_kernels import BlockMask


def cases(settings: Settings) -> list[Case]:
    """The encoder at the ratios that are asked for; each takes minutes on a CPU."""
    combined = itertools.product(
        settings.patch_sizes, settings.batch_sizes, settings.blocks, settings.mask_kinds, settings.dtypes
    )
    return [
        Case("encoder", "", settings.preset, patch, batch, block, kind, ratio, dtype)
        for patch, batch, block, kind, dtype in combined
        for ratio in settings.ratios((0.75,))
        if ratio > 0 or kind == "blocks"
    ]


@pytest.mark.timeout(0)
@pytest.mark.benchmark(timer=CLOCK)
def test_encoder(case: Case, contender: str, phase: str, report: Report) -> None:
    report(case, contender, phase)


TINY = Case("encoder", "", "tiny", 24, 1, 8, "blocks", 0.5, "float32")


@pytest.mark.parametrize("name", CONTENDERS)
def test_contenders_agree(name: str) -> None:
    """What is compared must compute the same: equal sums of all features (the plain dense encoder sees no mask)."""
    contender = CONTENDERS[name]
    reason = contender.why_not(TINY, "cpu")
    if reason is not None:
        pytest.skip(reason)
    mask = TINY.mask("cpu")
    encoder, x = TINY.network().double(), torch.randn(1, 1, *mask.shape, dtype=torch.float64)
    truth = CONTENDERS["reference"].prepare(TINY, encoder, x, mask).forward().item()
    run = contender.prepare(TINY, encoder, x, mask)
    if not run.masked:
        everything = BlockMask.random(1, 3, 8, 0.0)
        truth = CONTENDERS["reference"].prepare(TINY, encoder, x, everything).forward().item()
    assert run.forward().item() == pytest.approx(truth, rel=1e-9)


def test_memory_is_measured() -> None:
    assert peak_of(dataclasses.replace(TINY, patch_size=64, block=32), "torch") > 1
