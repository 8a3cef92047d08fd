#!/usr/bin/env bash
# Everything that needs a GPU, in one command: self-check, tests, benchmark at the published patch size.
set -euo pipefail
cd "$(dirname "$0")/.."
python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("gpu_check: torch sees no GPU")'
python -c 'import torch; print(torch.__version__, torch.cuda.get_device_name())'
python -m s3d_kernels.selfcheck --device cuda
pytest
pytest bench/ --benchmark --patch-size 160 --rounds 10
