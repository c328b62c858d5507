"""Plots: what is drawn, held against scikit-learn and hand calculation, and readable sizes."""

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn import metrics as sk

from furnace.evaluation import plots
from furnace.evaluation.metrics import classification_metrics

LONG = ["melanoma in situ arising in a congenital melanocytic nevus of the trunk", "Bowen disease (squamous cell "
        "carcinoma in situ)", "_underscore first", "price in $x$"]


def some_predictions(k: int, n: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Every class occurs; better than chance."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(k), rng.integers(0, k, n - k)])
    logits = rng.normal(size=(n, k)) + 1.5 * np.eye(k)[labels]
    return labels, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def texts(axes) -> list[str]:
    """The legend's entries, of the axes or outside."""
    legends = [axes.get_legend(), *axes.figure.legends]
    return [text.get_text() for legend in legends if legend is not None for text in legend.get_texts()]


@pytest.mark.parametrize("k", [2, 7, 25])
def test_classification_plots(tmp_path, k: int) -> None:
    """Four PNG files of a sensible size, for few and many classes and long names."""
    labels, p = some_predictions(k)
    names = (LONG * 7)[:k] if k > 2 else LONG[:2]
    paths = plots.draw_classification_plots(tmp_path / "new", labels, p, names, p)
    assert [path.name for path in paths] == ["confusion.png", "roc.png", "precision_recall.png", "reliability.png"]
    for path in paths:
        with Image.open(path) as image:
            assert image.format == "PNG" and 500 <= min(image.size) and max(image.size) <= 1600, (path, image.size)
            pixels = np.asarray(image.convert("L"))
        assert (pixels < 255).mean() > 0.01, "nothing is drawn"
        for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
            assert (edge == 255).all(), f"{path} is cut off: something reaches its edge"


def test_confusion_draws_the_counts(tmp_path) -> None:
    """Rows are true classes; the colour is the share of the row, an empty row is blank."""
    labels = np.array([0, 0, 0, 0, 1, 1, 3])
    predicted = np.array([0, 0, 0, 1, 1, 2, 2])
    figure = plots.plot_confusion(tmp_path / "c.png", labels, np.eye(4)[predicted], ["a", "b", "c", "d"])
    axes = figure.axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.75, 0.25, 0, 0], [0, 0.5, 0.5, 0], [0, 0, 0, 0],
                                                            [0, 0, 1, 0]])
    drawn = {tuple(map(int, text.get_position()[::-1])): text.get_text() for text in axes.texts}
    assert drawn == {(0, 0): "3\n75%", (0, 1): "1\n25%", (1, 1): "1\n50%", (1, 2): "1\n50%", (3, 2): "1\n100%"}
    assert [t.get_text() for t in axes.get_yticklabels()] == ["a (4)", "b (2)", "c (0)", "d (1)"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["a", "b", "c", "d"]
    assert axes.get_title(loc="left") == "4 of 7 correct (57.1%)"


def test_percent_is_exact_at_the_ends() -> None:
    """1 of 1,000 is not 0 %."""
    assert [plots._percent(x) for x in (0, 0.001, 0.5, 0.999, 1)] == ["0%", "<1%", "50%", ">99%", "100%"]


@pytest.mark.parametrize("k", [2, 5])
def test_curves_are_scikit_learns(k: int) -> None:
    """Points, areas, and the macro average's area, which is the metric's."""
    labels, p = some_predictions(k)
    metrics = classification_metrics(labels, p)
    roc, pr = plots.roc_curves(labels, p), plots.precision_recall_curves(labels, p)
    assert [curve.label for curve in roc] == ([1] if k == 2 else list(range(k)))
    for curve in roc:
        x, y, _ = sk.roc_curve(labels == curve.label, p[:, curve.label])
        np.testing.assert_array_equal((curve.x, curve.y), (x, y))
        assert curve.area == pytest.approx(sk.roc_auc_score(labels == curve.label, p[:, curve.label]), abs=1e-12)
    for curve in pr:
        assert curve.area == pytest.approx(sk.average_precision_score(labels == curve.label, p[:, curve.label]))
        assert (np.diff(curve.x) * curve.y[1:]).sum() == pytest.approx(curve.area, abs=1e-12), "the steps' own area"
        assert (np.diff(curve.x) > 0).all() and curve.x[0] == 0 and curve.x[-1] == 1
    macro = plots.macro_average(roc, steps=False)
    assert macro.area == pytest.approx(metrics["auroc_ovr"], abs=1e-12)
    assert sk.auc(macro.x, macro.y) == pytest.approx(macro.area, abs=2e-3)
    macro = plots.macro_average(pr, steps=True)
    assert macro.area == pytest.approx(metrics["aupr"], abs=1e-12)
    assert (np.diff(macro.x) * macro.y[1:]).sum() == pytest.approx(macro.area, abs=2e-3)


def test_absent_class_has_no_curve(tmp_path) -> None:
    """No 0, no average; the legend says so."""
    labels, p = some_predictions(4)
    p, labels = p[labels != 2], labels[labels != 2]
    curves = plots.roc_curves(labels, p)
    assert np.isnan(curves[2].area) and len(curves[2].x) == 0 and plots.macro_average(curves, steps=False) is None
    for draw in (plots.plot_roc, plots.plot_precision_recall):
        entries = texts(draw(tmp_path / "r.png", labels, p, list("abcd")).axes[0])
        assert entries[-1] == "undefined  c" and len(entries) == 4 and not any("mean" in entry for entry in entries)


@pytest.mark.parametrize("draw,area", [(plots.plot_roc, sk.roc_auc_score),
                                       (plots.plot_precision_recall, sk.average_precision_score)])
def test_curves_are_drawn_with_their_names(tmp_path, draw, area) -> None:
    """Line by line: data, colour, legend with the area."""
    labels, p = some_predictions(4)
    axes = draw(tmp_path / "r.png", labels, p, LONG).axes[0]
    areas = [area(labels == k, p[:, k]) for k in range(4)]
    entries = texts(axes)
    assert entries[0] == f"{np.mean(areas):.3f}  mean of the 4 classes"
    for k in range(4):
        assert entries[k + 1].startswith(f"{areas[k]:.3f}  {LONG[k][:8]}")
    lines = {line.get_label(): line for line in axes.lines}
    assert [lines[entry].get_color() for entry in entries] == ["black", *plots.PALETTE[:4]]
    curves = (plots.roc_curves if draw is plots.plot_roc else plots.precision_recall_curves)(labels, p)
    np.testing.assert_array_equal(lines[entries[3]].get_xydata(), np.transpose([curves[2].x, curves[2].y]))


def test_many_classes_name_the_worst(tmp_path) -> None:
    """Five in colour, the other twenty in one grey entry with their range."""
    labels, p = some_predictions(25, n=800)
    names = [f"class {k}" for k in range(25)]
    entries = texts(plots.plot_roc(tmp_path / "r.png", labels, p, names).axes[0])
    areas = [sk.roc_auc_score(labels == k, p[:, k]) for k in range(25)]
    worst = np.argsort(areas)
    assert entries[1:6] == [f"{areas[k]:.3f}  class {k}" for k in worst[:5]]
    assert entries[6] == f"{areas[worst[5]]:.3f} to {areas[worst[-1]]:.3f}  20 others" and len(entries) == 7


def test_binary_precision_recall_shows_the_base_rate(tmp_path) -> None:
    """The dotted line is the share of class 1."""
    labels, p = some_predictions(2)
    axes = plots.plot_precision_recall(tmp_path / "r.png", labels, p, ["no", "yes"]).axes[0]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), labels.mean())
    assert texts(axes) == [f"{sk.average_precision_score(labels, p[:, 1]):.3f}  yes"]


