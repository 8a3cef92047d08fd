"""The choice of a backend."""

from collections.abc import Iterator

import pytest
import torch

import s3d_kernels as sk
from s3d_kernels import REGISTRY, BlockMask, BlockSparseTensor, backends, use_backend
from s3d_kernels.backends.measurements import drop_dependents
from s3d_kernels.backends.torch_gather import TorchGatherBackend
from s3d_kernels.selfcheck import CASES, selfcheck


class Spy(TorchGatherBackend):
    """Counts calls; cannot compute groups."""

    name = "spy"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def why_not(self, problem: object) -> str | None:
        return "groups are not for spies" if getattr(problem, "groups", 1) > 1 else None

    def conv3d(self, *arguments: object) -> torch.Tensor:
        self.calls.append("conv3d")
        return super().conv3d(*arguments)  # type: ignore[arg-type]

    def conv3d_grad_input(self, *arguments: object) -> torch.Tensor:
        self.calls.append("conv3d_grad_input")
        return super().conv3d_grad_input(*arguments)  # type: ignore[arg-type]


@pytest.fixture
def spy() -> Iterator[Spy]:
    before = dict(REGISTRY)
    backend = Spy()
    backends.register(backend)
    yield backend
    REGISTRY.clear()
    REGISTRY.update(before)
    drop_dependents()


def sparse(channels: int = 4) -> BlockSparseTensor:
    mask = BlockMask.random(1, 2, 4, 0.5, torch.Generator().manual_seed(0))
    return BlockSparseTensor.from_dense(torch.randn(1, channels, *mask.shape, requires_grad=True), mask)


def test_auto_takes_the_first_that_can(spy: Spy) -> None:
    sk.SparseConv3d(4, 4, 1)(sparse())
    assert spy.calls == ["conv3d"]
    sk.SparseConv3d(4, 4, 1, groups=2)(sparse())
    assert spy.calls == ["conv3d"]


def test_auto_says_once_whom_it_passes_over(spy: Spy, caplog: pytest.LogCaptureFixture) -> None:
    x, weight = sparse(), torch.randn(4, 2, 1, 1, 1)
    for kernel in (weight, weight.repeat(1, 1, 3, 3, 3)):
        sk.sparse_conv3d(x, kernel, groups=2, padding=kernel.shape[-1] // 2)
    assert caplog.messages == ["backend 'spy' is passed over: groups are not for spies; 'native' computes instead"]


def test_a_named_backend_that_cannot_says_why(spy: Spy) -> None:
    with pytest.raises(ValueError, match=r"backend 'spy' cannot compute ConvProblem.*groups are not for spies"):
        sk.sparse_conv3d(sparse(), torch.randn(4, 2, 1, 1, 1), groups=2, backend="spy")


def test_use_backend_nests_and_is_restored(spy: Spy) -> None:
    layer, x = sk.SparseConv3d(4, 4, 1), sparse()
    with use_backend("reference"):
        layer(x)
        assert spy.calls == []
        with use_backend("spy"):
            layer(x)
        assert spy.calls == ["conv3d"]
        layer(x)
    assert spy.calls == ["conv3d"]
    with pytest.raises(RuntimeError, match="stop"), use_backend("torch"):
        raise RuntimeError("stop")
    assert backends.current_backend() == "auto"


def test_backward_uses_the_backend_of_forward(spy: Spy) -> None:
    layer, x = sk.SparseConv3d(4, 4, 1), sparse()
    with use_backend("spy"):
        y = layer(x)
    with use_backend("reference"):
        y.blocks.sum().backward()
    assert spy.calls == ["conv3d", "conv3d_grad_input"]


def test_a_layer_can_have_its_own(spy: Spy) -> None:
    layer = sk.SparseConv3d(4, 4, 1)
    layer.backend = "torch"
    layer(sparse())
    assert spy.calls == []


def test_unknown_backends_are_named() -> None:
    with (
        pytest.raises(
            ValueError,
            match=r"backend must be 'auto' or one of \[.*'native', 'reference', 'spconv', 'torch'.*\], got 'cuda'",
        ),
        use_backend("cuda"),
    ):
        pass
    with pytest.raises(ValueError, match="got 'nope'"):
        sk.sparse_conv3d(sparse(), torch.randn(4, 4, 1, 1, 1), backend="nope")


def test_explain(spy: Spy) -> None:
    problem = backends.ConvProblem(
        "cpu", torch.float32, 4, 4, 2, (1, 1, 1), (1, 1, 1), (0, 0, 0), (4, 4, 4), partial=False
    )
    others = {
        "native": None,
        "triton": "its kernels are for cuda tensors, not cpu",
        "torch": None,
        "spconv": "spconv has no groups, and 2 are asked for",
        "reference": None,
    }
    assert sk.explain(problem) == {"spy": "groups are not for spies", **others}
    assert list(sk.explain(problem)) == ["spy", *others]


def test_selfcheck_passes_and_finds_a_wrong_backend(spy: Spy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("s3d_kernels.selfcheck.CASES", CASES[:1])
    monkeypatch.setattr("s3d_kernels.selfcheck.TOLERANCE", {torch.float32: 1e-5})
    assert all(finding.ok for finding in selfcheck() if finding.reason is None)
    original = Spy.conv3d
    monkeypatch.setattr(Spy, "conv3d", lambda *arguments: original(*arguments) * 1.001)
    found = {finding.backend: finding.ok for finding in selfcheck() if finding.reason is None}
    assert found.pop("spconv", True)  # where the package is
    assert found == {"spy": False, "native": True, "torch": True, "reference": True}
