"""The protocol of a comparison: a JSON file that says which methods, data sets, label counts and seeds.

    {"description": "...",
     "pretraining": {"images": ["imagesTr"], "preset": "small", ...},
     "finetuning": {"steps": 300, ...},
     "methods": {"S3D": {"pretraining": {"method": "s3d"}, "finetuning": {}},
                 "from scratch": {"pretraining": null, "finetuning": {"learning_rate": 0.01}}},
     "datasets": {"hippocampus": {"folder": "Dataset004_Hippocampus", "labels": [8, null], "validation_cases": 8}},
     "seeds": [0, 1, 2],
     "pretraining_seeds": "one",
     "budget": null,
     "tables": {"comparison": ["S3D", "from scratch"], "ablation": []},
     "reference": "S3D"}

Settings of a run are those of `s3d pretrain` and `s3d finetune`. What stands further inside goes before what stands
further outside: for a fine-tuning the settings of all, of the data set, of the method.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from s3d.pretrain_config import PretrainConfig
from s3d.segmentation.finetune_config import FinetuneConfig

from .settings_file import check_names, entry, object_at, settings_of, without_repetition

# Settings of a run that the comparison itself decides.
OURS = ("output_dir", "seed", "device", "resume")
OURS_OF_PRETRAINING = (*OURS, "machine")
OURS_OF_FINETUNING = (*OURS, "dataset", "checkpoint", "fold", "splits", "cases", "prepare_only", "skip_bad")
# Stands for the number of steps where time decides it: beyond any warm-up that makes sense.
UNKNOWN_STEPS = 1_000_000_000
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """A row of the tables.

    Attributes:
        name: of the row.
        pretraining: settings of its pre-training, as in the file; None: from scratch.
        finetuning: settings of its fine-tunings, as in the file, without those of a data set.
    """

    name: str
    pretraining: Settings | None
    finetuning: Settings


@dataclass(frozen=True)
class LabelledDataset:
    """A data set in nnU-Net's raw layout that methods are fine-tuned on.

    Attributes:
        name: in the tables.
        folder: relative to the folder of the data.
        labels: numbers of training cases; None: all but those for validation.
        validation_cases: that are set aside for the learning curve, the same for all seeds and label counts.
        finetuning: settings of the fine-tunings on it.
    """

    name: str
    folder: str
    labels: tuple[int | None, ...]
    validation_cases: int
    finetuning: Settings


@dataclass(frozen=True)
class Budget:
    """Seconds of training steps that each run has, instead of a number of steps."""

    pretraining_seconds: float
    finetuning_seconds: float


@dataclass(frozen=True)
class Protocol:
    """What is compared, and how.

    Attributes:
        description: for the page.
        finetuning: settings of all fine-tunings.
        methods, datasets: in the order of the file.
        seeds: of fine-tunings.
        pretraining_seeds: "one": all seeds fine-tune one pre-training, of the first seed; "each": each has its own.
        budget: equal time; None: equal steps.
        comparison, ablation: methods of the two tables.
        reference: method that the others are tested against.
    """

    description: str
    finetuning: Settings
    methods: tuple[Method, ...]
    datasets: tuple[LabelledDataset, ...]
    seeds: tuple[int, ...]
    pretraining_seeds: Literal["one", "each"]
    budget: Budget | None
    comparison: tuple[str, ...]
    ablation: tuple[str, ...]
    reference: str

    def pretraining_seed(self, seed: int) -> int:
        """Of the pre-training that a seed's fine-tuning begins with."""
        return self.seeds[0] if self.pretraining_seeds == "one" else seed

    def finetuning_of(self, method: Method, dataset: LabelledDataset) -> Settings:
        """Settings of the fine-tunings of a method on a data set, as in the file."""
        return {**self.finetuning, **dataset.finetuning, **method.finetuning}


