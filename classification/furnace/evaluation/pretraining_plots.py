"""Pictures of a self-supervised training as PNG files: its curves, what it is shown, and its patch features."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from furnace.evaluation.plots import PALETTE, STYLE, new_figure, save_figure
from furnace.runtime import files

COLUMNS = 3
MARKED = 30  # epochs up to which every point is marked
GAP, HEADING, FONT = 8, 24, 13  # pixels
PAPER, INK = (255, 255, 255), (34, 34, 34)
HIDDEN = (128, 128, 128)  # a patch that the student does not see
SHOWN = 160  # pixels that a picture has at least, where it can be enlarged by a whole number


class Panel(NamedTuple):
    """A plot of the log's values.

    Attributes:
        title: above it.
        keys: of log.txt.
        always: drawn as empty where the log has none of them.
        hint: what to look for, small below.
        limits: of the y axis.
    """

    title: str
    keys: tuple[str, ...]
    always: bool = False
    hint: str = ""
    limits: tuple[float, float] | None = None


PANELS = (
    Panel("loss and its larger parts", ("train_loss", "train_dino", "train_ibot")),
    Panel("label loss", ("train_label",)),
    Panel("KoLeo (spread of the class tokens)", ("train_koleo",)),
    Panel("the teacher's assignments, entropy / ln K", ("train_teacher_marginal_entropy",
                                                        "train_teacher_assignment_entropy"),
          hint="lines that meet after the start: collapse", limits=(-0.03, 1.03)),
    Panel("k-NN of the teacher on val", ("val_knn_acc", "val_knn_bacc"), always=True),
    Panel("effective rank of val's features", ("val_feature_rank",), always=True),
    Panel("learning rate", ("lr",)),
    Panel("teacher momentum", ("ema",)),
    Panel("teacher temperature", ("teacher_temperature",)),
)


def plot_pretraining(path: Path, history: Sequence[dict[str, Any]]) -> Figure:
    """Losses, signs of collapse, k-NN and schedules over the epochs, a panel each.

    Args:
        path: the PNG.
        history: log.txt's entries: epoch (from 0) and any keys of PANELS. A value may be absent, None or NaN (val is
            not evaluated in every epoch): the line joins the others.
    """
    panels = [panel for panel in PANELS
              if panel.always or any(_points(history, key)[0] for key in panel.keys)]
    rows = math.ceil(len(panels) / COLUMNS)
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(13.0, 3.3 * rows, nrows=rows, ncols=COLUMNS, squeeze=False)
        for place, panel in zip(axes.flat, panels, strict=False):
            _draw_panel(place, history, panel)
        for place in axes.flat[len(panels):]:
            place.remove()
        return save_figure(figure, path)


def _points(history: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Epochs (from 1) and values, where the value is finite."""
    found = [(entry["epoch"] + 1, entry[key]) for entry in history
             if entry.get(key) is not None and math.isfinite(entry[key])]
    return [epoch for epoch, _ in found], [value for _, value in found]


def _draw_panel(axes: Axes, history: Sequence[dict[str, Any]], panel: Panel) -> None:
    drawn = 0
    for key, colour in zip(panel.keys, PALETTE, strict=False):
        epochs, values = _points(history, key)
        if not epochs:
            continue
        axes.plot(epochs, values, color=colour, linewidth=1.8, marker="o", markersize=4 if len(epochs) <= MARKED else 0,
                  label=key.removeprefix("train_").removeprefix("val_").replace("_", " "))
        drawn += 1
    if not drawn:
        axes.text(0.5, 0.5, "not evaluated", transform=axes.transAxes, ha="center", color="#777777")
        axes.set(xticks=[], yticks=[])
    if drawn and len(panel.keys) > 1:
        axes.legend()
    if drawn and panel.hint:
        axes.text(0.02, 0.03, panel.hint, transform=axes.transAxes, fontsize=8, color="#606060")
    axes.set(xlabel="epoch", title=panel.title)
    if drawn:
        first, last = history[0]["epoch"] + 1, history[-1]["epoch"] + 1
        margin = max(0.02 * (last - first), 0.5)
        axes.set_xlim(first - margin, last + margin)  # the same for all panels, also of values that begin later
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useOffset=False)
    if panel.limits:
        axes.set_ylim(panel.limits)
    axes.grid(color="#EBEBEB")