def test_reliability_draws_bins_and_histogram(tmp_path) -> None:
    """Two bins by hand: accuracy, intervals, shares, and the metric's ECE; the calibrated ones beside them."""
    p = np.repeat([[0.9, 0.1], [0.6, 0.4]], [10, 10], axis=0)
    labels = np.array([0] * 8 + [1] * 2 + [0] * 5 + [1] * 5)
    figure = plots.plot_reliability(tmp_path / "r.png", labels, p)
    axes, below = figure.axes
    ece = classification_metrics(labels, p)["ece"]
    assert ece == pytest.approx(0.1) and texts(axes) == ["model: ECE 0.100"]
    (container,) = axes.containers
    np.testing.assert_allclose(container.lines[0].get_xydata(), [[0.6, 0.5], [0.9, 0.8]])
    segments = np.array(container.lines[2][0].get_segments())
    np.testing.assert_allclose(segments[0][:, 1], [0.2366, 0.7634], atol=1e-4)  # Wilson, 5 of 10
    np.testing.assert_allclose(segments[1][:, 1], [0.4902, 0.9433], atol=1e-4)  # 8 of 10
    heights = {round(bar.get_x(), 3): bar.get_height() for bar in below.patches if bar.get_height()}
    assert heights == {round(8 / 15, 3): 0.5, round(13 / 15, 3): 0.5}
    soft = np.repeat([[0.8, 0.2], [0.5001, 0.4999]], [10, 10], axis=0)
    axes, below = plots.plot_reliability(tmp_path / "r.png", labels, p, soft).axes
    assert texts(axes) == ["as predicted: ECE 0.100", "temperature-scaled: ECE 0.000"]
    assert len(below.containers) == 2


