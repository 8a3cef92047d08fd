"""How do time and memory of a training step grow with patch side, batch, visible share and threads?"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import Case
from settings import ALL_RATIOS, Settings
from turns import CLOCK, Report


def cases(settings: Settings) -> list[Case]:
    """One thing is varied at a time, from the first of the settings; --full varies each further."""
    base = Case(
        "curve", "", settings.preset, settings.patch_sizes[0], 1, settings.blocks[0], "blocks", 0.75, settings.dtypes[0]
    )
    if not settings.measure:
        return [base]
    if settings.full:
        base = dataclasses.replace(base, patch_size=96)
    sides = (64, 96, 128, 160, 192) if settings.full else (64, base.patch_size, 128)
    batches = (1, 2, 4, 6) if settings.full else (1, 2)
    ratios = [ratio for ratio in ALL_RATIOS if ratio > 0] if settings.full else (0.6, 0.75, 0.9)
    most = torch.get_num_threads()
    threads = [1 << power for power in range(most.bit_length()) if 1 << power < most]
    varied = [
        *[dataclasses.replace(base, patch_size=side) for side in sides],
        *[dataclasses.replace(base, batch_size=batch) for batch in batches],
        *[dataclasses.replace(base, mask_ratio=ratio) for ratio in ratios],
        *([] if torch.cuda.is_available() else [dataclasses.replace(base, threads=number) for number in threads]),
    ]
    return list(dict.fromkeys(varied))


@pytest.mark.timeout(0)
@pytest.mark.benchmark(timer=CLOCK)
def test_curve(case: Case, contender: str, phase: str, report: Report) -> None:
    report(case, contender, phase)
