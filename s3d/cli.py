"""The command line: `s3d preprocess`, `s3d pretrain`, ... Options come from the dataclasses of the commands."""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
from collections.abc import Callable
from typing import Any

import tyro

from .comparison.compare import CompareConfig, compare
from .data import BadImageError
from .demo import DemoConfig, demo
from .export_weights import ExportConfig, export
from .import_weights import ImportConfig, import_weights
from .preprocessing import PreprocessConfig, preprocess_images
from .pretext.registry import METHODS
from .pretrain import pretrain
from .pretrain_config import PretrainConfig, machine_config
from .profiling import ProfileConfig, profile
from .segmentation.evaluate import EvaluateConfig, evaluate
from .segmentation.finetune import finetune
from .segmentation.finetune_config import FinetuneConfig
from .segmentation.predict import PredictConfig, predict
from .segmentation.ranking import RankConfig, rank

# Of the processes that torchrun started, one talks.
FIRST = os.environ.get("RANK", "0") == "0"


def _pretrain(config: PretrainConfig) -> None:
    result = pretrain(config)
    if result.steps == config.steps and FIRST:
        share = ""
        if not math.isnan(result.mean_loss):
            trivial = METHODS[config.method].trivial_label
            share = f", {result.final_loss / result.mean_loss:.2f} of {trivial} ({result.mean_loss:.4f})"
        print(
            f"validation loss {result.initial_loss:.4f} -> {result.final_loss:.4f}{share}; "
            f"checkpoint: {result.checkpoint}"
        )


def _finetune(config: FinetuneConfig) -> None:
    result = finetune(config)
    if result.steps == config.steps and FIRST:
        dice = "" if math.isnan(result.validation_dice) else f"validation Dice {result.validation_dice:.4f}; "
        print(f"{dice}checkpoint: {result.checkpoint}")


def _predict(config: PredictConfig) -> None:
    summary = predict(config)
    if FIRST:
        skipped = f", {len(summary.skipped)} skipped" if summary.skipped else ""
        of_all = " by the first process" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        print(f"{len(summary.predicted)} cases segmented{of_all}{skipped}: {config.output_dir}")


# Settings and function of each command.
COMMANDS: dict[str, tuple[type, Callable[[Any], object]]] = {
    "preprocess": (PreprocessConfig, preprocess_images),
    "pretrain": (PretrainConfig, _pretrain),
    "finetune": (FinetuneConfig, _finetune),
    "predict": (PredictConfig, _predict),
    "evaluate": (EvaluateConfig, evaluate),
    "rank": (RankConfig, rank),
    "compare": (CompareConfig, compare),
    "export": (ExportConfig, export),
    "import": (ImportConfig, import_weights),
    "profile": (ProfileConfig, profile),
    "demo": (DemoConfig, demo),
}
RESUMABLE = (PreprocessConfig, PretrainConfig, FinetuneConfig, PredictConfig, CompareConfig, DemoConfig)


def main(arguments: list[str] | None = None) -> None:
    """Run a command. Mistakes of the user end with one line on standard error and exit status 2."""
    logging.basicConfig(level=logging.INFO if FIRST else logging.WARNING, format="%(message)s")
    arguments = sys.argv[1:] if arguments is None else arguments
    config: Any = None
    try:
        machine = _machine_of(arguments)
        if machine is not None:
            config = tyro.cli(PretrainConfig, prog="s3d pretrain", args=arguments[1:], default=machine)
        else:
            subcommands: dict[str, Callable[..., Any]] = {name: settings for name, (settings, _) in COMMANDS.items()}
            config = tyro.extras.subcommand_cli_from_dict(subcommands, prog="s3d", args=arguments)
        run = next(function for settings, function in COMMANDS.values() if settings is type(config))
        run(config)
    except KeyboardInterrupt:
        saved = "; the same command goes on from what was saved" if isinstance(config, RESUMABLE) else ""
        print(f"s3d: interrupted{saved}", file=sys.stderr)
        sys.exit(130)
    except (BadImageError, ValueError, OSError, FloatingPointError) as error:
        logging.getLogger(__name__).debug("", exc_info=True)
        print(f"s3d: {error}", file=sys.stderr)
        sys.exit(2)


def _machine_of(arguments: list[str]) -> PretrainConfig | None:
    """The defaults that `s3d pretrain --machine` asks for.

    Raises:
        ValueError: there is no such machine.
    """
    if arguments[:1] != ["pretrain"]:
        return None
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--machine")
    machine = parser.parse_known_args(arguments[1:])[0].machine
    return None if machine is None else machine_config(machine, output_dir=tyro.MISSING)