def test_label_efficiency(tmp_path) -> None:
    """Mean, one SD (n - 1), points, a logarithmic axis in per cent; one seed has no band; NaN left out."""
    table = pd.DataFrame({"percent_data": [0.1, 0.1, 0.1, 1.0, 0.1], "seed": [0, 1, 2, 0, 3],
                          "bacc": [0.5, 0.6, 0.7, 0.8, np.nan], "auroc": [0.8, 0.8, 0.8, 0.9, 0.8]})
    figure = plots.plot_label_efficiency(tmp_path / "l.png", table)
    left, right = figure.axes
    np.testing.assert_allclose(left.lines[0].get_xydata(), [[10, 0.6], [100, 0.8]])
    band = left.collections[0].get_paths()[0].vertices
    assert {(10.0, 0.5), (10.0, 0.7), (100.0, 0.8)} == {tuple(v) for v in band.round(9).tolist()}
    np.testing.assert_allclose(np.sort(left.collections[1].get_offsets()[:, 1]), [0.5, 0.6, 0.7, 0.8])
    assert left.get_xscale() == "log" and [t.get_text() for t in left.get_xticklabels()] == ["10", "100"]
    assert left.get_ylabel() == "bacc" and right.get_ylabel() == "auroc"
    assert "1 to 3 seeds" in left.get_title(loc="left") and "1 to 4 seeds" in right.get_title(loc="left")
    only = plots.plot_label_efficiency(tmp_path / "l.png", table, metrics=("auroc",))
    assert len(only.axes) == 1 and Image.open(tmp_path / "l.png").size == (484, 462)


def test_scatter_of_categories(tmp_path) -> None:
    """Every point in its category's colour, missing ones pale, counts in the legend."""
    xy = np.arange(12.0).reshape(6, 2)
    figure = plots.plot_scatter(tmp_path / "s.png", xy, np.array(["b", "a", None, "b", "a", "b"], dtype=object),
                                title="t", column="dx")
    assert texts(figure.axes[0]) == ["2  a", "3  b", "1  missing"]
    assert figure.legends[0].get_title().get_text() == "dx"
    drawn = {}
    for collection in figure.axes[0].collections:
        colours = np.broadcast_to(collection.get_facecolors(), (len(collection.get_offsets()), 4))
        for point, colour in zip(collection.get_offsets(), colours, strict=True):
            drawn[int(point[0] // 2)] = matplotlib.colors.to_hex(colour[:3]).upper()
    a, b = plots.PALETTE[:2]
    assert drawn == {0: b, 1: a, 2: plots.PALE, 3: b, 4: a, 5: b}


def test_scatter_of_numbers(tmp_path) -> None:
    """A colour scale for many values; few whole numbers are categories in order; many categories end in others."""
    rng = np.random.default_rng(0)
    xy = rng.normal(size=(60, 2))
    age = np.where(np.arange(60) < 5, np.nan, np.arange(60.0))
    axes, bar = plots.plot_scatter(tmp_path / "s.png", xy, age, title="t", column="age").axes
    np.testing.assert_array_equal(axes.collections[1].get_array(), age[5:])
    assert bar.get_ylabel() == "age" and axes.get_xlabel() == "pale: missing (5)"
    few = plots.plot_scatter(tmp_path / "s.png", xy, np.arange(60) % 11, title="t", column="label")
    assert [entry.split("  ")[1] for entry in texts(few.axes[0])] == [str(k) for k in range(11)]
    many = plots.plot_scatter(tmp_path / "s.png", xy, np.array([f"c{i % 20:02}" for i in range(60)]), title="",
                              column="")
    assert len(texts(many.axes[0])) == 16 and texts(many.axes[0])[-1] == "15  5 others"
    flags = plots.plot_scatter(tmp_path / "s.png", xy, xy[:, 0] > 0, title="", column="")
    assert [entry.split("  ")[1] for entry in texts(flags.axes[0])] == ["False", "True"]
    plain = plots.plot_scatter(tmp_path / "s.png", xy, None, title="t", column="")
    np.testing.assert_array_equal(plain.axes[0].collections[0].get_offsets(), xy)


def test_names_are_shortened_at_words() -> None:
    """Two lines at most, both ends kept."""
    assert plots._shorten("nevus", 22) == "nevus"
    assert plots._shorten("squamous cell carcinoma", 20) == "squamous cell\ncarcinoma"
    assert plots._shorten(LONG[0], 22) == "melanoma in situ\n… nevus of the trunk"
    assert all(len(line) <= 22 for line in plots._shorten("x" * 200, 22).split("\n"))


def test_colours_differ_for_the_colour_blind() -> None:
    """CIE76 distance of every two colours under simulated deuteranopia and protanopia (Machado et al. 2009)."""
    matrices = {"normal": np.eye(3),
                "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                                 [-0.011820, 0.042940, 0.968881]],
                "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                               [-0.003882, -0.048116, 1.051998]]}
    rgb = np.array([matplotlib.colors.to_rgb(colour) for colour in (*plots.PALETTE, "#000000")])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    for name, matrix in matrices.items():
        xyz = np.clip(linear @ np.transpose(matrix), 0, 1) @ to_xyz.T / [0.9505, 1, 1.089]
        f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)
        distance = np.linalg.norm(lab[:, None] - lab[None], axis=-1) + 999 * np.eye(len(lab))
        assert distance.min() > 15, (name, distance.min())


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    """Through atomic_write: the older file stays."""
    from furnace.runtime.files import OutputError
    (tmp_path / "file").write_text("x")
    labels, p = some_predictions(2)
    with pytest.raises(OutputError, match="is a file"):
        plots.plot_roc(tmp_path / "file" / "roc.png", labels, p, ["a", "b"])
    assert (tmp_path / "file").read_text() == "x"
