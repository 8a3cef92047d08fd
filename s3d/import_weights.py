"""s3d import: weights of nnssl, nnU-Net or `s3d export` as a checkpoint of s3d, and a row about every key of the file.

nnssl makes an encoder sparse by replacing each convolution and norm with a new module. A `ConvDropoutNormReLU` holds
its modules twice, as `conv`, `norm` and inside `all_modules`, and nnssl replaces both: they are no longer the same
module. The network computes with `all_modules`; the others stay as initialised. A plain network has one module there,
which gets the weights of the living one.
"""

from __future__ import annotations

import logging
import pickle
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import tyro
from torch import Tensor, nn

from .checkpoint import save_checkpoint
from .csv_table import csv_text
from .data.store import write_atomically
from .model import PRESETS, RESENC_PRESETS, build_unet

log = logging.getLogger(__name__)

# Wrappers that prepend their name to every key: DistributedDataParallel, torch.compile, nnssl's SparK3D.
WRAPPERS = ("module.", "_orig_mod.", "architecture.")
# Entries that are read beside the weights, and where in the checkpoint they end up.
FACTS = {"nnssl_adaptation_plan": "config", "trainer_name": "imported"}
DEAD_COPY = "a copy that its network does not compute with"
NOT_A_WEIGHT = "not a weight"
LISTED = 5  # names in the summary; the table has all

Action = Literal["used", "converted", "dropped", "initialised"]


@dataclass(frozen=True)
class ImportConfig:
    """Make a checkpoint of s3d from weights of nnssl, nnU-Net or s3d export; it cannot be resumed, only loaded."""

    file: tyro.conf.Positional[Path]
    """Checkpoint or state dict."""
    output: Path
    """Checkpoint to write; there must be none of this name. A table of all keys is written beside it."""
    trust_pickle: bool = False
    """Read files that hold Python objects beside tensors. This runs whatever code is in the file."""


class KeyRow(NamedTuple):
    """What became of a key of the file, or where a weight without one comes from."""

    key: str  # in the file; empty: initialised
    action: Action
    target: str  # in the checkpoint; empty: dropped
    reason: str


@dataclass(frozen=True)
class Imported:
    """What a file holds for us.

    Attributes:
        content: of the checkpoint.
        rows: one for every key of the file and every weight that has none.
    """

    content: dict[str, Any]
    rows: list[KeyRow]


class _Source(NamedTuple):
    key: str  # in the file
    target: str  # its name in the plain U-Net or among the weights of the method
    tensor: Tensor


def import_weights(config: ImportConfig) -> None:
    """Write the checkpoint and the table ``<output>.keys.csv``; log a summary.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file cannot be read, or not without trusting it, or holds no ResEnc U-Net of a known size; or
            `output` exists.
    """
    if config.output.exists():
        raise ValueError(f"output {config.output} exists; remove it or give another name")
    imported = convert(_read(config.file, config.trust_pickle), config.file.name)
    save_checkpoint(config.output, imported.content)
    table = config.output.with_name(config.output.name + ".keys.csv")
    write_atomically(table, csv_text(KeyRow._fields, imported.rows).encode())
    log.info("%s", _summary(imported))
    log.info("%s: weights only, not resumable; every key is in %s", config.output, table)


def convert(raw: Any, name: str) -> Imported:
    """Checkpoint content of a file's content.

    Args:
        raw: {"network_weights": state dict, ...} as nnssl and nnU-Net write, or a state dict.
        name: of the file, for messages.
    Raises:
        ValueError: no ResEnc U-Net of a known size.
    """
    sources, rows = _sources(raw, name)
    preset = _find_preset(sources, name)
    unet, rows_of_network = _fill_unet(preset, sources)
    method, rows_of_method = _method_weights(preset, [source for source in sources if _is_of_method(source.target)])
    rows += rows_of_network + rows_of_method
    has_method = bool(method)
    sparse = has_method or "spark_weights" in raw or any(row.reason == DEAD_COPY for row in rows)
    config = {"preset": preset, "sparse": sparse, "mask_tokens": has_method, "densify": has_method, **_training(raw)}
    origin = {
        "file": name,
        "trainer_name": str(raw.get("trainer_name", "unknown")),
        "initialised": [row.target for row in rows if row.action == "initialised"],
    }
    content = {"step": 0, "config": config, "network": dict(unet.state_dict()), "method": method, "imported": origin}
    return Imported(content, rows)


