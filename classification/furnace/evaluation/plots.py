"""Plots of an evaluation as PNG files: confusion matrix, ROC, precision-recall, reliability, label efficiency, scatter.

Every ``plot_*`` writes one file and returns the matplotlib Figure it drew. No pyplot: nothing global, no display.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn import metrics as sk

from furnace.evaluation.calibration import reliability_bins
from furnace.runtime import files

DPI = 110
# Okabe & Ito's colours without yellow (too pale on white) and black (kept for averages), wine and grey-brown besides;
# every second class has a dashed line, so that neighbours differ without colour, too
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#882255", "#7F6F3F")
PALE = "#C8C8C8"
CELLS = ((10, 0.8, 9), (40, 0.4, 7.5), (10_000, 0.16, 0))  # most classes, inches, font size of the counts (0: none)
LABELLED_WORST = 5  # with more classes than colours, only the worst ones are named
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11,
         "legend.frameon": False, "legend.fontsize": 9, "text.parse_math": False, "axes.titlelocation": "left"}


class Curve(NamedTuple):
    """A class against the rest; ``area`` is the AUROC or the average precision, NaN (x, y empty) when undefined."""

    label: int
    x: np.ndarray
    y: np.ndarray
    area: float


def draw_classification_plots(folder: Path, y_true: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str],
                              calibrated: np.ndarray | None = None) -> list[Path]:
    """Write confusion.png, roc.png, precision_recall.png and reliability.png.

    Args:
        folder: is made when absent.
        y_true: (N,) integers in 0..K-1.
        probabilities: (N, K).
        class_names: K names.
        calibrated: (N, K) after temperature scaling, drawn as a second line of the reliability diagram.

    Returns:
        The four paths.
    """
    folder = Path(folder)
    paths = [folder / f"{name}.png" for name in ("confusion", "roc", "precision_recall", "reliability")]
    plot_confusion(paths[0], y_true, probabilities, class_names)
    plot_roc(paths[1], y_true, probabilities, class_names)
    plot_precision_recall(paths[2], y_true, probabilities, class_names)
    plot_reliability(paths[3], y_true, probabilities, calibrated)
    return paths


def plot_confusion(path: Path, y_true: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]) -> Figure:
    """Counts as text, the share of the true class as colour (and in per cent where there is room)."""
    k = len(class_names)
    counts = sk.confusion_matrix(y_true, probabilities.argmax(axis=1), labels=range(k))
    of_class = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, of_class, out=np.zeros((k, k)), where=of_class > 0)
    cell, letters = next((inches, points) for most, inches, points in CELLS if k <= most)
    cell = max(cell, 3.4 / k)
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(3.2 + cell * k, 2 + cell * k)
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for i, j in np.argwhere(counts) if letters else ():
            text = f"{counts[i, j]}\n{_percent(shares[i, j])}" if cell >= 0.8 else f"{counts[i, j]}"
            axes.text(j, i, text, ha="center", va="center", fontsize=letters, in_layout=False,
                      color="white" if shares[i, j] > 0.55 else "black")
        names = [_shorten(name, 22) if letters else _shorten(name, 22).replace("\n", " ") for name in class_names]
        rows = [f"{name} ({n})" for name, n in zip(names, of_class[:, 0], strict=True)]
        upright = max(len(line) for name in names for line in name.split("\n")) > 11 * cell  # letters per inch
        axes.set_xticks(range(k), names, rotation=90 if upright else 0)
        axes.set_yticks(range(k), rows)
        axes.set(xlabel="predicted class", ylabel="true class (number)")
        axes.spines[:].set_visible(False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks(np.arange(k + 1) - 0.5, minor=True)
            axis.grid(which="minor", color="#DDDDDD", linewidth=0.8)
        axes.tick_params(which="both", length=0, labelsize=STYLE["font.size"] if letters else 7)
        axes.set_title(f"{np.trace(counts)} of {counts.sum()} correct ({np.trace(counts) / counts.sum():.1%})")
        figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8, aspect=25, format="{x:.0%}")
        return save_figure(figure, path)


def roc_curves(y_true: np.ndarray, probabilities: np.ndarray) -> list[Curve]:
    """Each class against the rest (binary: class 1 alone), x the false and y the true positive rate."""
    curves = []
    for k, positive, score in _one_vs_rest(y_true, probabilities):
        if not 0 < positive.sum() < len(positive):
            curves.append(Curve(k, np.empty(0), np.empty(0), np.nan))
            continue
        x, y, _ = sk.roc_curve(positive, score)
        curves.append(Curve(k, x, y, float(sk.auc(x, y))))
    return curves


def precision_recall_curves(y_true: np.ndarray, probabilities: np.ndarray) -> list[Curve]:
    """Each class against the rest (binary: class 1 alone), x the recall, rising, and y the precision.

    The curve is a step function: y[i] holds on (x[i-1], x[i]], and its area is the average precision.
    """
    curves = []
    for k, positive, score in _one_vs_rest(y_true, probabilities):
        if not positive.any():
            curves.append(Curve(k, np.empty(0), np.empty(0), np.nan))
            continue
        precision, recall, _ = sk.precision_recall_curve(positive, score)
        x, first = np.unique(recall[::-1], return_index=True)  # of one recall, the highest threshold's precision
        curves.append(Curve(k, x, precision[::-1][first], float(sk.average_precision_score(positive, score))))
    return curves


def macro_average(curves: Sequence[Curve], *, steps: bool) -> Curve | None:
    """The mean of the curves at each x (label -1), its area the mean of theirs; None where a class has no curve."""
    if any(np.isnan(curve.area) for curve in curves):
        return None
    grid = np.linspace(0, 1, 2001)
    rows = [curve.y[np.minimum(np.searchsorted(curve.x, grid - 1e-12), len(curve.x) - 1)] if steps
            else np.interp(grid, curve.x, curve.y) for curve in curves]
    return Curve(-1, grid, np.mean(rows, axis=0), float(np.mean([curve.area for curve in curves])))


def plot_roc(path: Path, y_true: np.ndarray, probabilities: np.ndarray, class_names: Sequence[str]) -> Figure:
    """ROC of each class against the rest, their mean in black, the AUROC in the legend."""
    curves = roc_curves(y_true, probabilities)
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(5.0 if len(curves) == 1 else 8.2, 5.0)
        axes.plot([0, 1], [0, 1], color="#808080", linewidth=1, linestyle=":")
        _draw_curves(axes, curves, class_names, steps=False)
        axes.set(xlabel="1 - specificity", ylabel="sensitivity", title=_title("ROC", "AUROC", curves))
        return save_figure(figure, path)


def plot_precision_recall(path: Path, y_true: np.ndarray, probabilities: np.ndarray,
                          class_names: Sequence[str]) -> Figure:
    """Precision over recall of each class against the rest, their mean in black, average precision in the legend."""
    curves = precision_recall_curves(y_true, probabilities)
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(5.0 if len(curves) == 1 else 8.2, 5.0)
        if len(curves) == 1:
            axes.axhline(np.mean(y_true), color="#808080", linewidth=1, linestyle=":")
            axes.text(1, np.mean(y_true), "share of the class", ha="right", va="bottom", fontsize=8, color="#606060")
        _draw_curves(axes, curves, class_names, steps=True)
        axes.set(xlabel="recall", ylabel="precision", title=_title("Precision and recall", "AP", curves))
        return save_figure(figure, path)


def _one_vs_rest(y_true: np.ndarray, probabilities: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Class, (N,) whether an image is of it, (N,) its probability; of two classes only class 1."""
    k = probabilities.shape[1]
    return [(i, y_true == i, probabilities[:, i]) for i in ([1] if k == 2 else range(k))]


