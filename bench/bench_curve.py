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
    patch, block = settings.patch_sizes[0], settings.blocks[0]
    base = Case("curve", "", settings.preset, patch, 1, block, "blocks", 0.75, settings.dtypes[0])
    if not settings.measure:
        return [base]
    sides = [side for side in ((64, 96, 128, 160, 192) if settings.full else (64,)) if side % block == 0]
    most = torch.get_num_threads()
    threads = [1 << power for power in range(most.bit_length()) if 1 << power < most]
    varied = [
        base,
        *[dataclasses.replace(base, patch_size=side) for side in sides],
        *[dataclasses.replace(base, batch_size=batch) for batch in ((2, 4, 6) if settings.full else ())],
        *[dataclasses.replace(base, mask_ratio=ratio) for ratio in (ALL_RATIOS[1:] if settings.full else ())],
        *([] if torch.cuda.is_available() else [dataclasses.replace(base, threads=number) for number in threads]),
    ]
    return list(dict.fromkeys(varied))


@pytest.mark.timeout(0)
@pytest.mark.benchmark(timer=CLOCK)
def test_curve(case: Case, contender: str, phase: str, report: Report) -> None:
    report(case, contender, phase)