def _read(path: Path, trust_pickle: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=not trust_pickle)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        if trust_pickle:
            raise ValueError(f"{path} is not a file of torch.save: {error}") from error
        raise ValueError(
            f"{path} is not made of tensors and plain types only. If it is a checkpoint and you trust where it comes "
            "from, --trust-pickle reads it, which runs the code it holds."
        ) from error
    except Exception as error:  # whatever unpickling runs into: a module that is not installed, a cut file, ...
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def _sources(raw: Any, name: str) -> tuple[list[_Source], list[KeyRow]]:
    """The tensors of a file under the names of the plain U-Net, and rows for what else is in it."""
    if not isinstance(raw, dict):
        raise ValueError(f"{name} holds a {type(raw).__name__}; accepted: a checkpoint or a state dict")
    if "format_version" in raw:
        raise ValueError(f"{name} is a checkpoint of s3d already")
    tables = {entry: raw[entry] for entry in ("network_weights", "spark_weights") if entry in raw}
    sources, rows = [], []
    for entry in (str(entry) for entry in raw if tables and entry not in tables):
        if entry in FACTS:
            rows.append(KeyRow(entry, "used", FACTS[entry], "patch size, voxel size and origin, where it tells them"))
        else:
            rows.append(KeyRow(entry, "dropped", "", NOT_A_WEIGHT))
    for entry, table in (tables or {"": raw}).items():
        for key, tensor in table.items():
            full = f"{entry}/{key}" if entry == "spark_weights" else str(key)
            if isinstance(tensor, Tensor):
                sources.append(_Source(full, _plain_name(str(key)), tensor))
            else:
                rows.append(KeyRow(full, "dropped", "", NOT_A_WEIGHT))
    return sources, rows


def _plain_name(key: str) -> str:
    """The name of a key of the file in the plain U-Net or among the weights of the method, if it belongs to them."""
    while key.startswith(WRAPPERS):
        key = key.partition(".")[2]
    if key.startswith(("stem.", "stages.")):  # s3d export --format encoder
        key = f"encoder.{key}"
    return key.replace("densify_projs.", "densify.", 1) if key.startswith("densify_projs.") else key


def _is_of_method(target: str) -> bool:
    return target.startswith(("mask_tokens.", "densify.", "densify_norms."))


def aliases(network: nn.Module) -> list[list[str]]:
    """Names of each parameter; the first is that of the module that computes."""
    names = defaultdict(list)
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return [sorted(group, key=_precedence) for group in names.values()]


def _precedence(name: str) -> tuple[bool, bool]:
    """Smallest for the name through which a forward pass reaches the module."""
    return name.startswith("decoder.encoder."), ".all_modules." not in name


def _find_preset(sources: list[_Source], name: str) -> str:
    """The preset whose encoder has the parameters of the file's, and no others."""
    shapes = {source.target: source.tensor.shape for source in sources}
    present = {target for target in shapes if target.startswith("encoder.")}
    for preset in RESENC_PRESETS:
        with torch.device("meta"):
            unet = build_unet(preset)
        expected = dict(unet.named_parameters(remove_duplicate=False))
        groups = [group for group in aliases(unet) if group[0].startswith("encoder.")]
        complete = all(any(member in shapes for member in group) for group in groups)
        if complete and all(target in expected and shapes[target] == expected[target].shape for target in present):
            return preset
    stem = next((tuple(shapes[target]) for target in sorted(present) if target.endswith("weight")), None)
    raise ValueError(
        f"{name} holds no encoder of a ResEnc U-Net with one input channel in a size of s3d "
        f"({', '.join(RESENC_PRESETS)}): "
        + (f"{len(present)} encoder weights, the first of shape {stem}" if present else "no weight is named encoder.*")
    )