# ----------------------------------------------------------------------------------------------------------- pictures

def draw_crops(path: Path, globals: torch.Tensor, locals: torch.Tensor | None, masks: torch.Tensor | None, *,
               mean: Sequence[float], std: Sequence[float], patch_size: int, images: int = 6) -> None:
    """What the student is shown: a row per image with its two global crops, hidden patches grey, and its local crops.

    Crops are drawn pixel by pixel; small ones are enlarged by a whole number, all by the same.

    Args:
        path: the PNG.
        globals: (2, B, 3, G, G), normalised.
        locals: (L, B, 3, l, l), or None.
        masks: (2, B, N) bool over the patches of a global crop, row by row, or None.
        mean: of the normalisation.
        std: of the normalisation.
        patch_size: side of a patch in pixels.
        images: rows at most.

    Raises:
        ValueError: shapes that do not belong together.
        OutputError: ``path`` cannot be written.
    """
    views, side = globals.shape[0], globals.shape[-1]
    grid = side // patch_size
    if masks is not None and tuple(masks.shape) != (views, globals.shape[1], grid * grid):
        raise ValueError(f"masks of shape {tuple(masks.shape)} for crops of shape {tuple(globals.shape)} in patches of "
                         f"{patch_size} pixels")
    if locals is not None and (not len(locals) or locals.shape[1] != globals.shape[1]):
        raise ValueError(f"local crops of shape {tuple(locals.shape)} for {globals.shape[1]} images")
    scale = max(1, round(SHOWN / side))
    rows = []
    for i in range(min(images, globals.shape[1])):
        large = [_enlarge(_pixels(crop, mean, std), scale) for crop in globals[:, i]]
        for picture, mask in zip(large, () if masks is None else masks[:, i], strict=False):
            hidden = _enlarge(mask.cpu().numpy().reshape(grid, grid), patch_size * scale)
            picture[:len(hidden), :len(hidden)][hidden] = HIDDEN
        small = [] if locals is None else [_enlarge(_pixels(crop, mean, std), scale) for crop in locals[:, i]]
        rows.append((large, small))
    words = "global crops" + ("" if masks is None else ", patches hidden from the student grey")
    _save_rows(path, [_row(large, small) for large, small in rows],
               words + ("" if locals is None else "; local crops"))


