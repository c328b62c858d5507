"""Live curves of a training elsewhere than in log.txt: Weights & Biases and TensorBoard, only when asked for."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from furnace.runtime import distributed
from furnace.runtime.files import UserError


@contextlib.contextmanager
def tracking(*, folder: Path, run_id: str, config: dict[str, Any], wandb_project: str | None = None,
             run_name: str | None = None, notes: str | None = None, tags: Sequence[str] = (),
             tensorboard: Path | None = None
             ) -> Iterator[Callable[[dict[str, Any]], None] | None]:
    """Open what was asked for; a resumed run goes on with its curves.

    Args:
        folder: where wandb keeps its files.
        run_id: the same for the same run.
        config: plain options shown beside the curves.
        wandb_project: None leaves wandb out.
        run_name: what wandb calls the run.
        notes: on the run, for wandb.
        tags: of the run, for wandb.
        tensorboard: folder of its event files; None leaves it out.

    Yields:
        A function that takes an entry of the log (its numbers by name), or None when nothing was asked for.
    """
    if not distributed.is_main() or (wandb_project is None and tensorboard is None):
        yield None
        return
    with contextlib.ExitStack() as stack:
        sinks = []
        if wandb_project is not None:
            try:
                import wandb
            except ImportError as error:
                raise UserError("--wandb needs Weights & Biases: pip install wandb") from error
            run = wandb.init(project=wandb_project, name=run_name, id=run_id, resume="allow", config=config,
                             notes=notes, tags=tags, dir=str(folder))
            stack.callback(run.finish)
            sinks.append(lambda entry: run.log(entry, step=entry["update"]))
        if tensorboard is not None:
            writer = _event_writer(tensorboard)
            stack.callback(writer.close)
            sinks.append(lambda entry: [writer.add_scalar(name, value, entry["update"])
                                        for name, value in entry.items()])

        def track(entry: dict[str, Any]) -> None:
            numbers = {name: value for name, value in entry.items() if isinstance(value, int | float)}
            for sink in sinks:
                sink(numbers)

        yield track


def _event_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--log_dir needs TensorBoard: pip install -e '.[plots]'") from error
    return SummaryWriter(log_dir=str(folder))
