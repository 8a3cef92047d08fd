"""Backends: one table of them, and the choice among them."""

from .interface import (
    Backend,
    BlockGeometry,
    BlocksProblem,
    ConvProblem,
    FusingBackend,
    NormProblem,
    PoolProblem,
    Problem,
    UpconvProblem,
    WindowGeometry,
)
from .measurements import load_measurements, tuning
from .native import NativeBackend
from .reference import ReferenceBackend
from .selection import (
    REGISTRY,
    UnsupportedProblem,
    call,
    check_name,
    computes_natively,
    current_backend,
    explain,
    fusing,
    register,
    use_backend,
)
from .spconv_pairs import SpconvBackend
from .torch_gather import TorchGatherBackend
from .triton_kernels import TritonBackend

__all__ = [
    "REGISTRY",
    "Backend",
    "BlockGeometry",
    "BlocksProblem",
    "ConvProblem",
    "FusingBackend",
    "NormProblem",
    "PoolProblem",
    "Problem",
    "UnsupportedProblem",
    "UpconvProblem",
    "WindowGeometry",
    "call",
    "check_name",
    "computes_natively",
    "current_backend",
    "explain",
    "fusing",
    "load_measurements",
    "register",
    "tuning",
    "use_backend",
]

register(ReferenceBackend())
register(SpconvBackend())
register(TorchGatherBackend())
register(TritonBackend())
register(NativeBackend())
