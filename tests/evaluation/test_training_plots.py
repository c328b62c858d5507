"""The learning curve: what its lines hold."""

import math

from PIL import Image

from furnace.evaluation.training_plots import plot_learning_curve

HISTORY = [{"epoch": 0, "train_loss": 2.0, "val_loss": 1.9, "val_acc": 0.5, "val_bacc": 0.3, "val_auroc": 0.7,
            "lr": 0.1},
           {"epoch": 1, "train_loss": 1.0, "val_loss": 1.5, "val_acc": 0.6, "val_bacc": None, "val_auroc": 0.8,
            "lr": 0.05}]


def lines(axes) -> dict:
    """Label -> (x, y)."""
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


def test_lines_are_the_log(tmp_path) -> None:
    """Losses, the monitored metric first, the rate; the chosen epoch upright; epochs from 1; a gap where undefined."""
    figure = plot_learning_curve(tmp_path / "plots" / "curve.png", HISTORY, best_epoch=1, monitor="auroc")
    loss, metrics, rate = (lines(axes) for axes in figure.axes)
    assert loss["train loss"] == ([1, 2], [2.0, 1.0]) and loss["val loss"] == ([1, 2], [1.9, 1.5])
    named = [label for label in metrics if not label.startswith("_")]
    assert named == ["val auroc", "val acc", "val bacc"] and metrics["val auroc"] == ([1, 2], [0.7, 0.8])
    assert metrics["val bacc"][1][0] == 0.3 and math.isnan(metrics["val bacc"][1][1])
    assert ([1, 2], [0.1, 0.05]) in rate.values()
    for axes in figure.axes:
        assert [2, 2] in [list(line.get_xdata()) for line in axes.get_lines()]
    assert figure.axes[1].get_title(loc="left") == "metrics of val; chosen: epoch 2 by auroc"
    assert Image.open(tmp_path / "plots" / "curve.png").size[0] > 1000


def test_without_val(tmp_path) -> None:
    """Says so, and draws what there is."""
    figure = plot_learning_curve(tmp_path / "curve.png", [{"epoch": 0, "train_loss": 2.0, "lr": 0.1}], best_epoch=0)
    assert "not evaluated" in [text.get_text() for text in figure.axes[1].texts]
    assert list(lines(figure.axes[0]))[0] == "train loss"
    assert figure.axes[1].get_title(loc="left") == "metrics of val; chosen: epoch 1, the last"
