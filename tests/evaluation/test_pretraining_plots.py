"""Pictures of a pretraining, read back: the lines of the log, pixels of crops, colours of patches."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from furnace.evaluation.pretraining_plots import (
    GAP,
    HEADING,
    HIDDEN,
    draw_crops,
    draw_patch_pca,
    patch_colours,
    plot_pretraining,
)
from furnace.runtime.files import OutputError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TOP = GAP + HEADING  # where the pictures begin
FULL = {"train_loss": 12.0, "train_dino": 7.0, "train_ibot": 5.0, "train_koleo": -0.02, "train_label": 0.3,
        "train_teacher_marginal_entropy": 0.9, "train_teacher_assignment_entropy": 0.4, "val_knn_acc": 0.7,
        "val_knn_bacc": 0.5, "val_feature_rank": 80.0, "lr": 2e-4, "ema": 0.994, "teacher_temperature": 0.05}


def log(epochs: int, **changes) -> list[dict]:
    """Entries whose values fall by a tenth an epoch; a change is a function of the epoch."""
    return [{"epoch": e, **{key: value * (1 - e / 10) for key, value in FULL.items()},
             **{key: change(e) for key, change in changes.items()}} for e in range(epochs)]


def panels(figure) -> dict[str, dict]:
    """Title -> label -> (x, y)."""
    return {axes.get_title(loc="left"): {line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
                                         for line in axes.get_lines()} for axes in figure.axes}


def test_every_value_of_the_log_has_its_line(tmp_path) -> None:
    """Once, over the epochs from 1, under its name."""
    figure = plot_pretraining(tmp_path / "plots" / "curve.png", log(3))
    drawn = panels(figure)
    assert len(drawn) == 9 and sum(map(len, drawn.values())) == len(FULL)
    lines = {label: line for panel in drawn.values() for label, line in panel.items()}
    names = {key.removeprefix("train_").removeprefix("val_").replace("_", " "): key for key in FULL}
    for name, key in names.items():
        assert lines[name] == ([1, 2, 3], [FULL[key] * (1 - e / 10) for e in range(3)]), name
    assert set(drawn["loss and its larger parts"]) == {"loss", "dino", "ibot"}
    assert set(drawn["k-NN of the teacher on val"]) == {"knn acc", "knn bacc"}
    assert {text.get_text() for text in figure.axes[0].get_legend().get_texts()} == {"loss", "dino", "ibot"}
    with Image.open(tmp_path / "plots" / "curve.png") as image:
        assert image.format == "PNG" and image.size == (1430, 1089)
        pixels = np.asarray(image.convert("L"))
    assert (pixels < 255).mean() > 0.01
    for edge in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
        assert (edge == 255).all(), "something is cut off"


def test_epochs_without_evaluation_leave_the_others_joined(tmp_path) -> None:
    """Absent, None and NaN alike; all panels have the same epochs."""
    history = log(6, val_knn_acc=lambda e: 0.6 if e in (1, 4) else None, val_knn_bacc=lambda e: math.nan)
    for entry in history:
        if entry["epoch"] != 5:
            del entry["val_feature_rank"]
    figure = plot_pretraining(tmp_path / "c.png", history)
    drawn = panels(figure)
    assert drawn["k-NN of the teacher on val"] == {"knn acc": ([2, 5], [0.6, 0.6])}
    assert drawn["effective rank of val's features"]["feature rank"] == ([6], [40.0])
    assert len({axes.get_xlim() for axes in figure.axes}) == 1


def test_panels_without_values_are_left_out(tmp_path) -> None:
    """No ontology, no val: no label loss; the k-NN says that there was none."""
    history = [{"epoch": 0, "train_loss": 12.0, "train_dino": 7.0, "lr": 1e-4}]
    figure = plot_pretraining(tmp_path / "c.png", history)
    assert list(panels(figure)) == ["loss and its larger parts", "k-NN of the teacher on val",
                                    "effective rank of val's features", "learning rate"]
    for axes in figure.axes[1:3]:
        assert [text.get_text() for text in axes.texts] == ["not evaluated"]


# -------------------------------------------------------------------------------------------------------------- crops

def flat(colour: tuple[int, int, int], side: int) -> torch.Tensor:
    """(3, side, side) of one colour, normalised."""
    image = torch.tensor(colour).view(3, 1, 1).expand(3, side, side) / 255
    return (image - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def test_crops_stand_where_they_should(tmp_path) -> None:
    """Colours come back exactly; a row per image; masked patches grey and no others; locals in lines that fit."""
    red, blue, green, sand = (250, 10, 20), (5, 15, 240), (10, 200, 30), (200, 180, 140)
    large = torch.stack([torch.stack([flat(red, 160), flat(blue, 160)]), torch.stack([flat(green, 160)] * 2)])
    small = torch.stack([torch.stack([flat((40 * i, 0, 90), 60), flat(sand, 60)]) for i in range(5)])
    masks = torch.zeros(2, 2, 16, dtype=torch.bool)  # 4 x 4 patches of 40 pixels
    masks[0, 0, 1] = masks[0, 0, 7] = masks[1, 1, 12] = True
    draw_crops(tmp_path / "c.png", large, small, masks, mean=MEAN, std=STD, patch_size=40)
    sheet = np.asarray(Image.open(tmp_path / "c.png"))
    # two crops of 160, then ceil(5 / 2) = 3 columns of 60 in (160 + 8) // (60 + 8) = 2 lines
    assert sheet.shape == (TOP + 2 * 160 + GAP + GAP, max(GAP + 2 * (160 + GAP) + 3 * 60 + 2 * GAP + GAP, 0), 3)
    first, second = sheet[TOP:TOP + 160], sheet[TOP + 160 + GAP:TOP + 320 + GAP]
    want = np.full((160, 160, 3), red, dtype=np.uint8)
    want[:40, 40:80] = want[40:80, 120:] = HIDDEN
    assert (first[:, GAP:GAP + 160] == want).all()
    assert (first[:, 2 * GAP + 160:2 * GAP + 320] == green).all() and (second[:, GAP:GAP + 160] == blue).all()
    want = np.full((160, 160, 3), green, dtype=np.uint8)
    want[120:, :40] = HIDDEN
    assert (second[:, 2 * GAP + 160:2 * GAP + 320] == want).all()
    left = 3 * GAP + 320
    for i in range(5):
        y, x = divmod(i, 3)
        tile = first[y * 68:y * 68 + 60, left + x * 68:left + x * 68 + 60]
        assert (tile == (40 * i, 0, 90)).all(), i
    assert (first[128:] [:, left:] == 255).all() and (first[68:128, left + 136:] == 255).all()


def test_small_crops_are_enlarged_and_rows_limited(tmp_path) -> None:
    """All by one whole number; the mask with them; without locals and masks, too."""
    generator = torch.Generator().manual_seed(0)
    large = torch.rand(2, 5, 3, 28, 28, generator=generator)
    masks = torch.zeros(2, 5, 4, dtype=torch.bool)
    masks[0, 0, 3] = True
    draw_crops(tmp_path / "a.png", large, None, masks, mean=(0, 0, 0), std=(1, 1, 1), patch_size=14, images=2)
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    side = 28 * 6  # round(160 / 28)
    assert sheet.shape[0] == TOP + 2 * side + 2 * GAP
    crop = sheet[TOP:TOP + side, GAP:GAP + side]
    want = (large[0, 0] * 255).round().byte().permute(1, 2, 0).numpy().repeat(6, axis=0).repeat(6, axis=1)
    want[84:, 84:] = HIDDEN
    assert (crop == want).all()
    draw_crops(tmp_path / "b.png", large, None, None, mean=(0, 0, 0), std=(1, 1, 1), patch_size=14, images=2)
    other = np.asarray(Image.open(tmp_path / "b.png"))[TOP:TOP + side, GAP:GAP + side]
    assert (other[:84] == want[:84]).all() and not (other == HIDDEN).all(axis=2).any()


def test_shapes_that_do_not_belong_together(tmp_path) -> None:
    """Programming errors, told before anything is drawn."""
    large, masks = torch.zeros(2, 2, 3, 28, 28), torch.zeros(2, 2, 9, dtype=torch.bool)
    how = {"mean": MEAN, "std": STD, "patch_size": 14}
    with pytest.raises(ValueError, match=r"masks of shape \(2, 2, 9\) for crops"):
        draw_crops(tmp_path / "a.png", large, None, masks, **how)
    with pytest.raises(ValueError, match="local crops of shape .* for 2 images"):
        draw_crops(tmp_path / "a.png", large, torch.zeros(4, 3, 3, 14, 14), None, **how)
    with pytest.raises(ValueError, match=r"tokens of shape \(2, 4, 8\) for 2 images in 3 x 3 patches"):
        draw_patch_pca(tmp_path / "a.png", large[0], torch.zeros(2, 4, 8), grid=(3, 3), mean=MEAN, std=STD)
    assert not (tmp_path / "a.png").exists()
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        draw_crops(tmp_path / "file" / "a.png", large, None, None, **how)


# ------------------------------------------------------------------------------------------------------ patch features

def test_patch_colours_are_the_principal_components() -> None:
    """Against the singular vectors of numpy: the same axes, stretched between the 1st and 99th percentiles."""
    rng = np.random.default_rng(3)
    tokens = (rng.normal(size=(4, 60, 12)) * np.linspace(3, 0.2, 12) + 5).astype(np.float32)
    colours, shares = patch_colours(torch.from_numpy(tokens))
    rows = tokens.reshape(-1, 12).astype(float)
    rows -= rows.mean(axis=0)
    _, sizes, axes = np.linalg.svd(rows, full_matrices=False)
    np.testing.assert_allclose(shares, sizes[:3] ** 2 / (sizes ** 2).sum(), rtol=1e-6)
    for i in range(3):
        values = rows @ axes[i] * np.sign(axes[i][np.abs(axes[i]).argmax()])
        low, high = np.percentile(values, [1, 99])
        want = 255 * np.clip((values - low) / (high - low), 0, 1)
        assert np.abs(colours[..., i].reshape(-1) - want).max() <= 0.5 + 1e-6
    again, _ = patch_colours(torch.from_numpy(tokens))
    assert (again == colours).all() and colours.dtype == np.uint8 and colours.shape == (4, 60, 3)


def test_components_without_variance_are_grey() -> None:
    """Features on a line have one colour; all alike, none; two channels have no third component."""
    line = torch.arange(20.0).view(1, 20, 1) * torch.tensor([1.0, 2.0, -2.0])
    colours, shares = patch_colours(line)
    assert shares[0] == pytest.approx(1) and shares[1:] == [0, 0]
    assert (colours[..., 1:] == 128).all() and colours[0, 0, 0] != colours[0, -1, 0]
    colours, shares = patch_colours(torch.full((2, 9, 4), 0.3))
    assert (colours == 128).all() and shares == [0, 0, 0]
    colours, _ = patch_colours(torch.randn(2, 9, 2, generator=torch.Generator().manual_seed(0)))
    assert (colours[..., 2] == 128).all() and colours[..., 1].std() > 10
    rare = torch.zeros(1, 400, 3)
    rare[0, 7, 0], rare[0, 9, 0] = 1.0, 0.25  # two patches in 400 lie beyond both percentiles
    assert patch_colours(rare)[0][0, :, 0].tolist() == [{7: 255, 9: 64}.get(i, 0) for i in range(400)]
    with pytest.raises(ValueError, match="NaN or infinity"):
        patch_colours(torch.tensor([[[1.0], [math.nan]]]))


def test_patch_features_stand_beside_their_picture(tmp_path) -> None:
    """Row by row in the grid, as large as the picture; more than three images in two columns."""
    images = torch.stack([flat((20 * i, 100, 50), 160) for i in range(5)])
    tokens = torch.randn(5, 2 * 4, 6, generator=torch.Generator().manual_seed(1))
    draw_patch_pca(tmp_path / "p.png", images, tokens, grid=(2, 4), mean=MEAN, std=STD)
    sheet = np.asarray(Image.open(tmp_path / "p.png"))
    colours, _ = patch_colours(tokens)
    assert sheet.shape[0] == TOP + 3 * 160 + 2 * GAP + GAP
    for i in range(5):
        column, row = divmod(i, 3)
        y, x = TOP + row * (160 + GAP), GAP + column * 2 * (160 + GAP)
        assert (sheet[y:y + 160, x:x + 160] == (20 * i, 100, 50)).all()
        want = colours[i].reshape(2, 4, 3).repeat(80, axis=0).repeat(40, axis=1)
        assert (sheet[y:y + 160, x + 160 + GAP:x + 320 + GAP] == want).all(), i
