"""S3D: sparse equals dense-with-mask, ablation rows, parameters."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from s3d import decoder
from s3d.loss import masked_mse
from s3d.masking import MaskSampler
from s3d.model import PRESETS, S3D, NetworkShape, build_network, build_unet
from s3d_kernels import BlockMask, BlockSparseTensor, use_backend

ROWS = [
    {"sparse": False, "mask_tokens": False, "densify": False},
    {"sparse": True, "mask_tokens": False, "densify": False},
    {"sparse": True, "mask_tokens": True, "densify": False},
    {"sparse": True, "mask_tokens": True, "densify": True},
]


def tiny(**switches: bool) -> S3D:
    torch.manual_seed(0)
    model = S3D(build_unet("tiny"), **switches)
    for parameter in model.parameters():  # the last norm of a branch starts at zero and would hide the branch
        if parameter.dim() == 1:
            nn.init.normal_(parameter, mean=0.5, std=0.2)
    return model


def problem(batch: int = 2) -> tuple[torch.Tensor, BlockMask]:
    x = torch.randn(batch, 1, 16, 24, 16, generator=torch.Generator().manual_seed(1))
    return x, MaskSampler((16, 24, 16), 8, (0.4, 0.8), seed=3)(batch, 0)


def test_resenc_l_has_the_published_number_of_parameters() -> None:
    assert sum(p.numel() for p in build_unet("resenc-l").parameters()) == 102_348_965


@pytest.mark.parametrize(
    "preset", [name for name, size in PRESETS.items() if size.features[-1] <= 160 and size.architecture != "swin-unetr"]
)
def test_presets_run(preset: str) -> None:
    side = PRESETS[preset].total_stride
    mask = BlockMask.random(1, 2, side, 0.5, torch.Generator().manual_seed(0))
    y = S3D(build_unet(preset))(torch.randn(1, 1, *mask.shape), mask)
    assert y.shape == (1, 1, *mask.shape)
    assert y.isfinite().all()


def test_unknown_preset_is_named() -> None:
    with pytest.raises(ValueError, match=r"preset must be one of .*'resenc-l'.* got 'resnet'"):
        build_unet("resnet")


@pytest.mark.parametrize("row", ROWS)
def test_nothing_of_a_masked_voxel_reaches_output_or_gradients(row: dict[str, bool]) -> None:
    model = tiny(**row)
    x, mask = problem()
    results = []
    for masked_value in (0.0, float("nan")):
        model.zero_grad()
        y = model(torch.where(mask.to_dense(), x, masked_value), mask)
        masked_mse(y, x, mask).backward()
        results.append([y.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) > 10
    for with_zeros, with_nan in zip(*results, strict=True):
        assert torch.equal(with_zeros, with_nan)


@pytest.mark.parametrize("row", ROWS)
def test_backends_agree(row: dict[str, bool]) -> None:
    model = tiny(**row).double()
    x, mask = problem()
    outputs = []
    for backend in ("reference", "torch"):
        with use_backend(backend):
            model.zero_grad()
            y = model(x.double(), mask)
            masked_mse(y, x.double(), mask).backward()
            outputs.append([y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
            # Biases in front of a norm have a zero gradient in exact arithmetic: an absolute floor.
    scale = max(float(g.abs().max()) for g in outputs[0])
    for expected, got in zip(*outputs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7 * scale)


def test_full_method_uses_every_parameter() -> None:
    model = tiny()
    x, mask = problem()
    masked_mse(model(x, mask), x, mask).backward()
    # Deep supervision heads of the U-Net other than the last are unused by design of the U-Net.
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    heads = len(model.unet.decoder.seg_layers) - 1
    assert unused == {f"unet.decoder.seg_layers.{i}.{kind}" for i in range(heads) for kind in ("weight", "bias")}
    assert all(token.grad.abs().sum() > 0 for token in model.mask_tokens)


def test_dense_row_is_the_network_on_zero_filled_input() -> None:
    model = tiny(**ROWS[0])
    x, mask = problem()
    expected = model.unet(torch.where(mask.to_dense(), x, 0.0))
    torch.testing.assert_close(model(x, mask), expected, rtol=1e-5, atol=1e-6)


def test_mask_tokens_fill_normalised_features() -> None:
    """Skips of the row with tokens: mean 0 and variance 1 over visible voxels, the token elsewhere."""
    model = tiny(**ROWS[2], shortcuts=False)
    x, mask = problem()
    seen: list[torch.Tensor] = []
    model.unet.decoder.register_forward_pre_hook(lambda module, arguments: seen.extend(arguments[0]))
    with use_backend("torch"):  # which leaves the decoder dense
        model(x, mask)
    assert len(seen) == 3
    for stage, skip in enumerate(seen):
        visible = mask.downsample(2**stage).to_dense().expand_as(skip)
        token = model.mask_tokens[stage].view(1, -1, 1, 1, 1).expand_as(skip)
        assert torch.equal(skip[~visible], token[~visible])
        for sample, shown in zip(skip, visible, strict=True):
            values = sample[shown].view(sample.shape[0], -1)
            assert values.mean(1).abs().max() < 1e-4
            assert (values.var(1, correction=0) - 1).abs().max() < 0.02


@pytest.mark.parametrize("row", [1, 2, 3])
def test_the_decoder_on_native_kernels_equals_the_dense_one(row: int) -> None:
    model = tiny(**ROWS[row], shortcuts=False).double()
    x, mask = problem()
    seen: list[object] = []
    model.unet.decoder.stages[-1].register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    results = [results_of(model, x.double(), mask, backend) for backend in ("native", "torch")]
    assert isinstance(seen[0], BlockSparseTensor)
    assert isinstance(seen[1], torch.Tensor)
    for name, ours in results[0].items():
        torch.testing.assert_close(ours, results[1][name], rtol=1e-9, atol=1e-10, msg=name)


# ---- shortcuts: the same with less work

# Blocks of 16 voxels are 16, 8 and 4 wide in the stages of the tiny network: all are filled by background and
# correction; of blocks of 8 the last stage is dense. Cells at all borders are visible in some sample and masked in
# others.
MASKS = {
    "60 %": lambda: BlockMask.random(2, (2, 3, 2), 16, 0.6, torch.Generator().manual_seed(0)),
    "90 %, smaller blocks": lambda: BlockMask.random(2, (4, 2, 3), 8, 0.9, torch.Generator().manual_seed(1)),
    "unequal samples": lambda: BlockMask.random(3, (2, 2, 3), 16, (0.2, 0.95), torch.Generator().manual_seed(2)),
    "one sample without anything": lambda: BlockMask.from_grid(torch.arange(16).view(2, 2, 2, 2) >= 11, (8, 16, 8)),
    "everything visible": lambda: BlockMask.random(1, 2, 16, 0.0),
    "nothing visible": lambda: BlockMask.random(2, 2, 8, 1.0),
    "voxels": lambda: BlockMask.from_voxels(
        torch.rand(2, 16, 16, 24, generator=torch.Generator().manual_seed(3)) < 0.3
    ),
}


def results_of(
    model: S3D, x: torch.Tensor, mask: BlockMask, backend: str, *, masked_only: bool = False
) -> dict[str, torch.Tensor]:
    """The masked voxels of the reconstruction, the loss, and the gradient of every parameter that has one."""
    model.zero_grad()
    with use_backend(backend):
        y = model(x, mask, masked_only=masked_only)
        y = torch.where(mask.to_dense(), 0, y) if masked_only else y
        loss = (torch.where(mask.to_dense(), 0, y - x)).square().mean()
        loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"reconstruction": y.detach(), "loss": loss.detach(), **gradients}


def assert_same(
    got: dict[str, torch.Tensor],
    truth: dict[str, torch.Tensor],
    tolerance: float,
    plain: dict[str, torch.Tensor] | None = None,
) -> None:
    """Relative l2 distances to the truth.

    Allowed beside the tolerance: what rounding makes of gradients that cancel to nothing (of a bias before a norm), and
    twice the distance of the plain computation, if given, where that is ill conditioned in its precision.
    """
    assert got.keys() == truth.keys()
    largest = max(float(t.norm()) for name, t in truth.items() if name not in ("reconstruction", "loss"))
    for name, expected in truth.items():
        error, of_plain = (
            0.0 if values is None else float((values[name].double() - expected).norm()) for values in (got, plain)
        )
        allowed = tolerance * float(expected.norm()) + 2 * of_plain + 5e-2 * tolerance * largest
        assert error <= allowed, f"{name}: {error:.1e} of {float(expected.norm()):.1e}"


@pytest.mark.parametrize(
    ("name", "backend", "row"),
    [
        *((name, backend, 3) for name in MASKS for backend in ("torch", "native")),
        *(("60 %", "reference", row) for row in (1, 2, 3)),
        *(("unequal samples", "native", row) for row in (1, 2)),
    ],
)
def test_shortcuts_change_nothing(name: str, backend: str, row: int) -> None:
    mask = MASKS[name]()
    x = torch.randn(mask.batch, 1, *mask.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    model = tiny(**ROWS[row]).double()
    model.shortcuts = False
    truth = results_of(model, x, mask, "torch")
    model.shortcuts = True
    assert_same(results_of(model, x, mask, backend), truth, 1e-10)
    model, x = model.float(), x.float()
    got = results_of(model, x, mask, backend)
    model.shortcuts = False
    assert_same(got, truth, 1e-5, results_of(model, x, mask, backend))


def test_shortcuts_where_nothing_is_fused() -> None:
    """Strides of one axis or two: the up-convolution is two, and the halves of the weight are taken apart."""
    torch.manual_seed(0)
    shape = NetworkShape((4, 6, 8), (1, 1, 1), ((1, 1, 1), (1, 2, 2), (2, 2, 2)), ((1, 3, 3), (3, 3, 3), (3, 3, 3)))
    model = S3D(build_network(shape, 1, 1)).double()
    mask = BlockMask.random(2, (2, 2, 3), (8, 16, 16), 0.6, torch.Generator().manual_seed(0))
    x = torch.randn(2, 1, *mask.shape, dtype=torch.float64)
    model.shortcuts = False
    truth = results_of(model, x, mask, "torch")
    model.shortcuts = True
    assert_same(results_of(model, x, mask, "native"), truth, 1e-10)


def test_the_step_is_one_compiled_graph() -> None:
    """Compiled it is the plain computation, and what only the loss wants breaks no graph."""
    model = tiny()
    mask = BlockMask.random(1, 2, 8, 0.6, torch.Generator().manual_seed(0))
    x = torch.randn(1, 1, *mask.shape, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = model(x, BlockMask.from_grid(mask.tables.grid, mask.block))  # tables are made for each mask
        model.compile(backend="eager", fullgraph=True)
        torch.testing.assert_close(model(x, mask, masked_only=True), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.parametrize("name", MASKS)
def test_masked_voxels_alone(name: str, backend: str) -> None:
    mask = MASKS[name]()
    x = torch.randn(mask.batch, 1, *mask.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    model = tiny().double()
    truth = results_of(model, x, mask, backend)
    truth["reconstruction"] = torch.where(mask.to_dense(), 0, truth["reconstruction"])
    assert_same(results_of(model, x, mask, backend, masked_only=True), truth, 1e-10)


def test_stages_whose_up_convolution_is_fused() -> None:
    """Of the published network the three finest: further down the product of the weights costs more than it saves."""
    with torch.device("meta"):
        unet = build_unet("resenc-l")
    pays = [
        decoder._fusing_pays(up, stage.convs[0].conv.weight, (10 * 2**number) ** 3)
        for number, (up, stage) in enumerate(zip(unet.decoder.transpconvs, unet.decoder.stages, strict=True))
    ]
    assert pays == [False, False, True, True, True]


def test_checkpointed_activations_reach_filled_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = MASKS["60 %"]()
    model = tiny()
    model.checkpoint_activations()
    merged: list[object] = []

    def spy(function: Any, up: Any, *arguments: Any, **options: Any) -> Any:
        merged.append(up)
        return function(up, *arguments)

    monkeypatch.setattr(decoder, "checkpoint", spy)
    model(torch.randn(mask.batch, 1, *mask.shape), mask)
    assert merged == list(model.unet.decoder.transpconvs)


def test_shortcuts_with_checkpointed_activations() -> None:
    mask = MASKS["60 %"]()
    x = torch.randn(mask.batch, 1, *mask.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    truth = results_of(tiny().double(), x, mask, "native")
    model = tiny().double()
    model.checkpoint_activations()
    for masked_only in (False, True):
        got = results_of(model, x, mask, "native", masked_only=masked_only)
        if masked_only:
            truth["reconstruction"] = torch.where(mask.to_dense(), 0, truth["reconstruction"])
        assert_same(got, truth, 1e-10)


def test_shortcuts_in_bfloat16() -> None:
    """No further from the truth than the plain computation in the same precision, give or take."""
    mask = MASKS["60 %"]()
    x = torch.randn(mask.batch, 1, *mask.shape, generator=torch.Generator().manual_seed(4))
    model = tiny()
    errors = []
    with torch.no_grad(), use_backend("native"):
        truth = model(x, mask)
        for model.shortcuts in (False, True):
            with torch.autocast("cpu", torch.bfloat16):
                errors.append(float((model(x, mask).float() - truth).norm() / truth.norm()))
    assert errors[1] <= 1.5 * errors[0]
    assert errors[0] <= 3e-2


def test_shortcuts_leave_out_what_is_known() -> None:
    """Convolutions in the decoder and the densification write a part of the volume only."""
    model = S3D(build_unet("small"))
    mask = BlockMask.random(1, 2, 32, 0.75, torch.Generator().manual_seed(0))
    x = torch.randn(1, 1, *mask.shape)
    kept: dict[bool, int] = {}
    for model.shortcuts in (False, True):
        written: list[int] = []

        class Outputs(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                result = func(*args, **(kwargs or {}))
                if func.name() == "s3d_kernels::conv3d":
                    written.append(result.numel())  # noqa: B023
                return result

        with torch.no_grad(), use_backend("native"), Outputs():
            model(x, mask)
        kept[model.shortcuts] = sum(written)
    assert kept[True] < 0.7 * kept[False]


def test_densification_has_no_convolution_at_full_resolution() -> None:
    model = tiny()
    assert isinstance(model.densify[0], nn.Identity)
    assert [c.weight.shape for c in list(model.densify)[1:]] == [(8, 8, 3, 3, 3), (12, 12, 3, 3, 3)]
    assert all(c.bias is not None for c in list(model.densify)[1:])


def test_tokens_start_small() -> None:
    tokens = S3D(build_unet("resenc-s")).mask_tokens
    assert all(token.abs().max() <= 0.02 for token in tokens)
    assert torch.cat(list(tokens)).std() > 0.005


def test_switches_need_each_other() -> None:
    with pytest.raises(ValueError, match="densify needs mask_tokens"):
        S3D(build_unet("tiny"), mask_tokens=False)


def test_network_state_loads_into_the_plain_unet() -> None:
    model = tiny()
    build_unet("tiny").load_state_dict(model.unet.state_dict())
