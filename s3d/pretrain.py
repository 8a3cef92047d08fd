"""S3D pre-training: the whole method, top to bottom.

A run is a pure function of its configuration: the patches and masks of step i depend on the seed and i alone. So a run
that was stopped resumes exactly from its checkpoint, without any state of random number generators.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from s3d_kernels import BlockMask, use_backend
from s3d_kernels.backends import check_name as check_backend

from .checkpoint import load_checkpoint, save_checkpoint
from .data import (
    PatchDataset,
    SpatialAugmentation,
    VolumeStore,
    find_images,
    preprocess,
    split_cases,
    validation_patch,
)
from .loss import masked_mse, visible_mean_mse
from .masking import MaskSampler
from .model import PRESETS, S3D, build_unet
from .report import loss_figure, reconstruction_figure, save_figure
from .training_log import TrainingLog
from .training_step import VALIDATION_MASKS, TrainingStep, autocast, build_training

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of a pre-training run; the defaults are the published ones."""

    images: tuple[str, ...]
    """Folders, files, glob patterns, or .csv/.json lists of NIfTI images."""
    output_dir: Path
    """Folder of the run. If it holds a checkpoint of the same settings, the run goes on from there."""

    preset: str = "resenc-l"
    """Size of the network: resenc-l, resenc-s, small or tiny."""
    sparse: bool = True
    """Sparse convolution and normalisation in the encoder; False: dense MAE."""
    mask_tokens: bool = True
    """Fill masked positions of the skip features with learned tokens."""
    densify: bool = True
    """A convolution on the filled features of each stage but the first."""

    patch_size: tuple[int, int, int] = (160, 160, 160)
    """Voxels of a training patch."""
    mask_block: int = 32
    """Side of a masked block in voxels; a multiple of the network's total stride."""
    mask_ratio: float | tuple[float, float] = 0.75
    """Masked share of the blocks, or a range such as 0.6 0.9 from which it is drawn for every sample."""

    steps: int = 250_000
    """Optimiser steps."""
    batch_size: int = 6
    """Patches per step."""
    learning_rate: float = 1e-2
    """At the first step; decays as (1 - step / steps) ** 0.9."""
    momentum: float = 0.99
    """Nesterov momentum of SGD."""
    weight_decay: float = 3e-5
    """L2 penalty of SGD."""
    gradient_clip: float = 12.0
    """Largest norm of the gradient."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the network under autocast; weights stay float32."""

    spacing_mm: float = 1.0
    """Voxel size that images are resampled to."""
    cache_dir: Path | None = None
    """Where preprocessed volumes are kept; default: `volumes` in the output folder."""
    skip_bad: bool = False
    """Record and skip images that cannot be used, instead of stopping at the first."""
    augment: bool = True
    """Random rotation, scaling and mirroring."""
    validation_fraction: float = 0.05
    """Share of the images kept for validation (at least one where there are two); up to 64 of them are used."""

    device: str = "auto"
    """cuda, cpu, ...; auto: cuda where there is one."""
    backend: str = "auto"
    """Backend of s3d_kernels."""
    workers: int = 2
    """Processes that read patches; 0: none beside the main one."""
    seed: int = 0
    """Of weights, patches, masks and the split."""
    validate_every: int = 2_500
    """Steps between validations, with pictures."""
    checkpoint_every: int = 1_000
    """Steps between checkpoints; there is always one at the end, also when the run is stopped by a signal."""
    log_every: int = 1
    """Steps between rows of the log."""

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {self.preset!r}")
        stride = PRESETS[self.preset].total_stride
        if self.mask_block < 1 or self.mask_block % stride:
            raise ValueError(
                f"mask_block must be a multiple of {stride}, the total stride of {self.preset}, got {self.mask_block}"
            )
        if any(side < self.mask_block or side % self.mask_block for side in self.patch_size):
            raise ValueError(f"patch_size must be a multiple of mask_block={self.mask_block}, got {self.patch_size}")
        low, high = self.mask_ratio if isinstance(self.mask_ratio, tuple) else (self.mask_ratio,) * 2
        if not 0 < low <= high < 1:
            raise ValueError(f"mask_ratio must be in (0, 1) or an increasing pair of such, got {self.mask_ratio}")
        cells = math.prod(side // self.mask_block for side in self.patch_size)
        if low * cells + 1e-9 < 1:
            raise ValueError(
                f"mask_ratio {self.mask_ratio} of the {cells} blocks that patch_size {self.patch_size} and mask_block "
                f"{self.mask_block} make masks none; there would be nothing to learn"
            )
        if (self.mask_tokens and not self.sparse) or (self.densify and not self.mask_tokens):
            raise ValueError(
                "mask_tokens needs sparse, and densify needs mask_tokens, got "
                f"sparse={self.sparse}, mask_tokens={self.mask_tokens}, densify={self.densify}"
            )
        check_backend(self.backend)
        for name in ("steps", "batch_size", "validate_every", "checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "gradient_clip", "spacing_mm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("workers", "seed", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("momentum", "validation_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")


MAX_VALIDATION_CASES = 64

# A resumed run may differ in these without becoming another run.
_RESUMABLE_FIELDS = frozenset(
    {"output_dir", "cache_dir", "device", "workers", "validate_every", "checkpoint_every", "log_every"}
)


@dataclass(frozen=True)
class PretrainResult:
    """What a run gave.

    Attributes:
        steps: steps done; fewer than asked for if a signal stopped the run.
        initial_loss: validation loss of the untrained network.
        final_loss: of the network at its last validation, which is the end unless a signal stopped the run.
        mean_loss: of predicting the mean of the visible voxels: what a model must beat.
        seconds_per_step: median over this session's steps after the first.
        checkpoint: the file.
    """

    steps: int
    initial_loss: float
    final_loss: float
    mean_loss: float
    seconds_per_step: float
    checkpoint: Path


def pretrain(config: PretrainConfig) -> PretrainResult:
    """Pre-train, or go on with a run that was stopped.

    Writes to ``config.output_dir``: ``config.json``, ``checkpoint.pt``, ``log.csv``, ``loss.png``,
    ``reconstruction_*.png``, ``tensorboard/`` and, unless ``cache_dir`` says otherwise, ``volumes/``.

    Raises:
        ValueError: the folder holds a run with other settings or images; names those that differ.
        BadImageError: an image cannot be used (and not ``skip_bad``).
    """
    device = choose_device(config.device)
    output = config.output_dir
    checkpoint_path = output / "checkpoint.pt"
    saved = load_checkpoint(checkpoint_path, device) if checkpoint_path.exists() else None
    if saved is not None:
        _check_same_run(config, saved["config"], output)
        if saved["step"] >= config.steps:
            log.info("%s is complete at step %d", output, saved["step"])
            return PretrainResult(
                steps=saved["step"],
                initial_loss=saved["initial_loss"],
                final_loss=saved["validation_loss"],
                mean_loss=saved["mean_loss"],
                seconds_per_step=float("nan"),
                checkpoint=checkpoint_path,
            )

    store, training, validation = prepare_volumes(config)
    data = _data_record(store, training, validation)
    if saved is not None:
        _check_same_data(data, saved["data"], output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "config.json").write_text(json.dumps(_plain(config), indent=2) + "\n")

    model, optimizer = build_training(config, device)
    start_step, initial_loss, validation_loss = 0, float("nan"), float("nan")
    if saved is not None:
        model.load_state_dict(_join_state(saved))
        optimizer.load_state_dict(saved["optimizer"])
        start_step, initial_loss = saved["step"], saved["initial_loss"]
        validation_loss = saved["validation_loss"]
        log.info("resuming at step %d of %d from %s", start_step, config.steps, checkpoint_path)

    batches = training_batches(config, store, training, start_step, device)
    train = TrainingStep(config, model, optimizer, device)
    validator = Validator(config, store, validation or training, device)
    training_log = TrainingLog(output, start_step)
    step_seconds: list[float] = []
    step = start_step

    def save() -> None:
        _check_weights(model, step, config)
        save_checkpoint(
            checkpoint_path,
            {
                "step": step,
                "initial_loss": initial_loss,
                "validation_loss": validation_loss,
                "mean_loss": validator.mean_loss,
                "config": _plain(config),
                "data": data,
                **_split_state(model.state_dict()),
                "optimizer": optimizer.state_dict(),
            },
        )

    with use_backend(config.backend), _stop_signals() as stop, _closing(training_log):
        if start_step == 0:
            initial_loss = validation_loss = validator(model, training_log, 0)
        progress = tqdm(total=config.steps, initial=start_step, unit="step", desc="pre-training")
        while step < config.steps and not stop:
            begin = time.perf_counter()
            try:
                x = train.read(batches)
            except RuntimeError:
                # A signal that stops all processes of a job may end the workers before this one has read it.
                if stop:
                    break
                raise
            loss, norm = train(x, step)
            step += 1

            if step % config.log_every == 0 or step == config.steps:
                value = loss.item()
                _check_finite(norm, step, config)
                seconds = time.perf_counter() - begin
                step_seconds.append(seconds)
                rate = config.batch_size / seconds
                learning_rate = optimizer.param_groups[0]["lr"]
                training_log.write(
                    step,
                    loss=value,
                    learning_rate=learning_rate,
                    gradient_norm=norm.item(),
                    samples_per_second=rate,
                )
                progress.set_postfix_str(f"loss {value:.4f}, {rate:.2f} samples/s", refresh=False)
            progress.update()
            if step % config.validate_every == 0 and step < config.steps:
                validation_loss = validator(model, training_log, step)
            if step % config.checkpoint_every == 0 and step < config.steps:
                save()
        progress.close()
        if stop:
            save()
            log.warning("stopped by a signal at step %d of %d; the same command goes on from here", step, config.steps)
        else:
            validation_loss = validator(model, training_log, step)
            save()
    save_figure(loss_figure(training_log.path, validator.mean_loss), output / "loss.png")
    median = sorted(step_seconds[1:] or step_seconds or [float("nan")])[len(step_seconds[1:]) // 2]
    return PretrainResult(step, initial_loss, validation_loss, validator.mean_loss, median, checkpoint_path)


class Validator:
    """Loss and pictures on fixed patches with fixed masks.

    Patches are read anew each time: thousands of them would not fit into memory.
    """

    def __init__(self, config: PretrainConfig, store: VolumeStore, cases: list[int], device: torch.device) -> None:
        self.config = config
        self.store = store
        self.cases = cases[:MAX_VALIDATION_CASES]
        self.device = device
        self.sampler = MaskSampler(config.patch_size, config.mask_block, config.mask_ratio, config.seed)
        losses = [float(visible_mean_mse(patch, mask)) for patch, mask in self._problems()]
        self.mean_loss = sum(losses) / len(losses)

    def _problems(self) -> Iterator[tuple[Tensor, BlockMask]]:
        """Patches [1, 1, D, H, W] and their masks."""
        for number, case in enumerate(self.cases):
            patch = validation_patch(self.store, case, self.config.patch_size)[None].to(self.device)
            yield patch, self.sampler(1, VALIDATION_MASKS, number, device=self.device)

    def __call__(self, model: S3D, training_log: TrainingLog, step: int) -> float:
        """Mean loss over the patches; writes it and a picture of the first patch."""
        model.eval()
        losses = []
        with torch.no_grad():
            for patch, mask in self._problems():
                with autocast(self.config, self.device):
                    reconstruction = model(patch, mask)
                losses.append(float(masked_mse(reconstruction, patch, mask)))
                if len(losses) == 1:
                    figure = reconstruction_figure(patch, reconstruction, mask, title=f"step {step}")
                    save_figure(figure, self.config.output_dir / f"reconstruction_{step:06d}.png")
                    training_log.tensorboard.add_figure("reconstruction", figure, step)
        model.train()
        loss = sum(losses) / len(losses)
        training_log.write(step, validation_loss=loss)
        return loss


def load_model(checkpoint: str | Path, device: torch.device | str = "cpu") -> S3D:
    """The pre-trained model of a checkpoint.

    Raises: as :func:`s3d.checkpoint.load_checkpoint`.
    """
    saved = load_checkpoint(checkpoint, device)
    config = saved["config"]
    switches = {name: config[name] for name in ("sparse", "mask_tokens", "densify")}
    model = S3D(build_unet(config["preset"]), **switches).to(device)
    model.load_state_dict(_join_state(saved))
    return model


def _split_state(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """State of the plain U-Net under its own names, and of what the method adds."""
    network = {name.removeprefix("unet."): value for name, value in state.items() if name.startswith("unet.")}
    method = {name: value for name, value in state.items() if not name.startswith("unet.")}
    return {"network": network, "method": method}


def _join_state(saved: dict[str, Any]) -> dict[str, Tensor]:
    return {**{f"unet.{name}": value for name, value in saved["network"].items()}, **saved["method"]}


def prepare_volumes(config: PretrainConfig) -> tuple[VolumeStore, list[int], list[int]]:
    """Preprocess the images that are not yet. Returns: the volumes, and which are for training and for validation.

    Raises:
        BadImageError: an image cannot be used (and not ``skip_bad``).
    """
    folder = config.cache_dir or config.output_dir / "volumes"
    summary = preprocess(
        find_images(config.images),
        folder,
        spacing_mm=config.spacing_mm,
        skip_bad=config.skip_bad,
        workers=config.workers,
    )
    log.info("%s", summary)
    store = VolumeStore(folder)
    return store, *split_cases(store, config.validation_fraction, config.seed)


def training_batches(
    config: PretrainConfig, store: VolumeStore, cases: list[int], start_step: int, device: torch.device
) -> Iterator[dict[str, Any]]:
    """The batches of the remaining steps; sample i of the run is the same whenever it is asked for."""
    dataset = PatchDataset(
        store,
        cases,
        config.patch_size,
        seed=config.seed,
        augmentation=SpatialAugmentation() if config.augment else None,
        length=config.steps * config.batch_size,
    )
    order = range(start_step * config.batch_size, config.steps * config.batch_size)
    loader = DataLoader(
        dataset,
        config.batch_size,
        sampler=order,
        num_workers=config.workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_ignore_stop_signals,
    )
    return iter(loader)


def _ignore_stop_signals(worker: int) -> None:
    """Terminals and schedulers signal all processes of a job; only the main one acts, and ends the workers in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that SIGINT or SIGTERM makes non-empty, so that the step in progress ends and a checkpoint is written.

    A second signal acts as if there were no handler.
    """
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, handle)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _closing(training_log: TrainingLog) -> Iterator[None]:
    try:
        yield
    finally:
        training_log.close()


def choose_device(name: str) -> torch.device:
    """The device of a name; "auto" is cuda where there is one, otherwise the CPU.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device that is not there
        raise ValueError(f"device must be auto, cpu or a device of this machine, got {name!r}: {error}") from error
    return device


def _data_record(store: VolumeStore, training: list[int], validation: list[int]) -> dict[str, list[list[Any]]]:
    """What a run is trained and validated on, in order: name, shape, mean and standard deviation of every volume."""

    def describe(cases: list[int]) -> list[list[Any]]:
        return [[c.name, *c.shape, c.mean, c.std] for c in (store.cases[i] for i in cases)]

    return {"training": describe(training), "validation": describe(validation)}


def _check_same_data(present: dict[str, list[list[Any]]], saved: dict[str, list[list[Any]]], output: Path) -> None:
    """A resumed run must see the same volumes in the same order, or it would silently be another run."""
    for part, now in present.items():
        before = saved[part]
        if now == before:
            continue
        old, new = ({str(row[0]): row for row in rows} for rows in (before, now))
        changed = {
            "added": sorted(new.keys() - old.keys()),
            "removed": sorted(old.keys() - new.keys()),
            "changed": sorted(name for name in old.keys() & new.keys() if old[name] != new[name]),
        }
        listed = "; ".join(
            f"{len(names)} {what} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
            for what, names in changed.items()
            if names
        )
        raise ValueError(
            f"the {part} images of the run in {output} are not the same as before: {listed or 'another order'}. "
            "Restore them to go on, or give another output_dir."
        )


def _check_weights(model: S3D, step: int, config: PretrainConfig) -> None:
    """Before every checkpoint, so that none replaces a good one with NaN."""
    if not all(bool(parameter.isfinite().all()) for parameter in model.parameters()):
        raise FloatingPointError(
            f"step {step}: weights are not finite. The last checkpoint is untouched; "
            f"a smaller learning_rate than {config.learning_rate} may help."
        )


def _check_finite(norm: Tensor, step: int, config: PretrainConfig) -> None:
    if not torch.isfinite(norm):
        raise FloatingPointError(
            f"step {step}: the gradient norm is {norm.item()}. The last checkpoint is untouched; "
            f"a smaller learning_rate than {config.learning_rate} may help."
        )


def _plain(config: PretrainConfig) -> dict[str, Any]:
    """The settings as plain JSON types."""
    values = dataclasses.asdict(config)
    return dict(json.loads(json.dumps(values, default=str)))


def _check_same_run(config: PretrainConfig, saved: dict[str, Any], output: Path) -> None:
    present = _plain(config)
    different = [
        f"{name} (was {saved.get(name)!r}, is {value!r})"
        for name, value in present.items()
        if name not in _RESUMABLE_FIELDS and saved.get(name) != value
    ]
    if different:
        raise ValueError(
            f"output_dir {output} holds a run with other settings: {', '.join(different)}. "
            "Give the same settings to go on with it, or another output_dir."
        )
