"""The command line: `s3d preprocess`, `s3d pretrain`, ... Options come from the dataclasses of the commands."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

import tyro

from .data import BadImageError
from .demo import DemoConfig, demo
from .preprocessing import PreprocessConfig, preprocess_images
from .pretrain import PretrainConfig, PretrainResult, pretrain
from .profiling import ProfileConfig, profile


def _pretrain(config: PretrainConfig) -> None:
    result: PretrainResult = pretrain(config)
    if result.steps == config.steps:
        share = result.final_loss / result.mean_loss
        print(
            f"validation loss {result.initial_loss:.4f} -> {result.final_loss:.4f}, {share:.2f} of predicting the "
            f"visible mean ({result.mean_loss:.4f}); checkpoint: {result.checkpoint}"
        )


def main(arguments: list[str] | None = None) -> None:
    """Run a command. Mistakes of the user end with one line on standard error and exit status 2."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    commands: dict[str, Callable[..., DemoConfig | PreprocessConfig | PretrainConfig | ProfileConfig]] = {
        "preprocess": PreprocessConfig,
        "pretrain": PretrainConfig,
        "profile": ProfileConfig,
        "demo": DemoConfig,
    }
    config = tyro.extras.subcommand_cli_from_dict(commands, prog="s3d", args=arguments)
    try:
        if isinstance(config, DemoConfig):
            demo(config)
        elif isinstance(config, PreprocessConfig):
            preprocess_images(config)
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
        print(f"s3d: {error}", file=sys.stderr)
        sys.exit(2)