def _title(name: str, area: str, curves: Sequence[Curve]) -> str:
    return f"{name} ({area})" if len(curves) == 1 else f"{name} of each class against the rest ({area})"


def _draw_curves(axes: Axes, curves: Sequence[Curve], class_names: Sequence[str], *, steps: bool) -> None:
    """Lines and legend; with more classes than colours, the worst few in colour before all others in grey."""
    known = [curve for curve in curves if len(curve.x)]
    many = len(known) > len(PALETTE)
    named = sorted(known, key=lambda curve: curve.area)[:LABELLED_WORST] if many else known
    grey = [curve for curve in known if all(curve is not other for other in named)]
    style = {"drawstyle": "steps-pre"} if steps else {}
    handles = []
    macro = macro_average(curves, steps=steps) if len(curves) > 1 else None
    if macro is not None:
        handles += axes.plot(macro.x, macro.y, color="black", linewidth=2.4, zorder=4, **style,
                             label=f"{macro.area:.3f}  mean of the {len(curves)} classes")
    for i, curve in enumerate(named):
        handles += axes.plot(curve.x, curve.y, color=PALETTE[i], linewidth=1.6, linestyle=("-", (0, (5, 1.5)))[i % 2],
                             zorder=3, **style, label=f"{curve.area:.3f}  {_shorten(class_names[curve.label], 26)}")
    for curve in grey:
        line, = axes.plot(curve.x, curve.y, color=PALE, linewidth=1, zorder=1, **style)
    if grey:
        areas = [curve.area for curve in grey]
        line.set_label(f"{min(areas):.3f} to {max(areas):.3f}  {len(grey)} others")
        handles.append(line)
    for curve in curves:
        if not len(curve.x):
            handles += axes.plot([], [], " ", label=f"undefined  {_shorten(class_names[curve.label], 26)}")
    if len(curves) == 1:
        axes.legend(handles=handles, loc="lower left" if steps else "lower right")
    else:
        axes.figure.legend(handles=handles, loc="outside right upper", alignment="left",
                           title=f"the {LABELLED_WORST} worst classes are named" if many else None)
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), box_aspect=1, axisbelow=True)
    axes.grid(color="#EBEBEB")


