"""One step of the fine-tuning."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from s3d.distributed import Processes
from s3d.model import Network
from s3d.optimizer_step import OptimizerStep, Training, autocast

from .finetune_config import FinetuneConfig
from .loss import SegmentationLoss


def build_segmentation_training(config: FinetuneConfig, network: Network, steps_done: int) -> Training[Network]:
    """A network and its optimiser, which has state for what has been trained in the steps done and nothing else."""
    heads = network.decoder.seg_layers
    # The coarsest of several outputs does not count, nor does any but the finest without deep supervision.
    heads[: 1 if config.deep_supervision and len(heads) > 1 else -1].requires_grad_(False)
    frozen = config.learning_rates.encoder_frozen(max(0, steps_done - 1))
    network.encoder.requires_grad_(not frozen)
    encoder = {id(parameter) for parameter in network.encoder.parameters()}
    # The decoder holds the encoder too.
    rest = [parameter for parameter in network.decoder.parameters() if id(parameter) not in encoder]
    training = Training.build(config, network, rest, network_prefix="")
    if not frozen:
        training.optimizer.add_param_group({"params": list(network.encoder.parameters())})
    return training


class SegmentationStep(OptimizerStep[FinetuneConfig, Network]):
    """A step on labelled patches; where the schedule says so, the encoder is frozen: no gradient, no optimiser state.

    Batches have "image" [n, C, D, H, W] and "label" [n, 1, D, H, W].

    Args:
        config: of the run.
        training: of `build_segmentation_training`, on the device of this process.
        processes: that share the batch.
        parts: into which a process cuts its share of the batch, to save memory.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        training: Training[Network],
        processes: Processes,
        parts: int = 1,
    ) -> None:
        super().__init__(config, training, processes, parts)
        self._criterion = SegmentationLoss()

    def losses(self, parts: list[dict[str, Any]], step: int) -> tuple[Iterator[Callable[[], Tensor]], dict[str, float]]:
        """See `OptimizerStep.losses`."""
        self._freeze_encoder(self.config.learning_rates.encoder_frozen(step))
        return (lambda part=part: self._loss(part) for part in parts), {}

    def _loss(self, part: dict[str, Any]) -> Tensor:
        with autocast(self.config.precision, self.processes.device), self.phase("forward"):
            outputs = self.network(part["image"])
        with self.phase("loss"):
            return self._criterion(outputs, part["label"]) * (len(part["image"]) / self.config.batch_size)

    def _freeze_encoder(self, frozen: bool) -> None:
        network, optimizer = self.training.model, self.training.optimizer
        if frozen != next(network.encoder.parameters()).requires_grad:
            return
        network.encoder.requires_grad_(not frozen)
        if not frozen:
            optimizer.add_param_group({"params": list(network.encoder.parameters())})
        self.network = self._distributed()
