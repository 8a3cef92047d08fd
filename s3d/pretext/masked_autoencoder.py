"""S3D and the rows of its ablation: reconstruct masked blocks from visible ones.

Source: Wald et al., "Revisiting MAE pre-training for 3D medical image segmentation" (CVPR 2025).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from s3d.loss import block_normalized, masked_mse, masked_voxels, visible_mean_mse
from s3d.masking import MaskSampler
from s3d.model import S3D, build_unet
from s3d.report import reconstruction_figure
from s3d_kernels import BlockMask

from .method import Draw, Pretext

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from s3d.pretrain_config import PretrainConfig


@dataclass(frozen=True)
class MaskedProblem:
    """Patches of which the network sees some blocks.

    Attributes:
        image: [n, 1, D, H, W], what the network sees where it is visible.
        target: [n, 1, D, H, W], what it should produce where it is masked.
        mask: which voxels are visible.
        valid: [n, 1, D, H, W] bool, False where the target is not to be learned, or None.
        masked: how many voxels the loss is taken over.
    """

    image: Tensor
    target: Tensor
    mask: BlockMask
    valid: Tensor | None
    masked: int


class MaskedAutoencoder(Pretext[MaskedProblem]):
    """Masked blocks, a sparse encoder or a dense one, mean squared error over masked voxels.

    The log has "mask_ratio", voxels that the loss is taken over / all voxels.
    """

    loss_label = "mean squared error, masked voxels"
    trivial_label = "predicting the visible mean"
    columns = ("mask_ratio",)
    # Whether the target is z-scored within each masked block, so that all contrasts count alike.
    block_normalized: ClassVar[bool] = False

    def __init__(self, config: PretrainConfig) -> None:
        super().__init__(config)
        self.sampler = MaskSampler(
            config.patch_size, config.mask_block, config.mask_ratio, config.seed, config.ratio_per
        )

    @classmethod
    def check(cls, config: PretrainConfig) -> None:
        """See `Pretext`."""
        if config.sparse and config.size.architecture == "swin-unetr":
            dense = ", or sparse, mask_tokens and densify False" if config.method == "s3d" else ""
            raise ValueError(
                f"preset must be of convolutions for the sparse encoder of method {config.method}, "
                f"got {config.preset}, a transformer; take another preset{dense}"
            )
        stride = config.size.total_stride
        if config.mask_block < 1 or config.mask_block % stride:
            raise ValueError(
                f"mask_block must be a multiple of {stride}, the total stride of {config.preset}, "
                f"got {config.mask_block}"
            )
        if any(side < config.mask_block or side % config.mask_block for side in config.patch_size):
            raise ValueError(
                f"patch_size must be a multiple of mask_block={config.mask_block}, got {config.patch_size}"
            )
        low, high = config.mask_ratio if isinstance(config.mask_ratio, tuple) else (config.mask_ratio,) * 2
        if not 0 < low <= high < 1:
            raise ValueError(f"mask_ratio must be in (0, 1) or an increasing pair of such, got {config.mask_ratio}")
        cells = math.prod(side // config.mask_block for side in config.patch_size)
        if low * cells + 1e-9 < 1:
            raise ValueError(
                f"mask_ratio {config.mask_ratio} of the {cells} blocks that patch_size {config.patch_size} and "
                f"mask_block {config.mask_block} make masks none; there would be nothing to learn"
            )
        if (config.mask_tokens and not config.sparse) or (config.densify and not config.mask_tokens):
            raise ValueError(
                "mask_tokens needs sparse, and densify needs mask_tokens, got "
                f"sparse={config.sparse}, mask_tokens={config.mask_tokens}, densify={config.densify}"
            )

    def build_model(self) -> nn.Module:
        """See `Pretext`."""
        config = self.config
        model = S3D(
            build_unet(config.preset),
            sparse=config.sparse,
            mask_tokens=config.mask_tokens,
            densify=config.densify,
            shortcuts=config.shortcuts,
        )
        # Heads of lower resolutions belong to the network and its checkpoint; without deep supervision none is used.
        model.unet.decoder.seg_layers[:-1].requires_grad_(False)
        if config.checkpoint_activations:
            model.checkpoint_activations()
        return model

    def pose(self, image: Tensor, valid: Tensor | None, draw: Draw) -> MaskedProblem:
        """See `Pretext`."""
        mask = self.sampler(draw.batch, *draw.stream, samples=draw.samples)
        masked = masked_voxels(mask, valid)  # on the CPU, where nobody waits for a GPU
        mask = mask.to(image.device)
        target = block_normalized(image, mask, valid) if self.block_normalized else image
        return MaskedProblem(image, target, mask, valid, masked)

    def terms(self, problem: MaskedProblem) -> int:
        """Masked voxels."""
        return problem.masked

    def figures(self, terms: float, voxels: float) -> dict[str, float]:
        """See `Pretext`."""
        return {"mask_ratio": terms / voxels}

    def answer(self, model: nn.Module, problem: MaskedProblem) -> Tensor:
        """The reconstruction [n, 1, D, H, W], which at visible voxels may be zero."""
        reconstruction: Tensor = model(problem.image, problem.mask, masked_only=True)
        return reconstruction

    def loss(self, output: Tensor, problem: MaskedProblem, terms: float) -> Tensor:
        """See `Pretext`."""
        return masked_mse(output, problem.target, problem.mask, problem.valid, terms)

    def trivial_loss(self, problem: MaskedProblem) -> float:
        """Of predicting, for every sample, the mean of its visible voxels."""
        return float(visible_mean_mse(problem.target, problem.mask, problem.valid))

    def figure(self, problem: MaskedProblem, output: Tensor, title: str) -> Figure:
        """Target, visible blocks, reconstruction and error."""
        return reconstruction_figure(problem.target, output, problem.mask, title=title)