def plot_reliability(path: Path, y_true: np.ndarray, probabilities: np.ndarray,
                     calibrated: np.ndarray | None = None) -> Figure:
    """Accuracy over confidence with 95 % Wilson intervals, and below it how many images have which confidence."""
    with matplotlib.rc_context(STYLE):
        figure, (axes, below) = new_figure(5.4, 6.2, nrows=2, sharex=True, height_ratios=(3, 1))
        axes.plot([0, 1], [0, 1], color="#808080", linewidth=1, linestyle=":")
        series = [("as predicted" if calibrated is not None else "model", probabilities, PALETTE[0], "o")]
        if calibrated is not None:
            series.append(("temperature-scaled", calibrated, PALETTE[3], "s"))
        for i, (name, values, colour, marker) in enumerate(series):
            bins = reliability_bins(y_true, values)
            total = bins["n"].sum()
            used = bins[bins["n"] > 0]
            ece = (used["n"] * (used["accuracy"] - used["confidence"]).abs()).sum() / total
            low, high = wilson_interval(used["accuracy"].to_numpy(), used["n"].to_numpy())
            errors = [np.maximum(used["accuracy"] - low, 0), np.maximum(high - used["accuracy"], 0)]
            axes.errorbar(used["confidence"], used["accuracy"], yerr=errors, color=colour, marker=marker, markersize=5,
                          linewidth=1.6, elinewidth=0.9, capsize=2, label=f"{name}: ECE {ece:.3f}")
            width = bins["high"] - bins["low"]
            below.bar(bins["low"], bins["n"] / total, width=width, align="edge", fill=i == 0, edgecolor=colour,
                      facecolor=colour if i == 0 else "none", alpha=0.55 if i == 0 else 1, linewidth=1.2)
        axes.set(xlim=(0, 1), ylim=(-0.02, 1.02), ylabel="accuracy", title="Reliability of the predicted class")
        axes.text(0.98, 0.03, "above the dotted line: too cautious\nbelow: too confident", ha="right", fontsize=8,
                  color="#606060")
        axes.legend(loc="upper left")
        axes.grid(color="#EBEBEB")
        below.set(xlabel="confidence (probability of the predicted class)", ylabel="share")
        below.yaxis.set_major_formatter("{x:.0%}")
        return save_figure(figure, path)


