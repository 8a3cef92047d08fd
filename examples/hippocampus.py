"""What pre-training is worth on a small data set: Dice on the 52 test cases of the Hippocampus task of the Decathlon.

python examples/hippocampus.py --data .../Dataset004_Hippocampus --output-dir OUT

The `small` network is pre-trained on the 208 training images without their labels. Then, each part with its own runs:

    a   from scratch with all labels and a larger budget: how good the network gets. A second run leaves out nnU-Net's
        first fold, to show the curve on cases that it has not seen.
    b   4, 8, 16 and 208 labels, from scratch against fine-tuned as published, the same budget, several seeds.
    c   8 labels: every schedule with either scope of transfer, against the runs of part b.

Each run is `s3d finetune`, `s3d predict` and `s3d evaluate`; what is done is not done again, so stop it as you like.
Writes results.md, results.csv, labels.png and every run with its log. The labels of a seed are nested: its 4 cases are
among its 8.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from hippocampus_tables import Result, write_results

from s3d.comparison.step_cost import measured_steps
from s3d.data.workers import available_cores
from s3d.segmentation.raw_dataset import default_folds, read_raw_dataset
from s3d.segmentation.schedule import SCHEDULES
from s3d.segmentation.scores import read_scores

LABELS = (4, 8, 16, 208)
FEW = 8  # labels of part c
PATCH = (40, 56, 40)
MASK_BLOCK = 8
BATCH_SIZE = 2
# The published optimiser (SGD, momentum 0.99, 1e-2 from scratch and 1e-3 otherwise) is meant for 250,000 steps: in some
# hundreds it does not leave the plateau of "all background". The highest learning rates of both arms were chosen on
# training cases (docs/finetuning.md).
OPTIMIZER = "adamw"
LEARNING_RATE = 1e-2
LONG_LEARNING_RATE = 3e-3  # of part a
PRETRAINING_BATCH_SIZE = 8
SCOPES = ("encoder+decoder", "encoder")


@dataclass(frozen=True)
class Training:
    """A run of `s3d finetune`.

    Attributes:
        part: of the experiment, the first that needs it.
        schedule, scope: see docs/finetuning.md; "scratch" has no scope.
        labels: training cases; None: all but those of nnU-Net's first fold, which are for validation.
        seed: of the choice of these cases, and of the run.
        steps: of the run.
    """

    part: str
    schedule: str
    scope: str | None
    labels: int | None
    seed: int
    steps: int

    @property
    def name(self) -> str:
        cases = "fold-0" if self.labels is None else f"{self.labels}-labels"
        return "_".join([self.part, self.schedule, *([self.scope] if self.scope else []), cases, f"seed-{self.seed}"])


def main() -> None:
    """Run the experiment, or what is left of it."""
    options = _options()
    output: Path = options.output_dir
    output.mkdir(parents=True, exist_ok=True)
    cores = available_cores()
    trainings = plan_runs(options.parts, options.seeds, options.steps, options.long_steps)
    checkpoint = output / "pretraining" / "checkpoint.pt"
    pretraining = ""
    if any(training.scope for training in trainings):
        pretrain(options.data, output / "pretraining", options.pretraining_steps, cores)
        minutes = measured_steps(output / "pretraining" / "log.csv", PRETRAINING_BATCH_SIZE).seconds / 60
        pretraining = f"Pre-training: {options.pretraining_steps} steps, {minutes:.1f} minutes, seed 0."
    threads = max(1, cores // options.jobs)
    pool = ThreadPoolExecutor(options.jobs)
    try:
        tasks = [pool.submit(run, training, options.data, output, checkpoint, threads) for training in trainings]
        wait(tasks, return_when=FIRST_EXCEPTION)
    finally:
        pool.shutdown(cancel_futures=True)
    print(write_results([task.result() for task in tasks], pretraining, output))


def plan_runs(parts: list[str], seeds: int, steps: int, long_steps: int) -> list[Training]:
    """All runs, those of part b that part c is compared with too."""
    runs = []
    if "a" in parts:
        runs += [Training("a", "scratch", None, labels, 0, long_steps) for labels in (LABELS[-1], None)]
    for seed in range(seeds):
        for labels in LABELS:
            if "b" in parts or ("c" in parts and labels == FEW):
                runs.append(Training("b", "scratch", None, labels, seed, steps))
                runs.append(Training("b", "sawtooth", SCOPES[0], labels, seed, steps))
        if "c" in parts:
            others = [(name, scope) for name in SCHEDULES if name != "scratch" for scope in SCOPES]
            others.remove(("sawtooth", SCOPES[0]))
            runs += [Training("c", name, scope, FEW, seed, steps) for name, scope in others]
    return runs


def pretrain(data: Path, folder: Path, steps: int, cores: int) -> None:
    """Pre-train on the training images, or go on with it; nothing happens if it is complete."""
    command = ["pretrain", "--images", data / "imagesTr", "--output-dir", folder, "--preset", "small"]
    command += ["--patch-size", *PATCH, "--mask-block", MASK_BLOCK, "--steps", steps]
    command += ["--batch-size", PRETRAINING_BATCH_SIZE, "--warmup-steps", max(1, steps // 20)]
    # A short run: the published momentum of 0.99 is too long a memory for so few steps.
    command += ["--momentum", "0.9", "--learning-rate", "0.05", "--checkpoint-every", "100"]
    command += ["--validation-fraction", "0.01", "--validate-every", steps]
    command += ["--precision", "bfloat16", "--workers", "1", "--device", "cpu", "--seed", "0"]
    folder.mkdir(exist_ok=True)
    s3d(command, folder / "output.txt", cores)


def run(training: Training, data: Path, output: Path, checkpoint: Path, threads: int) -> Result:
    """Train, predict the test cases and score them, as far as that is not done yet.

    Raises:
        ValueError: the folder holds a run of other settings.
        RuntimeError: a command failed.
    """
    folder = output / "runs" / training.name
    folder.mkdir(parents=True, exist_ok=True)
    splits = output / "splits" / f"{training.name}.json"
    splits.parent.mkdir(exist_ok=True)
    splits.write_text(json.dumps([split_of(data, training)], indent=1), encoding="utf-8")

    command = ["finetune", "--dataset", data, "--output-dir", folder, "--splits", splits, "--fold", "0"]
    command += ["--cases", output / "cases"]
    command += ["--preset", "small", "--patch", "fixed", "--patch-size", *PATCH, "--spacing-mm", "1", "1", "1"]
    command += ["--schedule", training.schedule, "--steps", training.steps, "--batch-size", BATCH_SIZE]
    peak = LONG_LEARNING_RATE if training.part == "a" else LEARNING_RATE
    command += ["--optimizer", OPTIMIZER, "--learning-rate", peak]
    command += ["--validate-every", max(1, training.steps // 10), "--precision", "bfloat16", "--workers", "1"]
    command += ["--seed", training.seed, "--device", "cpu"]
    if training.scope:
        command += ["--checkpoint", checkpoint, "--scope", training.scope]
    settings = folder / "command.json"
    words = [str(word) for word in command]
    if settings.exists() and json.loads(settings.read_text(encoding="utf-8")) != words:
        raise ValueError(f"{folder} holds a run of other settings; give another --output-dir")
    settings.write_text(json.dumps(words), encoding="utf-8")

    scores_file = folder / "evaluation" / "cases.csv"
    if not scores_file.exists():
        text = folder / "output.txt"
        s3d(command, text, threads)
        model, predictions = folder / "checkpoint.pt", folder / "predictions"
        predict = ["predict", model, "--images", data / "imagesTs", "--output-dir", predictions]
        s3d([*predict, "--device", "cpu"], text, threads)
        evaluate = ["evaluate", "--labels", data / "labelsTs", "--predictions", f"{training.name}={predictions}"]
        evaluate += ["--dataset-json", data / "dataset.json", "--images", data / "imagesTs"]
        s3d([*evaluate, "--output-dir", scores_file.parent, "--workers", "0"], text, threads)
    scores = read_scores(scores_file)
    return Result(
        part=training.part,
        schedule=training.schedule,
        scope=training.scope or "",
        labels=0 if training.labels is None else training.labels,
        seed=training.seed,
        steps=training.steps,
        seconds=measured_steps(folder / "log.csv", BATCH_SIZE).seconds,
        classes=scores.classes,
        dice=scores.dice[0],
        folder=folder,
    )


def split_of(data: Path, training: Training) -> dict[str, list[str]]:
    """Names of training and validation cases, as in splits_final.json of nnU-Net."""
    names = [case.name for case in read_raw_dataset(data).training]
    if training.labels is None:
        return default_folds(names)[0]
    random.Random(training.seed).shuffle(names)
    return {"train": sorted(names[: training.labels]), "val": []}


def s3d(command: list[object], text: Path, threads: int) -> None:
    """A command of s3d; what it says goes to the end of a file.

    Raises:
        RuntimeError: it failed; with its last line.
    """
    with text.open("a", encoding="utf-8") as file:
        status = subprocess.run(
            [sys.executable, "-m", "s3d", *map(str, command)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            check=False,
        ).returncode
    if status:
        last = text.read_text(encoding="utf-8").strip().splitlines()[-1:]
        raise RuntimeError(f"s3d {command[0]} failed with exit status {status}: {' '.join(last)} (more in {text})")
    print(f"{text.parent.name}: {command[0]} done", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="Dataset004_Hippocampus in nnU-Net's raw layout")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder of the experiment")
    parser.add_argument("--parts", nargs="+", choices=list("abc"), default=list("abc"), help="default: all")
    parser.add_argument(
        "--jobs",
        type=int,
        default=2,
        choices=range(1, 65),
        metavar="N",
        help="runs beside each other, which share the cores",
    )
    parser.add_argument(
        "--seeds", type=int, default=3, choices=range(1, 101), metavar="N", help="of each run of the parts b and c"
    )
    parser.add_argument("--pretraining-steps", type=int, default=1200, help=f"of {PRETRAINING_BATCH_SIZE} patches")
    parser.add_argument("--steps", type=int, default=300, help=f"of {BATCH_SIZE} patches, of the parts b and c")
    parser.add_argument("--long-steps", type=int, default=3000, help=f"of {BATCH_SIZE} patches, of part a")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"hippocampus: {error}")
