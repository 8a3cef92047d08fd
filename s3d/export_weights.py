"""s3d export: the weights of a checkpoint as a file that other software loads (docs/checkpoints.md)."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from .checkpoint import Weights, load_checkpoint, save_atomically, weights_of
from .model import RESENC_PRESETS, Network, build_unet
from .nnssl_plan import CITATIONS, adaptation_plan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportConfig:
    """Write the weights of a checkpoint for use elsewhere: plain PyTorch, nnU-Net, fine-tuning of nnssl checkpoints."""

    checkpoint: tyro.conf.Positional[Path]
    """Checkpoint of s3d pretrain."""
    format: Literal["encoder", "unet", "nnunet", "nnssl"]
    """encoder, unet: state dict of the plain network or its encoder. nnunet: for nnUNetv2_train
    -pretrained_weights. nnssl: for nnUNetv2_preprocess_like_nnssl and nnUNetv2_train_pretrained."""
    output: Path
    """File to write; there must be none of this name."""
    weights: Weights = "raw"
    """raw: the weights as trained; ema: their moving average, if the run kept one."""


def export(config: ExportConfig) -> None:
    """Write the file. It holds CPU tensors and plain types only, so that `torch.load(weights_only=True)` reads it.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: not a checkpoint, it lacks what was asked for, or `output` exists.
    """
    if config.output.exists():
        raise ValueError(f"output {config.output} exists; remove it or give another name")
    saved = load_checkpoint(config.checkpoint)
    if "plan" in saved:
        raise ValueError(
            f"{config.checkpoint} is a checkpoint of s3d finetune, whose network is a plain one already: take it as "
            "docs/finetuning.md shows; accepted: checkpoints of s3d pretrain and s3d import"
        )
    preset = saved["config"]["preset"]
    if config.format in ("nnunet", "nnssl") and preset not in RESENC_PRESETS:
        raise ValueError(
            f"format {config.format} is for ResEnc U-Nets, and {config.checkpoint} holds {preset}; "
            "accepted: encoder, unet"
        )
    if config.format != "encoder" and saved.get("trained") == "encoder":
        log.warning(
            "%s trained the encoder alone: the decoder in the file has its first weights (docs/pretext.md)",
            config.checkpoint,
        )
    unet = plain_unet(saved, config.weights)
    # What the volumes had, where the run knew it; its settings tell only what images were to be resampled to.
    settings = saved["config"] | {name: saved[name] for name in ("spacing_mm",) if name in saved}
    content = FORMATS[config.format](unet, settings)
    save_atomically(config.output, content)
    log.info(
        "%s: %s weights of %s (%s, step %d) in format %s",
        config.output,
        config.weights,
        config.checkpoint,
        saved["config"]["preset"],
        saved["step"],
        config.format,
    )


def plain_unet(saved: dict[str, Any], weights: Weights) -> Network:
    """The plain network of a checkpoint's content, on the CPU. Its tied modules are tied, so a file stores them once.

    Raises:
        ValueError: no such weights in the checkpoint.
    """
    state = weights_of(saved, weights, "the checkpoint")
    # Methods differ in what the heads give.
    outputs = next(len(value) for name, value in state.items() if re.fullmatch(r"decoder\.seg_layers\..*bias", name))
    unet = build_unet(saved["config"]["preset"], out_channels=outputs)
    unet.load_state_dict(state)
    return unet


def _encoder(unet: Network, config: dict[str, Any]) -> dict[str, Any]:
    return dict(unet.encoder.state_dict())


def _unet(unet: Network, config: dict[str, Any]) -> dict[str, Any]:
    return dict(unet.state_dict())


def _nnunet(unet: Network, config: dict[str, Any]) -> dict[str, Any]:
    return {"network_weights": _unet(unet, config)}


def _nnssl(unet: Network, config: dict[str, Any]) -> dict[str, Any]:
    return {
        **_nnunet(unet, config),
        "nnssl_adaptation_plan": adaptation_plan(config),
        "trainer_name": "S3D",
        "citations": CITATIONS,
    }


FORMATS: dict[str, Callable[[Network, dict[str, Any]], dict[str, Any]]] = {
    "encoder": _encoder,
    "unet": _unet,
    "nnunet": _nnunet,
    "nnssl": _nnssl,
}