def _row(large: list[np.ndarray], small: list[np.ndarray]) -> np.ndarray:
    """Large pictures side by side, small ones behind them in as many lines as fit beside a large one."""
    parts = large
    if small:
        lines = max(1, (len(large[0]) + GAP) // (len(small[0]) + GAP))
        columns = math.ceil(len(small) / lines)
        parts = [*large, _stack([_stack(small[start:start + columns], axis=1)
                                 for start in range(0, len(small), columns)], axis=0)]
    return _stack(parts, axis=1)


def draw_patch_pca(path: Path, images: torch.Tensor, tokens: torch.Tensor, *, grid: tuple[int, int],
                   mean: Sequence[float], std: Sequence[float]) -> None:
    """The first three principal components of the patch features as red, green and blue, beside each picture.

    Patches of one colour are alike to the model, within an image and between the images.

    Args:
        path: the PNG.
        images: (B, 3, H, W), normalised.
        tokens: (B, rows * columns, D) patch features.
        grid: rows and columns of patches.
        mean: of the normalisation.
        std: of the normalisation.

    Raises:
        ValueError: shapes that do not belong together, or features that are not finite.
        OutputError: ``path`` cannot be written.

    Source: Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", 2024, figure 1 (there without
    the background).
    """
    count, (height, width) = len(images), images.shape[2:]
    if tokens.ndim != 3 or tuple(tokens.shape[:2]) != (count, grid[0] * grid[1]):
        raise ValueError(f"tokens of shape {tuple(tokens.shape)} for {count} images in {grid[0]} x {grid[1]} patches")
    colours, shares = patch_colours(tokens)
    scale = max(1, round(SHOWN / max(height, width)))
    rows = []
    for image, colour in zip(images, colours, strict=True):
        patches = Image.fromarray(colour.reshape(*grid, 3))
        features = np.array(patches.resize((width * scale, height * scale), Image.Resampling.NEAREST))
        rows.append(_stack([_enlarge(_pixels(image, mean, std), scale), features], axis=1))
    half = math.ceil(len(rows) / 2) if len(rows) > 3 else len(rows)  # two columns of pairs
    pairs = [_stack(rows[i::half], axis=1) for i in range(half)]
    parts = [f"{name} {share:.0%}" for name, share in zip(("red", "green", "blue"), shares, strict=True)]
    _save_rows(path, pairs, f"pictures, and principal components of their patches: {', '.join(parts)} of the variance")


def patch_colours(tokens: torch.Tensor) -> tuple[np.ndarray, list[float]]:
    """Features as colours by their three principal components.

    Each component is cut at its 1st and 99th percentile over all images and stretched to 0..255. Its sign is chosen so
    that the loading of largest size is positive: the same features give the same colours. A component without any
    variance is 128.

    Args:
        tokens: (B, N, D).

    Returns:
        (B, N, 3) uint8, and the share of the variance of each component (0 where there is none).

    Raises:
        ValueError: a feature is not finite.
    """
    rows = tokens.detach().cpu().double().flatten(0, 1)  # (B, N, D) -> (B * N, D)
    if not rows.isfinite().all():
        raise ValueError("the patch features hold NaN or infinity: the training has diverged")
    rows = rows - rows.mean(dim=0)
    variances, directions = torch.linalg.eigh(rows.T @ rows)  # ascending
    total = float(variances.clamp(min=0).sum())
    colours, shares = np.full((len(rows), 3), 128, dtype=np.uint8), [0.0, 0.0, 0.0]
    for i in range(min(3, rows.shape[1])):
        if variances[-1 - i] <= 1e-12 * max(total, 1e-12):
            break
        direction = directions[:, -1 - i]
        values = (rows @ direction * direction[direction.abs().argmax()].sign()).numpy()
        low, high = np.percentile(values, (1, 99))
        if high <= low:  # nearly all patches are alike
            low, high = values.min(), values.max()
        colours[:, i] = np.round(255 * ((values - low) / (high - low)).clip(0, 1))
        shares[i] = float(variances[-1 - i]) / total
    return colours.reshape(*tokens.shape[:2], 3), shares


def _pixels(image: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """(3, H, W) normalised to (H, W, 3) uint8."""
    scale, middle = (torch.tensor(values, dtype=torch.float32).view(3, 1, 1) for values in (std, mean))
    return ((image.detach().cpu().float() * scale + middle) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def _enlarge(picture: np.ndarray, times: int) -> np.ndarray:
    return picture.repeat(times, axis=0).repeat(times, axis=1)


def _stack(pictures: Sequence[np.ndarray], *, axis: int) -> np.ndarray:
    """Below (0) or beside (1) each other with gaps, white where one is smaller."""
    across = max(picture.shape[1 - axis] for picture in pictures)
    length = sum(picture.shape[axis] for picture in pictures) + GAP * (len(pictures) - 1)
    sheet = np.full((length, across, 3) if axis == 0 else (across, length, 3), PAPER[0], dtype=np.uint8)
    start = 0
    for picture in pictures:
        height, width = picture.shape[:2]
        top, left = (start, 0) if axis == 0 else (0, start)
        sheet[top:top + height, left:left + width] = picture
        start += picture.shape[axis] + GAP
    return sheet


def _save_rows(path: Path, rows: Sequence[np.ndarray], title: str) -> None:
    """Rows below each other under a line of text, white round them."""
    pictures = _stack(rows, axis=0)
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), FONT)
    width = max(pictures.shape[1], math.ceil(font.getlength(title))) + 2 * GAP
    sheet = Image.new("RGB", (width, pictures.shape[0] + HEADING + 2 * GAP), PAPER)
    ImageDraw.Draw(sheet).text((GAP, GAP), title, INK, font)
    sheet.paste(Image.fromarray(pictures), (GAP, GAP + HEADING))
    with files.atomic_write(path) as file:
        sheet.save(file, "PNG")
