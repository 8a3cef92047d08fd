"""From a checkpoint into a segmentation network, with a row about every tensor of both.

A parameter has several names in a ResEnc U-Net (`conv` and `all_modules.0`, `encoder` and `decoder.encoder`); its row
has the one through which the network computes. Stages are matched by their depth, counted from full resolution, so that
networks of different depth share what both have.

Source: Wald et al. (CVPR 2025): encoder and decoder are transferred, the stem is repeated for several channels.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from s3d.checkpoint import Weights, weights_of
from s3d.csv_table import csv_text
from s3d.data.store import write_atomically
from s3d.import_weights import aliases
from s3d.model import Network, build_unet

from .plan import SegmentationPlan

Scope = Literal["encoder", "encoder+decoder"]
Action = Literal["loaded", "adapted", "initialised", "dropped"]

_STAGE = re.compile(r"^(encoder\.stages|decoder\.(?:stages|transpconvs|seg_layers))\.(\d+)\.")
# Convolutions of the image itself; a Swin UNETR has some in its decoder, too.
_OF_THE_IMAGE = ("encoder.stem.", "decoder.skips.0.")
# A projection stands behind the pooling of its skip connection, if there is one.
_PROJECTION = re.compile(r"\.skip\.\d+\.")


class TensorRow(NamedTuple):
    """What became of a tensor of the checkpoint, or where a parameter of the network comes from."""

    name: str  # of the parameter; dropped: in the checkpoint
    action: Action
    source: str  # name in the checkpoint; empty: initialised
    source_shape: tuple[int, ...] | None  # None: initialised
    target_shape: tuple[int, ...] | None  # None: dropped
    reason: str  # empty: loaded as it is


class _Place(NamedTuple):
    """Where a parameter stands, whatever the depth of its network."""

    path: str
    stage: int | None  # None: the stem


def transfer(
    network: Network,
    saved: dict[str, Any],
    scope: Scope,
    weights: Weights = "raw",
    *,
    checkpoint: str = "the checkpoint",
) -> list[TensorRow]:
    """Put weights of a checkpoint into a new network, in place.

    Args:
        network: new, of a `SegmentationPlan`; what is not transferred stays as it is.
        saved: content of a checkpoint of `s3d pretrain`, `s3d import` or `s3d finetune`.
        scope: what to transfer. Heads start anew in any case.
        weights: those that were trained, or their moving average.
        checkpoint: its file, for messages.
    Returns: a row for each parameter of the network, in its order; then one for each tensor of the checkpoint that is
        not in it.
    Raises:
        ValueError: the checkpoint has no such weights, or is of another architecture: a stage that both networks have
            differs by more than kernel sizes, strides and input channels.
    """
    state = weights_of(saved, weights, checkpoint)
    origin, old = _saved_network(saved)
    sources = {_place(group[0], old): (group[0], state[group[0]]) for group in aliases(old)}
    targets = {_place(group[0], network): (group[0], network.get_parameter(group[0])) for group in aliases(network)}
    absent = set(saved.get("imported", {}).get("initialised", ()))
    untrained = {
        place: "the imported file had no such weight" for place, (name, _) in sources.items() if name in absent
    }
    if saved.get("trained") == "encoder":
        reason = "the pre-training trained the encoder alone"
        untrained |= {place: reason for place in sources if place.path.startswith("decoder.")}
    rows: list[TensorRow] = []
    values: list[tuple[nn.Parameter, Tensor]] = []
    used = set()
    for place, (name, parameter) in targets.items():
        shape = tuple(parameter.shape)
        why_not = _why_not(place, scope, untrained)
        if why_not is None and place not in sources:
            why_not = f"the network of the checkpoint has {len(old.encoder.output_channels)} stages"
            if place.stage is None or place.stage < _stages_of(place, old):
                raise _another_architecture(checkpoint, origin, f"{name} is not in it")
        if why_not is not None:
            rows.append(TensorRow(name, "initialised", "", None, shape, why_not))
            continue
        source, tensor = sources[place]
        value, reason = _fitted(place, tensor, shape)
        if value is None:
            differs = f"{name} is {_text(tensor.shape)} there and {_text(shape)} in the network to train"
            raise _another_architecture(checkpoint, origin, differs)
        used.add(place)
        values.append((parameter, value))
        rows.append(TensorRow(name, "adapted" if reason else "loaded", source, tuple(tensor.shape), shape, reason))
    for place, (source, tensor) in sources.items():
        if place in used:
            continue
        why_not = _why_not(place, scope, untrained)
        if why_not is None:
            why_not = f"the new network has {len(network.encoder.output_channels)} stages"
            if place.stage is None or place.stage < _stages_of(place, network):
                raise _another_architecture(checkpoint, origin, f"the network to train has no {source}")
        rows.append(TensorRow(source, "dropped", source, tuple(tensor.shape), None, why_not))
    method = saved.get({"raw": "method", "ema": "ema_method"}[weights], {})
    for source, tensor in method.items():
        rows.append(TensorRow(source, "dropped", source, tuple(tensor.shape), None, "of the pre-training only"))
    with torch.no_grad():  # when all is known to fit, so that a refused checkpoint changes nothing
        for parameter, value in values:
            parameter.copy_(value)
    return rows


def transfer_summary(rows: list[TensorRow]) -> str:
    """One line for the log: how many tensors of each action, and the adapted ones by name."""
    counts = Counter(row.action for row in rows)
    adapted = Counter(row.reason for row in rows if row.action == "adapted")
    changes = f" ({'; '.join(f'{count} {reason}' for reason, count in adapted.items())})" if adapted else ""
    return ", ".join(
        f"{counts[action]} {action}{changes if action == 'adapted' else ''}" for action in get_args(Action)
    )


def write_transfer_table(rows: list[TensorRow], path: Path) -> None:
    """Write the rows as CSV.

    Raises:
        OSError: it could not be written.
    """
    table = (
        (row.name, row.action, row.source, _text(row.source_shape), _text(row.target_shape), row.reason) for row in rows
    )
    write_atomically(path, csv_text(TensorRow._fields, table).encode())


def _saved_network(saved: dict[str, Any]) -> tuple[str, Network]:
    """What a checkpoint says of its network, and such a network without values."""
    with torch.device("meta"):
        if "plan" in saved:
            plan = SegmentationPlan.from_plain(saved["plan"])
            return f"fine-tuned on {plan.dataset}", plan.build_network()
        preset = saved["config"]["preset"]
        return f"preset {preset}", build_unet(preset)


def _place(name: str, network: Network) -> _Place:
    path = _PROJECTION.sub(".skip.projection.", name)
    found = _STAGE.match(path)
    if found is None:
        return _Place(path, None)
    part, index = found[1], int(found[2])
    # Decoder stages are in the order of computation, the lowest resolution first; there is none for the bottleneck.
    stage = index if part == "encoder.stages" else len(network.encoder.output_channels) - 2 - index
    return _Place(f"{part}.{path[found.end() :]}", stage)


def _stages_of(place: _Place, network: Network) -> int:
    """Stages of the encoder or of the decoder."""
    return len(network.encoder.output_channels) - (0 if place.path.startswith("encoder.") else 1)


def _why_not(place: _Place, scope: Scope, untrained: Mapping[_Place, str]) -> str | None:
    """Why a parameter is not transferred whatever its shape, or None."""
    if place.path.startswith("decoder.seg_layers."):
        return "heads start anew"
    if place.path.startswith("decoder.") and scope == "encoder":
        return "scope encoder"
    return untrained.get(place)


def _fitted(place: _Place, tensor: Tensor, shape: tuple[int, ...]) -> tuple[Tensor | None, str]:
    """A tensor in the shape of its target, or None if that is impossible; and what was done, empty if nothing."""
    done = []
    if place.path.startswith(_OF_THE_IMAGE) and len(shape) == 5 and tensor.shape[1] != shape[1]:
        # The same features, where all channels show the same image.
        done.append(f"input channels {tensor.shape[1]} -> {shape[1]}: repeated and scaled")
        tensor = tensor.sum(dim=1, keepdim=True).expand(-1, shape[1], -1, -1, -1) / shape[1]
    if len(shape) == 5 and tensor.shape[2:] != shape[2:]:
        kernels = f"{_text(tensor.shape[2:])} -> {_text(shape[2:])}"
        transposed = place.path.startswith("decoder.transpconvs.")
        for axis in range(2, 5):
            tensor = (_resized_upsampling if transposed else _resized_kernel)(tensor, axis, shape[axis])
        how = "averaged or repeated" if transposed else "summed or centred"
        done.append(f"kernel {kernels}: {how} along these axes")
    return (tensor, "; ".join(done)) if tensor.shape == shape else (None, "")


def _resized_kernel(weight: Tensor, axis: int, size: int) -> Tensor:
    """A convolution's weight with another kernel size along an axis; unchanged where neither size is 1."""
    if size == 1:  # the same on volumes that are constant along the axis
        return weight.sum(dim=axis, keepdim=True)
    if weight.shape[axis] == 1:  # the same on all volumes
        padding = [0, 0] * (4 - axis) + [size // 2, size // 2]
        return nn.functional.pad(weight, padding)
    return weight


def _resized_upsampling(weight: Tensor, axis: int, stride: int) -> Tensor:
    """A transposed convolution's weight with another stride along an axis; unchanged where neither is 1."""
    if stride == 1:  # the mean of the voxels that one voxel became
        return weight.mean(dim=axis, keepdim=True)
    if weight.shape[axis] == 1:  # each voxel as often as it is needed
        return weight.repeat_interleave(stride, dim=axis)
    return weight


def _another_architecture(checkpoint: str, origin: str, differs: str) -> ValueError:
    preset = f"--{origin}" if origin.startswith("preset ") else "the preset that it was trained with"
    fix = f"take {preset}, or a checkpoint of the preset to train"
    return ValueError(f"{checkpoint} ({origin}) is of another architecture: {differs}; {fix}")


def _text(shape: tuple[int, ...] | torch.Size | None) -> str:
    return "" if shape is None else " x ".join(str(side) for side in shape)
