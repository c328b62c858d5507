"""Sheets: geometry, colours, orientation and captions, read back from the PNG."""

import numpy as np
import pytest
from PIL import Image, ImageColor

from furnace.evaluation import sheets
from furnace.evaluation.sheets import FRAME, GAP, RIGHT, WRONG, Tile, image_sheet, wrap
from furnace.runtime.files import OutputError

CELL = 40 + 2 * FRAME  # of sheets with 40 px tiles


def plain(folder, name: str, colour: tuple, size: tuple[int, int] = (40, 40), mode: str = "RGB", **save):
    """One colour all over."""
    Image.new(mode, size, colour).save(folder / name, **save)
    return folder / name


def test_pictures_and_frames_stand_where_they_should(tmp_path) -> None:
    """Two rows of different length; true colours; the frames in theirs, the paper white."""
    red, blue = plain(tmp_path, "r.png", (250, 10, 20)), plain(tmp_path, "b.png", (5, 15, 240))
    image_sheet(tmp_path / "s.png", [[Tile(red, "a", RIGHT), Tile(blue, "b", WRONG)], [Tile(blue, "c")]], tile=40)
    image = Image.open(tmp_path / "s.png")
    assert image.mode == "RGB" and image.format == "PNG"
    pixels = np.asarray(image)
    height = CELL + 4 + 16  # a caption of one line is 12 * 1.3 pixels high
    assert pixels.shape == (GAP + 2 * (height + GAP), GAP + 2 * (CELL + GAP), 3)
    second = GAP + CELL + GAP
    below = GAP + height + GAP
    for left, top, inside, frame in ((GAP, GAP, (250, 10, 20), RIGHT), (second, GAP, (5, 15, 240), WRONG)):
        square = pixels[top:top + CELL, left:left + CELL]
        assert (square[FRAME:-FRAME, FRAME:-FRAME] == inside).all()
        for strip in (square[:FRAME], square[-FRAME:], square[:, :FRAME], square[:, -FRAME:]):
            assert (strip == ImageColor.getrgb(frame)).all()
    square = pixels[below:below + CELL, GAP:GAP + CELL]
    assert (square[FRAME:-FRAME, FRAME:-FRAME] == (5, 15, 240)).all() and (square[0] == 255).all()
    assert (square[FRAME - 1, FRAME:-FRAME] == ImageColor.getrgb(sheets.EDGE)).all()
    assert (pixels[below:, second:] == 255).all(), "nothing where the second row ends"
    assert (pixels[GAP + CELL + 4:below, GAP:second] < 100).any(), "a caption"


def test_pictures_are_fitted_not_cut_nor_stretched(tmp_path) -> None:
    """80 x 20 becomes 40 x 10 in the middle."""
    wide = plain(tmp_path, "w.png", (0, 200, 0), (80, 20))
    image_sheet(tmp_path / "s.png", [[Tile(wide, "")]], tile=40)
    green = (np.asarray(Image.open(tmp_path / "s.png")) == (0, 200, 0)).all(axis=2)
    rows, columns = np.flatnonzero(green.any(axis=1)), np.flatnonzero(green.any(axis=0))
    assert (rows[0], rows[-1]) == (GAP + FRAME + 15, GAP + FRAME + 24)
    assert (columns[0], columns[-1]) == (GAP + FRAME, GAP + FRAME + 39) and green.sum() == 400


def test_upright_and_rgb(tmp_path) -> None:
    """EXIF turned (the red half is stored at the left and belongs on top); grey and palette become RGB."""
    halves = Image.new("RGB", (40, 40), (0, 0, 255))
    halves.paste((255, 0, 0), (0, 0, 20, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to look at it
    halves.save(tmp_path / "turned.png", exif=exif)
    grey = plain(tmp_path, "grey.png", 77, mode="L")
    image_sheet(tmp_path / "s.png", [[Tile(tmp_path / "turned.png", ""), Tile(grey, "")]], tile=40)
    pixels = np.asarray(Image.open(tmp_path / "s.png"))[GAP + FRAME:GAP + FRAME + 40, GAP + FRAME:]
    assert (pixels[:20, :40] == (255, 0, 0)).all() and (pixels[20:, :40] == (0, 0, 255)).all()
    other = CELL + GAP
    assert (pixels[:, other:other + 40] == 77).all()


@pytest.mark.parametrize("width", [40, 100, 1000])
def test_wrapped_lines_fit_and_lose_nothing(width: int) -> None:
    """Blanks aside, the text is all there; long words are broken."""
    font = sheets._font(sheets.CAPTION)
    text = "seborrhoeic keratosis 0.912\nnaevus\n\nPneumonoultramicroscopicsilicovolcanoconiosis_file_0001.png end"
    lines = wrap(text, font, width)
    assert all(font.getlength(line) <= width for line in lines)
    assert "".join(lines).replace(" ", "") == "".join(text.split())
    if width == 1000:
        assert lines == text.split("\n")


def test_words_are_kept_whole_where_they_fit() -> None:
    """Greedy, at blanks."""
    font = sheets._font(sheets.CAPTION)
    assert wrap("aa bb cc", font, font.getlength("aa bb")) == ["aa bb", "cc"]
    assert wrap("W" * 5, font, 1) == ["W"] * 5, "one letter is the least"
    assert wrap("", font, 50) == []


def test_long_captions_are_shortened_inside_their_tile(tmp_path) -> None:
    """Never into the neighbour's, and with an ellipsis."""
    red = plain(tmp_path, "r.png", (250, 10, 20))
    image_sheet(tmp_path / "s.png", [[Tile(red, "word " * 40), Tile(red, "")]], tile=40)
    pixels = np.asarray(Image.open(tmp_path / "s.png"))
    text = (pixels[GAP + CELL + 4:] < 128).all(axis=2)
    assert text[:, GAP:GAP + CELL].any() and not text[:, GAP + CELL + 1:].any()
    assert len(pixels) == GAP + CELL + 4 + 16 * sheets.MOST_LINES + GAP
    font = sheets._font(sheets.CAPTION)
    lines = sheets._shorten(wrap("word " * 40, font, CELL), font, CELL)
    assert len(lines) == sheets.MOST_LINES and lines[-1].endswith("…") and font.getlength(lines[-1]) <= CELL


def test_title_moves_the_pictures_down(tmp_path) -> None:
    """By its own wrapped height."""
    red = plain(tmp_path, "r.png", (250, 10, 20))
    tops = []
    for title in ("", "a", "several words of a title that need more than one line of a narrow sheet"):
        image_sheet(tmp_path / "s.png", [[Tile(red, "x", RIGHT)]], title=title, tile=40)
        pixels = np.asarray(Image.open(tmp_path / "s.png"))
        tops.append(int(np.flatnonzero((pixels == (250, 10, 20)).all(axis=2).any(axis=1))[0]))
    assert tops[0] == GAP + FRAME and tops[1] == tops[0] + 20 + GAP and tops[2] > tops[1] + 60


def test_nothing_to_show_and_nowhere_to_write(tmp_path) -> None:
    """Told, nothing left behind."""
    red = plain(tmp_path, "r.png", (250, 10, 20))
    with pytest.raises(ValueError, match="at least one picture"):
        image_sheet(tmp_path / "s.png", [[]])
    with pytest.raises(OutputError):
        image_sheet(red / "s.png", [[Tile(red, "")]])
    assert [p.name for p in tmp_path.iterdir()] == ["r.png"]
