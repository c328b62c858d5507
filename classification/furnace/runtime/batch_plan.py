"""How a training set is cut into updates: worked out once, read by sampler, loader, schedules and trainer."""

import logging
from dataclasses import dataclass, replace

from furnace.runtime.files import ProcessError, UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchPlan:
    """Sizes of a training epoch.

    Attributes:
        micro: images of one forward pass of one process.
        accumulation: forward passes of a process per update.
        world_size: processes.
        steps_per_epoch: updates of the weights per epoch.
        even: the images of a forward pass are paired (mixup).
        least: images that a forward pass needs (batch normalisation).
    """

    micro: int
    accumulation: int
    world_size: int
    steps_per_epoch: int
    even: bool = False
    least: int = 1

    @property
    def per_update(self) -> int:
        """Images of one update, over all processes."""
        return self.micro * self.accumulation * self.world_size

    @property
    def draws_per_epoch(self) -> int:
        """Images of one epoch, over all processes; what is left over is smaller than an update."""
        return self.per_update * self.steps_per_epoch

    def halved(self) -> "BatchPlan":
        """Half as many images a forward pass and twice as many passes: the update has the same images.

        Raises:
            ProcessError: half of the images is no number, with ``even`` an odd one, or below ``least``.
        """
        if self.micro % (4 if self.even else 2) or self.micro // 2 < self.least:
            why = " (mixup pairs them)" if self.even else f" ({self.least} are needed)" if self.least > 1 else ""
            raise ProcessError(
                f"{self.micro} image{'s do' if self.micro > 1 else ' does'} not fit into the GPU's memory and cannot "
                f"be halved{why}: take --amp_dtype bf16, --grad_checkpointing, or a "
                "smaller --batch_size with a larger --update_freq")
        return replace(self, micro=self.micro // 2, accumulation=self.accumulation * 2)


def plan_batches(images: int, *, batch_size: int, update_freq: int = 1, world_size: int = 1,
                 even: bool = False, least: int = 1) -> BatchPlan:
    """Cut ``images`` into updates of batch_size x update_freq x world_size, as published, dropping the rest.

    A training set smaller than one update is one update, with a warning.

    Args:
        images: of the training set.
        batch_size: images of a forward pass of one process.
        update_freq: forward passes per update.
        world_size: processes.
        even: mixup pairs the images of a forward pass: their number must be even.
        least: images that a forward pass needs; kept in the plan, where the caller sees whether they are there.

    Raises:
        UserError: no update can be made of so few images, or the batch is odd.
    """
    if even and batch_size % 2:
        raise UserError(f"--batch_size {batch_size}: mixup and cutmix pair the images of a batch, so it must be even")
    per_update = batch_size * update_freq * world_size
    if images >= per_update:
        return BatchPlan(batch_size, update_freq, world_size, images // per_update, even, least)
    micro = min(batch_size, images // world_size)
    micro -= micro % 2 if even else 0
    if micro < 1:
        raise UserError(f"{images} train images are too few for {world_size} process{'es' * (world_size > 1)}"
                        f"{' with mixup or cutmix, which pair images' if even else ''}: take fewer processes, or more "
                        "images")
    accumulation = max(1, images // (micro * world_size))
    logger.warning("train has %d images, fewer than one update of %d: an update is of %d", images, per_update,
                   micro * accumulation * world_size)
    return BatchPlan(micro, accumulation, world_size, 1, even, least)