def _fill_unet(preset: str, sources: list[_Source]) -> tuple[nn.Module, list[KeyRow]]:
    """The plain U-Net with the weights of the file, and what became of every key that is not of the method."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # for weights that the file lacks
        unet = build_unet(preset)
    parameters = dict(unet.named_parameters(remove_duplicate=False))
    candidates = defaultdict(list)
    rows = []
    for source in sources:
        if source.target in parameters:
            if source.tensor.shape == parameters[source.target].shape:
                candidates[id(parameters[source.target])].append(source)
            else:
                shapes = f"shape {tuple(source.tensor.shape)}, not {tuple(parameters[source.target].shape)}"
                rows.append(KeyRow(source.key, "dropped", "", shapes))
        elif not _is_of_method(source.target):
            rows.append(KeyRow(source.key, "dropped", "", "not in a ResEnc U-Net with one decoder block a stage"))
    for group in aliases(unet):
        parameter = parameters[group[0]]
        found = candidates[id(parameter)]
        if not found:
            rows.append(KeyRow("", "initialised", group[0], "the file has no such weight"))
            continue
        chosen = min(found, key=lambda source: _precedence(source.target))
        parameter.data.copy_(chosen.tensor)
        for source in found:
            if source is not chosen and not torch.equal(source.tensor, chosen.tensor):
                rows.append(KeyRow(source.key, "dropped", "", DEAD_COPY))
            else:
                rows.append(_kept(source))
    return unet, rows


def _kept(source: _Source) -> KeyRow:
    same = source.key == source.target
    return KeyRow(source.key, "used" if same else "converted", source.target, "" if same else "renamed")


def _method_weights(preset: str, sources: list[_Source]) -> tuple[dict[str, Tensor], list[KeyRow]]:
    """Mask tokens and densification under the names of `s3d.model.S3D`; none unless all stages have them."""
    features = PRESETS[preset].features
    shapes: dict[str, tuple[int, ...]] = {f"mask_tokens.{stage}": (width,) for stage, width in enumerate(features)}
    for stage, width in enumerate(features[1:], start=1):
        shapes |= {f"densify.{stage}.weight": (width, width, 3, 3, 3), f"densify.{stage}.bias": (width,)}
    weights: dict[str, Tensor] = {}
    rows = []
    for source in sources:
        tensor = source.tensor.float()
        if source.target.startswith("mask_tokens."):
            tensor = tensor.flatten()  # [1, C, 1, 1, 1] in nnssl
        if source.target.startswith("densify_norms."):
            identity = bool((tensor == (1 if source.target.endswith("weight") else 0)).all())
            effect = "they did nothing" if identity else "reconstructions differ without them"
            reason = f"the norm before the mask tokens has no weights here; {effect}"
            rows.append(KeyRow(source.key, "dropped", "", reason))
        elif shapes.get(source.target) == tuple(tensor.shape):
            weights[source.target] = tensor.clone()
            rows.append(_kept(source))
        else:
            rows.append(KeyRow(source.key, "dropped", "", "no such mask token or densification in this size"))
    missing = shapes.keys() - weights.keys()
    if missing:
        incomplete = (
            f"mask tokens and densification are taken together and whole; missing: {', '.join(sorted(missing))}"
        )
        return {}, [row if row.action == "dropped" else KeyRow(row.key, "dropped", "", incomplete) for row in rows]
    return weights, rows


def _training(raw: dict[str, Any]) -> dict[str, Any]:
    """Patch size and voxel size of the training, as far as an adaptation plan tells them."""
    plans = raw.get("nnssl_adaptation_plan", {}).get("pretrain_plan", {}).get("configurations", {})
    plan: dict[str, Any] = next(iter(plans.values()), {})
    known: dict[str, Any] = {}
    if plan.get("patch_size") is not None:
        known["patch_size"] = [int(side) for side in plan["patch_size"]]
    if plan.get("spacing") is not None and len(set(plan["spacing"])) == 1:
        known["spacing_mm"] = float(plan["spacing"][0])
    return known


def _summary(imported: Imported) -> str:
    """Counts, and by name what was not taken over as it is."""
    config = imported.content["config"]
    counts = {action: sum(row.action == action for row in imported.rows) for action in get_args(Action)}
    kind = "sparse" if config["sparse"] else "dense"
    with_method = "with" if config["mask_tokens"] else "without"
    lines = [f"{config['preset']}, {kind}, {with_method} mask tokens and densification. Keys: {counts}"]
    groups = defaultdict(list)
    for row in imported.rows:
        if row.action in ("dropped", "initialised"):
            groups[f"{row.action}, {row.reason}"].append(row.key or row.target)
    for what, names in groups.items():
        lines.append(f"  {len(names)} {what}: {', '.join(names[:LISTED])}{', ...' if len(names) > LISTED else ''}")
    return "\n".join(lines)
