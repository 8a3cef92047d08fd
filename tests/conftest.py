"""What must be decided before anything is imported."""

from __future__ import annotations

import os

import torch

# Triton reads it once, when it is imported: its kernels are functions in Python then, which run on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