def slug_of(name: str) -> str:
    """What a method or data set is called in paths."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


TOP = "description pretraining finetuning methods datasets seeds pretraining_seeds budget tables reference".split()


def read_protocol(file: Path) -> Protocol:
    """The protocol of a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or an entry is wrong; names its place.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=without_repetition)
        return parse_protocol(content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: is not JSON ({error})") from error
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def parse_protocol(content: Any) -> Protocol:
    """The protocol of the content of a file.

    Raises:
        ValueError: an entry is wrong; names its place.
    """
    given = object_at(content, "the file")
    check_names(given, TOP, "")
    description = _text(entry(given, "description", "", ""), "description")
    pretraining = object_at(entry(given, "pretraining", "", {}), "pretraining")
    finetuning = object_at(entry(given, "finetuning", "", {}), "finetuning")
    settings_of(pretraining, PretrainConfig, OURS_OF_PRETRAINING, "pretraining")
    settings_of(finetuning, FinetuneConfig, OURS_OF_FINETUNING, "finetuning")
    budget = _budget(given.get("budget"))
    methods = tuple(_method(name, value, pretraining) for name, value in _named(given, "methods").items())
    datasets = tuple(_dataset(name, value) for name, value in _named(given, "datasets").items())
    names = [method.name for method in methods]
    seeds = _seeds(entry(given, "seeds", ""))
    pretraining_seeds = entry(given, "pretraining_seeds", "", "one")
    if pretraining_seeds not in ("one", "each"):
        raise ValueError(f"pretraining_seeds: must be 'one' or 'each', got {pretraining_seeds!r}")
    tables = object_at(entry(given, "tables", "", {}), "tables")
    check_names(tables, ("comparison", "ablation"), "tables")
    reference = entry(given, "reference", "", names[0])
    _check_methods([reference], names, "reference")
    protocol = Protocol(
        description=description,
        finetuning=finetuning,
        methods=methods,
        datasets=datasets,
        seeds=seeds,
        pretraining_seeds=pretraining_seeds,
        budget=budget,
        comparison=_check_methods(tables.get("comparison", names), names, "tables.comparison"),
        ablation=_check_methods(tables.get("ablation", []), names, "tables.ablation"),
        reference=reference,
    )
    _check_settings(protocol, pretraining)
    return protocol


def pretraining_settings(settings: Settings, data_dir: Path) -> dict[str, Any]:
    """As `PretrainConfig` takes them, with paths that begin at the folder of the data."""
    values = settings_of(settings, PretrainConfig, OURS_OF_PRETRAINING, "pretraining")
    if values.get("volumes") is not None:
        values["volumes"] = data_dir / values["volumes"]
    if "images" in values:
        values["images"] = tuple(str(data_dir / image) for image in values["images"])
    return values


def finetuning_settings(settings: Settings) -> dict[str, Any]:
    """As `FinetuneConfig` takes them."""
    return settings_of(settings, FinetuneConfig, OURS_OF_FINETUNING, "finetuning")


def _method(name: str, value: Any, all_pretraining: Settings) -> Method:
    place = f"methods.{name}"
    given = object_at(value, place)
    check_names(given, ("pretraining", "finetuning"), place)
    own = entry(given, "pretraining", place)
    finetuning = object_at(entry(given, "finetuning", place, {}), f"{place}.finetuning")
    settings_of(finetuning, FinetuneConfig, OURS_OF_FINETUNING, f"{place}.finetuning")
    if own is None:
        return Method(name, None, finetuning)
    own = object_at(own, f"{place}.pretraining")
    settings_of(own, PretrainConfig, OURS_OF_PRETRAINING, f"{place}.pretraining")
    merged = {**all_pretraining, **own}
    if not merged.get("images") and merged.get("volumes") is None:
        raise ValueError(f"{place}.pretraining: give images or volumes, there or in pretraining for all methods")
    return Method(name, merged, finetuning)


def _dataset(name: str, value: Any) -> LabelledDataset:
    place = f"datasets.{name}"
    given = object_at(value, place)
    check_names(given, ("folder", "labels", "validation_cases", "finetuning"), place)
    finetuning = object_at(entry(given, "finetuning", place, {}), f"{place}.finetuning")
    settings_of(finetuning, FinetuneConfig, OURS_OF_FINETUNING, f"{place}.finetuning")
    labels = entry(given, "labels", place, [None])
    right = isinstance(labels, list) and labels and all(n is None or (_whole(n) and n > 0) for n in labels)
    if not right or len(set(labels)) < len(labels):
        raise ValueError(
            f"{place}.labels: must be a list of different numbers of training cases, null for all, got {labels!r}"
        )
    validation_cases = entry(given, "validation_cases", place, 0)
    if not _whole(validation_cases) or validation_cases < 0:
        raise ValueError(f"{place}.validation_cases: must be a whole number, at least 0, got {validation_cases!r}")
    folder = _text(entry(given, "folder", place), f"{place}.folder")
    return LabelledDataset(name, folder, tuple(labels), validation_cases, finetuning)


def _check_settings(protocol: Protocol, all_pretraining: Settings) -> None:
    """That runs of these settings can be made: some mistakes show only where settings meet."""
    budget = protocol.budget
    measured = {} if budget is None else {"steps": UNKNOWN_STEPS}
    for method in protocol.methods:
        place = f"methods.{method.name}"
        checkpoint = None
        if method.pretraining is not None:
            _check_steps(budget, method.pretraining, f"{place}.pretraining")
            values = pretraining_settings(method.pretraining, Path())
            _build(PretrainConfig, {**values, **measured}, f"{place}.pretraining")
            checkpoint = Path("checkpoint.pt")
        for dataset in protocol.datasets:
            settings = protocol.finetuning_of(method, dataset)
            where = f"{place}.finetuning (with datasets.{dataset.name}.finetuning and finetuning)"
            _check_steps(budget, settings, where)
            own = {"dataset": Path(dataset.folder), "checkpoint": checkpoint}
            _build(FinetuneConfig, {**finetuning_settings(settings), **own, **measured}, where)


def _check_steps(budget: Budget | None, settings: Settings, place: str) -> None:
    if budget is not None and "steps" in settings:
        raise ValueError(f"{place}: steps and budget exclude each other; leave out one of them")


def _build(config: type[PretrainConfig | FinetuneConfig], values: dict[str, Any], place: str) -> None:
    try:
        config(output_dir=Path(), **values)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _budget(value: Any) -> Budget | None:
    if value is None:
        return None
    names = ("pretraining_seconds", "finetuning_seconds")
    given = object_at(value, "budget")
    check_names(given, names, "budget")
    seconds = {}
    for name in names:
        number = entry(given, name, "budget")
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not number > 0:
            raise ValueError(f"budget.{name}: must be a positive number of seconds, got {number!r}")
        seconds[name] = float(number)
    return Budget(**seconds)


def _seeds(value: Any) -> tuple[int, ...]:
    right = isinstance(value, list) and value and all(_whole(seed) and seed >= 0 for seed in value)
    if not right or len(set(value)) < len(value):
        raise ValueError(f"seeds: must be a list of different whole numbers, got {value!r}")
    return tuple(value)


def _named(given: Settings, name: str) -> dict[str, Any]:
    found = object_at(entry(given, name, ""), name)
    if not found:
        raise ValueError(f"{name}: must name at least one")
    slugs: dict[str, str] = {}
    for one in found:
        slug = slug_of(one)
        if not slug or slug in slugs:
            other = f"gives the same as {slugs[slug]!r}" if slug else "gives none"
            raise ValueError(f"{name}.{one}: letters a to z and digits make the name of a folder, and {one!r} {other}")
        slugs[slug] = one
    return found


def _check_methods(chosen: Any, names: Sequence[str], place: str) -> tuple[str, ...]:
    if not isinstance(chosen, list) or len(set(map(str, chosen))) < len(chosen):
        raise ValueError(f"{place}: must be a list of different methods, got {chosen!r}")
    for name in chosen:
        if name not in names:
            raise ValueError(f"{place}: no such method: {name!r}; there are: {', '.join(names)}")
    return tuple(chosen)


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place}: must be a text, got {value!r}")
    return value


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
