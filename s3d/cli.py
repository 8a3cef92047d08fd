"""The command line: `s3d pretrain`, `s3d profile`, `s3d demo`. Options come from the dataclasses of the commands."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable

import tyro

from .data import BadImageError
from .demo import DemoConfig, demo
from .pretrain import PretrainResult, pretrain
from .pretrain_config import PretrainConfig, machine_config
from .profiling import ProfileConfig, profile

# Of the processes that torchrun started, one talks.
FIRST = os.environ.get("RANK", "0") == "0"


def _pretrain(config: PretrainConfig) -> None:
    result: PretrainResult = pretrain(config)
    if result.steps == config.steps and FIRST:
        share = result.final_loss / result.mean_loss
        print(
            f"validation loss {result.initial_loss:.4f} -> {result.final_loss:.4f}, {share:.2f} of predicting the "
            f"visible mean ({result.mean_loss:.4f}); checkpoint: {result.checkpoint}"
        )


def main(arguments: list[str] | None = None) -> None:
    """Run a command. Mistakes of the user end with one line on standard error and exit status 2."""
    logging.basicConfig(level=logging.INFO if FIRST else logging.WARNING, format="%(message)s")
    commands: dict[str, Callable[..., DemoConfig | PretrainConfig | ProfileConfig]] = {
        "pretrain": PretrainConfig,
        "profile": ProfileConfig,
        "demo": DemoConfig,
    }
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        machine = _machine_of(arguments)
    except ValueError as error:
        sys.exit(_complain(error))
    if machine is None:
        config = tyro.extras.subcommand_cli_from_dict(commands, prog="s3d", args=arguments)
    else:
        config = tyro.cli(PretrainConfig, prog="s3d pretrain", args=arguments[1:], default=machine)
    try:
        if isinstance(config, DemoConfig):
            demo(config)
        elif isinstance(config, ProfileConfig):
            profile(config)
        else:
            _pretrain(config)
    except KeyboardInterrupt:
        saved = "" if isinstance(config, ProfileConfig) else "; the same command goes on from what was saved"
        print(f"s3d: interrupted{saved}", file=sys.stderr)
        sys.exit(130)
    except (BadImageError, ValueError, OSError, FloatingPointError) as error:
        logging.getLogger(__name__).debug("", exc_info=True)
        sys.exit(_complain(error))


def _complain(error: Exception) -> int:
    print(f"s3d: {error}", file=sys.stderr)
    return 2


def _machine_of(arguments: list[str]) -> PretrainConfig | None:
    """The defaults that `s3d pretrain --machine` asks for."""
    if arguments[:1] != ["pretrain"]:
        return None
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--machine")
    machine = parser.parse_known_args(arguments[1:])[0].machine
    return None if machine is None else machine_config(machine, output_dir=tyro.MISSING)
