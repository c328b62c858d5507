"""Contact sheets: pictures in rows with captions and coloured frames, one PNG by Pillow."""

from dataclasses import dataclass
from pathlib import Path

import matplotlib
from PIL import Image, ImageColor, ImageDraw, ImageFont

from furnace.data.images import load_rgb
from furnace.runtime import files

# blue and vermilion of Okabe and Ito's palette: told apart with every kind of colour blindness
RIGHT, WRONG = "#0072B2", "#D55E00"
PAPER, INK, EDGE = "#FFFFFF", "#222222", "#BBBBBB"
GAP, FRAME = 10, 5  # pixels between tiles, and of a coloured frame (the grey edge of a tile without one is thin)
CAPTION, TITLE = 12, 15  # font sizes in pixels
MOST_LINES = 5  # of a caption; the rest becomes an ellipsis


@dataclass(frozen=True)
class Tile:
    """One picture of a sheet.

    Attributes:
        path: the image file.
        caption: text under the picture; its line breaks are kept, longer lines are wrapped.
        colour: of the frame, e.g. RIGHT or WRONG; None draws a thin grey edge.
    """

    path: Path
    caption: str
    colour: str | None = None


def image_sheet(path: str | Path, rows: list[list[Tile]], *, title: str = "", tile: int = 160) -> None:
    """Write pictures with captions as one PNG.

    Every picture is decoded by ``load_rgb``, as the backbone sees it (upright, RGB), and fitted into a square without
    cutting or stretching. One picture is in memory at a time beside the sheet, which takes about tile * (tile + 60)
    pixels per picture: show a choice of a large set.

    Args:
        path: the PNG.
        rows: rows of tiles, which may differ in length.
        title: over the sheet.
        tile: side of the square that each picture is fitted into, in pixels.

    Raises:
        ValueError: no tile at all.
        One of data.images.DECODE_ERRORS: a picture cannot be decoded.
        OutputError: ``path`` cannot be written.
    """
    if not any(rows):
        raise ValueError("a sheet needs at least one picture")
    small, large = _font(CAPTION), _font(TITLE)
    cell = tile + 2 * FRAME
    width = GAP + max(map(len, rows)) * (cell + GAP)
    heading = wrap(title, large, width - 2 * GAP)
    captions = [[_shorten(wrap(item.caption, small, cell), small, cell) for item in row] for row in rows]
    heights = [cell + 4 + _line_height(small) * max((len(lines) for lines in row), default=0) for row in captions]
    top = GAP + (_line_height(large) * len(heading) + GAP if heading else 0)
    sheet = Image.new("RGB", (width, top + sum(height + GAP for height in heights)), PAPER)
    pen = ImageDraw.Draw(sheet)
    _write_lines(pen, (GAP, GAP), heading, large)
    for row, lines, height in zip(rows, captions, heights, strict=True):
        for column, (item, text) in enumerate(zip(row, lines, strict=True)):
            left = GAP + column * (cell + GAP)
            _draw_picture(sheet, pen, item, left, top, tile)
            _write_lines(pen, (left, top + cell + 4), text, small)
        top += height + GAP
    with files.atomic_write(path) as file:
        sheet.save(file, "PNG")


def wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """Break text into lines of at most ``width`` pixels, at blanks and, for words that are longer, inside them."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            if line and font.getlength(f"{line} {word}") <= width:
                line = f"{line} {word}"
                continue
            if line:
                lines.append(line)
            while len(word) > 1 and font.getlength(word) > width:
                fitting = max(1, sum(font.getlength(word[:end]) <= width for end in range(1, len(word))))
                lines.append(word[:fitting])
                word = word[fitting:]
            line = word
        lines.append(line)
    return lines


def _shorten(lines: list[str], font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """At most MOST_LINES lines, an ellipsis for what is left out."""
    if len(lines) <= MOST_LINES:
        return lines
    last = lines[MOST_LINES - 1]
    while last and font.getlength(last + "…") > width:
        last = last[:-1]
    return [*lines[:MOST_LINES - 1], last + "…"]


def _draw_picture(sheet: Image.Image, pen: ImageDraw.ImageDraw, item: Tile, left: int, top: int, tile: int) -> None:
    """Fit one picture into its square; the frame lies outside of the square, so that it hides nothing."""
    picture = load_rgb(item.path)
    scale = tile / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    outer = tile + 2 * FRAME
    colour = ImageColor.getrgb(item.colour or EDGE)
    thickness = FRAME if item.colour else 1
    inset = FRAME - thickness
    pen.rectangle((left + inset, top + inset, left + outer - 1 - inset, top + outer - 1 - inset), "#F2F2F2", colour,
                  thickness)
    sheet.paste(picture, (left + FRAME + (tile - size[0]) // 2, top + FRAME + (tile - size[1]) // 2))


def _write_lines(pen: ImageDraw.ImageDraw, at: tuple[int, int], lines: list[str], font: ImageFont.FreeTypeFont) -> None:
    for number, line in enumerate(lines):
        pen.text((at[0], at[1] + number * _line_height(font)), line, INK, font)


def _line_height(font: ImageFont.FreeTypeFont) -> int:
    return round(font.size * 1.3)


def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib carries: accents, Greek and Cyrillic on every machine."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
