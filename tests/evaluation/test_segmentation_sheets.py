"""Outlines: where they lie, pixel by pixel; the sheet: order, captions, colours read back from the PNG."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageColor
from scipy import ndimage

from furnace.evaluation import segmentation_sheets as module
from furnace.evaluation.mask_baselines import centred_disc
from furnace.evaluation.segmentation_sheets import PREDICTION, TRUTH, Case, outlined, worst_cases_sheet, worst_rows
from furnace.evaluation.sheets import FRAME, GAP

SKIN = (200, 160, 140)
BLUE, YELLOW = ImageColor.getrgb(TRUTH), ImageColor.getrgb(PREDICTION)


def skin(width: int, height: int) -> Image.Image:
    """One colour."""
    return Image.new("RGB", (width, height), SKIN)


def coloured(picture: Image.Image, colour: tuple) -> np.ndarray:
    """(H, W) where it has this colour."""
    return (np.asarray(picture) == colour).all(axis=2)


@pytest.mark.parametrize("width", [1, 2, 5])
def test_a_line_is_the_part_of_the_mask_near_its_boundary(width: int) -> None:
    """Euclidean distance below the width, by a distance transform; the picture's sides included."""
    noise = ndimage.gaussian_filter(np.random.default_rng(0).random((60, 80)), 5) > 0.5
    for mask in (noise, centred_disc((60, 80), 0.7), np.ones((60, 80), dtype=bool)):
        edge = mask & ~ndimage.binary_erosion(mask)
        near = mask & (ndimage.distance_transform_edt(~edge) < width)
        image = skin(80, 60)
        picture = outlined(image, [mask], width=width)
        np.testing.assert_array_equal(coloured(picture, BLUE), near)
        np.testing.assert_array_equal(coloured(picture, SKIN), ~near)
        assert coloured(image, SKIN).all(), "the image itself is left alone"


def test_both_lines_are_seen_where_they_coincide() -> None:
    """The prediction's outermost, the truth's next to it."""
    mask = np.zeros((12, 12), dtype=bool)
    mask[2:10, 2:10] = True
    middle = np.asarray(outlined(skin(12, 12), [mask, mask]))[6]
    assert [tuple(map(int, pixel)) for pixel in middle[:6]] == [SKIN, SKIN, YELLOW, BLUE, SKIN, SKIN]


@pytest.mark.parametrize(("size", "expected"), [((224, 224), 1), ((600, 450), 2), ((1024, 768), 3), ((2000, 900), 3)])
def test_lines_grow_with_the_picture(size: tuple[int, int], expected: int) -> None:
    """By its shorter side: counted from the top of a full mask."""
    picture = outlined(skin(*size), [np.ones(size[::-1], dtype=bool)], colours=["#F0E442"])
    assert coloured(picture, YELLOW)[:, size[0] // 2].sum() == 2 * expected and picture.size == size


def test_empty_masks_draw_nothing_and_wrong_ones_are_refused() -> None:
    """A grey picture becomes RGB."""
    empty = np.zeros((20, 30), dtype=bool)
    assert coloured(outlined(Image.new("L", (30, 20), 90), [empty, empty]), (90, 90, 90)).all()
    with pytest.raises(ValueError, match="30 x 20 pixels and mask 1 20 x 30"):
        outlined(skin(30, 20), [empty, empty.T])
    with pytest.raises(ValueError, match="2 colours for 3"):
        outlined(skin(30, 20), [empty] * 3)
    with pytest.raises(ValueError, match="bool"):
        outlined(skin(30, 20), [empty.astype(np.uint8)])


def test_worst_rows_are_the_lowest_dice_in_order() -> None:
    """Ties as in the table."""
    table = pd.DataFrame({"filename": list("abcde"), "dice": [0.9, 0.2, 0.5, 0.2, 1.0]})
    assert list(worst_rows(table, 3)["filename"]) == ["b", "d", "c"] and len(worst_rows(table)) == 5


def case(folder, name: str, truth: np.ndarray, predicted: np.ndarray) -> Case:
    """On plain skin."""
    skin(truth.shape[1], truth.shape[0]).save(folder / f"{name}.png")
    return Case(folder / f"{name}.png", name, truth, predicted)


def test_sheet_shows_the_worst_first_with_both_outlines(tmp_path, monkeypatch) -> None:
    """Rows of 4, Dice of the full size in the caption, what is empty said; the tile's pixels have both colours."""
    disc = centred_disc((300, 400), 0.6)
    empty = np.zeros_like(disc)
    cases = [case(tmp_path, "good", disc, disc), case(tmp_path, "none", disc, empty),
             case(tmp_path, "small", disc, centred_disc((300, 400), 0.3)), case(tmp_path, "bare", empty, empty),
             case(tmp_path, "false", empty, disc)]
    seen = {}
    drawing = module.image_sheet

    def spy(path, rows, **options) -> None:
        seen.update(rows=rows, **options)
        drawing(path, rows, **options)

    monkeypatch.setattr(module, "image_sheet", spy)
    worst_cases_sheet(tmp_path / "sheet.png", cases, title="Validation", tile=80)
    captions = [tile.caption for row in seen["rows"] for tile in row]
    small = 2 * cases[2].predicted.sum() / (disc.sum() + cases[2].predicted.sum())
    assert captions == ["none\nDice 0.000 (prediction empty)", "false\nDice 0.000 (truth empty)",
                        f"small\nDice {small:.3f}", "good\nDice 1.000", "bare\nDice 1.000 (truth and prediction empty)"]
    assert [len(row) for row in seen["rows"]] == [4, 1]
    assert seen["title"] == "Validation; blue: true outline, yellow: predicted"
    pixels = Image.open(tmp_path / "sheet.png")
    top = GAP + 20 + GAP + FRAME  # under one line of title
    for number, (blue, yellow) in enumerate([(True, False), (False, True), (True, True), (True, True)]):
        left = GAP + FRAME + number * (80 + 2 * FRAME + GAP)
        tile = pixels.crop((left, top + 10, left + 80, top + 70))  # 400 x 300 in a square of 80
        assert (coloured(tile, BLUE).any(), coloured(tile, YELLOW).any()) == (blue, yellow), number
        assert coloured(tile, SKIN)[0].all()
    first = coloured(pixels.crop((GAP + FRAME, top + 10, GAP + FRAME + 80, top + 70)), BLUE)
    rows = np.flatnonzero(first.any(axis=1))
    assert (rows[0], rows[-1]) == (12, 47), "a diameter of 0.6 of 60 pixels"


def test_masks_of_another_size_than_the_image(tmp_path) -> None:
    """Named, nothing written."""
    disc = centred_disc((30, 40), 0.5)
    wrong = case(tmp_path, "a", disc, disc)
    skin(30, 40).save(wrong.path)
    with pytest.raises(ValueError, match="30 x 40 pixels and its masks 40 x 30"):
        worst_cases_sheet(tmp_path / "sheet.png", [wrong])
    with pytest.raises(ValueError, match="at least one"):
        worst_cases_sheet(tmp_path / "sheet.png", [])
    assert not (tmp_path / "sheet.png").exists()