def wilson_interval(share: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % limits of a share of n trials (Wilson 1927)."""
    z = 1.959963984540054
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return middle - half, middle + half


def plot_label_efficiency(path: Path, table: pd.DataFrame, metrics: Sequence[str] = ("bacc", "auroc")) -> Figure:
    """Metrics over the share of train images: points per seed, their mean as a line, one SD to each side as a band.

    Args:
        path: the PNG.
        table: a row per run with percent_data (in (0, 1]), seed and a column per metric; NaN is left out.
        metrics: the columns, a panel each.
    """
    with matplotlib.rc_context(STYLE):
        figure, panels = new_figure(4.4 * len(metrics), 4.2, ncols=len(metrics), squeeze=False)
        for axes, name, colour in zip(panels[0], metrics, PALETTE, strict=False):
            runs = table[table[name].notna()]
            groups = runs.groupby("percent_data")[name]
            mean, deviation = groups.mean(), groups.std(ddof=1).fillna(0)  # one seed: no band
            percent = mean.index.to_numpy(dtype=float) * 100
            axes.fill_between(percent, mean - deviation, mean + deviation, color=colour, alpha=0.18, linewidth=0)
            axes.plot(percent, mean, color=colour, linewidth=2)
            axes.scatter(runs["percent_data"] * 100, runs[name], s=20, color=colour, alpha=0.8, linewidth=0, zorder=3)
            axes.set_xscale("log")
            axes.set_xticks(percent, [f"{value:g}" for value in percent])
            axes.minorticks_off()
            seeds = groups.size()
            count = f"{seeds.min()}" if seeds.nunique() <= 1 else f"{seeds.min()} to {seeds.max()}"
            axes.set(xlabel="train images used (%)", ylabel=name,
                     title=f"{name}: mean and SD of {count} seed{'s' if count != '1' else ''}")
            axes.grid(color="#EBEBEB")
        return save_figure(figure, path)


def plot_scatter(path: Path, xy: np.ndarray, values: np.ndarray | None, *, title: str, column: str) -> Figure:
    """Points of a two-dimensional map of features, coloured by a column.

    Args:
        path: the PNG.
        xy: (N, 2).
        values: (N,) text or numbers, or None for points of one colour. Up to 12 different whole numbers are categories
            as text is; other numbers get a colour scale. Missing values are pale.
        title: above the plot.
        column: what the values are, over the legend.
    """
    xy = np.asarray(xy)
    size = float(np.clip(30_000 / max(len(xy), 1), 2, 30))
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(7.4 if values is not None else 5.6, 5.6)
        if values is None:
            axes.scatter(*xy.T, s=size, color=PALETTE[0], alpha=0.7, linewidth=0)
        else:
            _draw_values(axes, xy, pd.Series(np.asarray(values, dtype=object)), size, column)
        axes.set(title=_shorten(title, 60), xticks=[], yticks=[])
        axes.spines[:].set(visible=True, color="#BBBBBB")
        return save_figure(figure, path)


def _draw_values(axes: Axes, xy: np.ndarray, values: pd.Series, size: float, column: str) -> None:
    values = values.map(lambda value: str(value) if isinstance(value, bool | np.bool_) else value)
    numbers = pd.to_numeric(values, errors="coerce").astype(float)
    numeric = values.notna().any() and numbers.notna().sum() == values.notna().sum()
    missing = values.isna().to_numpy()
    if numeric and not (numbers.nunique() <= 12 and (numbers.dropna() % 1 == 0).all()):
        axes.scatter(*xy[missing].T, s=size, color=PALE, linewidth=0)
        drawn = axes.scatter(*xy[~missing].T, s=size, c=numbers[~missing], cmap="viridis", alpha=0.8, linewidth=0)
        axes.figure.colorbar(drawn, ax=axes, label=_shorten(column, 40), shrink=0.8)
        if missing.any():
            axes.set_xlabel(f"pale: missing ({missing.sum()})", loc="left", fontsize=9)
        return
    labels = values.map(lambda value: f"{value:g}" if isinstance(value, float) else str(value)).where(~missing)
    counts = labels.value_counts()
    kept = sorted(counts.index[:16 if len(counts) <= 16 else 15], key=float if numeric else str)  # 8 colours, 2 markers
    order = np.random.default_rng(0).permutation(len(xy))  # no class hides under the next
    handles = [axes.scatter([], [], s=30, color=PALETTE[i % 8], marker="o^"[i // 8],
                            label=f"{counts[label]}  {_shorten(label, 22)}") for i, label in enumerate(kept)]
    other = (~labels.isin(kept)).to_numpy() & ~missing
    for mask, text in ((other, f"{len(counts) - len(kept)} others"), (missing, "missing")):
        if mask.any():
            axes.scatter(*xy[mask].T, s=size, color=PALE, linewidth=0, zorder=1)
            handles.append(axes.scatter([], [], s=30, color=PALE, label=f"{mask.sum()}  {text}"))
    position = labels.map({label: i for i, label in enumerate(kept)}).fillna(-1).astype(int).to_numpy()
    for marker in (0, 1):
        mine = order[(position[order] >= 0) & (position[order] // 8 == marker)]
        axes.scatter(*xy[mine].T, s=size, c=[PALETTE[i % 8] for i in position[mine]], marker="o^"[marker], alpha=0.8,
                     linewidth=0, zorder=2)
    axes.figure.legend(handles=handles, title=_shorten(column, 26), loc="outside right upper", alignment="left")


def _percent(share: float) -> str:
    """Rounded, but 0 % and 100 % only when they are exact."""
    return "<1%" if 0 < share < 0.005 else ">99%" if 0.995 <= share < 1 else f"{share:.0%}"


def _shorten(name: object, width: int) -> str:
    """At most two lines of ``width``; of a longer name the first words and, behind dots, the last ones."""
    lines = textwrap.wrap(str(name), width) or [""]
    if len(lines) <= 2:
        return "\n".join(lines)
    end = textwrap.wrap(str(name)[::-1], width - 2)[0][::-1]
    return f"{lines[0]}\n… {end}"


def new_figure(width: float, height: float, **subplots: Any) -> tuple[Figure, Any]:
    """A figure of so many inches with its axes."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(**subplots)


def save_figure(figure: Figure, path: Path) -> Figure:
    with files.atomic_write(path) as file:
        figure.savefig(file, format="png", metadata={"Software": None})
    return figure
