"""The learning curve of a training as a PNG file."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from furnace.evaluation.plots import PALETTE, STYLE, new_figure, save_figure


def plot_learning_curve(path: Path, history: Sequence[dict[str, Any]], *, best_epoch: int | None = None,
                        monitor: str | None = None, metrics: Sequence[str] = ("acc", "bacc", "auroc")) -> Figure:
    """Losses, val metrics and learning rate over the epochs, a panel each; the chosen epoch as an upright line.

    Args:
        path: the PNG.
        history: log.txt's entries: epoch (from 0), train_loss, lr, and val_loss, val_<metric> where val was evaluated.
        best_epoch: the chosen epoch, from 0.
        monitor: the metric it was chosen by; drawn first and thicker.
        metrics: drawn where the history has them.
    """
    shown = [*([monitor] if monitor and monitor != "loss" else []), *(name for name in metrics if name != monitor)]
    epochs = [entry["epoch"] + 1 for entry in history]
    with matplotlib.rc_context(STYLE):
        figure, panels = new_figure(13.0, 3.9, ncols=3)
        _draw(panels[0], history, epochs, ["train_loss", "val_loss"], "loss", thick=None)
        _draw(panels[1], history, epochs, [f"val_{name}" for name in shown], "metrics of val", thick=f"val_{monitor}")
        _draw(panels[2], history, epochs, ["lr"], "learning rate (highest layer)", thick=None)
        panels[2].ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
        for axes in panels:
            if best_epoch is not None:
                axes.axvline(best_epoch + 1, color="#555555", linewidth=1, linestyle=":")
        if best_epoch is not None:
            panels[1].set_title(f"metrics of val; chosen: epoch {best_epoch + 1}"
                                + (f" by {monitor}" if monitor else ", the last"))
        return save_figure(figure, path)


def _draw(axes: Axes, history: Sequence[dict[str, Any]], epochs: list[int], names: Sequence[str], title: str, *,
          thick: str | None) -> None:
    """Lines with points; a value that is not defined leaves a gap."""
    drawn = 0
    for name, colour in zip(names, PALETTE, strict=False):
        values = [math.nan if entry.get(name) is None else entry[name] for entry in history]
        if all(map(math.isnan, values)):
            continue
        axes.plot(epochs, values, color=colour, linewidth=2.4 if name == thick else 1.6, marker="o",
                  markersize=4 if len(epochs) <= 30 else 0, label=name.replace("_", " "))
        drawn += 1
    if not drawn:
        axes.text(0.5, 0.5, "not evaluated", transform=axes.transAxes, ha="center", color="#777777")
    elif len(names) > 1:
        axes.legend()
    axes.set(xlabel="epoch", title=title)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(color="#EBEBEB")
