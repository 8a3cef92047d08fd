"""SparK: nothing masked is read, what the decoder gets and adds, targets, and that it can be learned."""

from pathlib import Path

import pytest
import torch
from small_runs import configure
from torch import Tensor, nn
from toy_training import SHAPE, draw, losses_before_and_after, smooth_volumes

from s3d.model import PRESETS, Preset, build_unet
from s3d.pretext.spark import LightDecoder, SparK, SparKModel


def spark(folder: Path, **changes: object) -> SparK:
    return SparK(configure(None, folder, method="spark", patch_size=SHAPE, mask_ratio=0.6, **changes))


@pytest.fixture
def model() -> SparKModel:
    torch.manual_seed(0)
    return SparKModel(build_unet("tiny"))


def test_nothing_of_a_masked_voxel_reaches_the_output(tmp_path: Path, model: SparKModel) -> None:
    problem = spark(tmp_path).pose(smooth_volumes(2), None, draw(0))
    reconstruction = model(problem.image, problem.mask)
    visible = problem.mask.to_dense()
    other = model(torch.where(visible, problem.image, torch.nan), problem.mask)
    assert torch.equal(reconstruction, other)
    other = model(torch.where(visible, problem.image + 1, problem.image), problem.mask)
    assert not torch.allclose(reconstruction, other)
    assert reconstruction.shape == problem.image.shape


def test_decoder_gets_tokens_where_masked_and_normalised_features_elsewhere(tmp_path: Path, model: SparKModel) -> None:
    problem = spark(tmp_path).pose(smooth_volumes(2), None, draw(0))
    inputs: dict[int, Tensor] = {}
    for stage, layer in enumerate(model.densify):
        layer.register_forward_pre_hook(lambda _, args, stage=stage: inputs.__setitem__(stage, args[0].detach()))
    model(problem.image, problem.mask)
    assert sorted(inputs) == [0, 1, 2]
    mask = problem.mask
    for stage, filled in inputs.items():
        token = model.mask_tokens[stage].detach()
        assert filled.shape[1] == PRESETS["tiny"].features[stage] == len(token)
        visible = mask.to_dense()[:, 0]
        for sample in range(2):
            features = filled[sample].movedim(0, -1)
            assert (features[~visible[sample]] == token).all()
            inside = features[visible[sample]]
            torch.testing.assert_close(inside.mean(0), torch.zeros(len(token)), atol=1e-4, rtol=0)
            assert (inside.var(0, correction=0) < 1.01).all()
        if stage < 2:
            mask = mask.downsample(2)


def test_decoder_adds_what_the_stages_bring() -> None:
    torch.manual_seed(0)
    decoder = LightDecoder([4, 8, 16])
    features = [torch.randn(1, width, *(side // step for side in SHAPE)) for width, step in ((4, 1), (8, 2), (16, 4))]
    finer, coarser = decoder.blocks
    expected = decoder.head(finer(coarser(features[2]) + features[1]) + features[0])
    assert torch.equal(decoder(features), expected)
    assert expected.shape == (1, 1, *SHAPE)


def test_decoder_halves_its_width() -> None:
    model = SparKModel(build_unet("small"))
    assert [block[0].in_channels for block in model.decoder.blocks] == [16, 32, 64]
    # The encoder's two lowest stages are equally wide, the decoder's are not.
    model = SparKModel(build_unet("resenc-s"))
    assert [block[0].in_channels for block in model.decoder.blocks] == [10, 20, 40, 80, 160]
    widths = [layer.out_channels for layer in model.densify if isinstance(layer, nn.Conv3d)]
    assert widths == [5, 10, 20, 40, 80]
    assert isinstance(model.densify[-1], nn.Identity)


def test_targets_are_z_scored_in_each_block(tmp_path: Path) -> None:
    volumes = smooth_volumes(2)
    problem = spark(tmp_path).pose(volumes, None, draw(0))
    block = volumes[1, 0, 8:, 16:, :8].double()
    expected = (block - block.mean()) / block.std(correction=0)
    torch.testing.assert_close(problem.target[1, 0, 8:, 16:, :8].double(), expected, atol=1e-4, rtol=1e-4)


def test_decoder_of_the_network_is_left_alone(tmp_path: Path) -> None:
    model = spark(tmp_path).build_model()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(name.startswith("unet.decoder") for name in trained)
    assert all(name in trained for name, _ in model.named_parameters() if name.startswith("unet.encoder"))


def test_strides_that_the_decoder_cannot_double(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "tiny", Preset((4, 8), (1, 1), (2, 2)))
    with pytest.raises(ValueError, match=r"preset must have strides 1, 2, 2, .* got tiny, which has 2, 2"):
        spark(tmp_path)


def test_reconstruction_is_learned(tmp_path: Path) -> None:
    before, after = losses_before_and_after(spark(tmp_path), steps=40, learning_rate=1e-2)
    assert after < 0.9 * min(before, 1.0)
