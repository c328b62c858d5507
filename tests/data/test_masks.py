"""Mask files: every kind gives the same shape, doubtful ones are refused, and what is wrong with a set is all found."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from furnace.data.images import DECODE_ERRORS
from furnace.data.masks import MaskError, check_masks, load_mask, upright_size
from furnace.data.problems import ROW
from helpers import draw_images

HEIGHT, WIDTH = 60, 90
YY, XX = np.mgrid[:HEIGHT, :WIDTH]
SHAPE = ((YY - 25) / 20) ** 2 + ((XX - 40) / 30) ** 2 < 1  # no symmetry, so that turned masks would be seen
BITS = SHAPE.astype(np.uint8)


def palette(indices: np.ndarray, *colours: tuple[int, int, int]) -> Image.Image:
    image = Image.fromarray(indices.astype(np.uint8)).convert("P")
    image.putpalette([value for colour in colours for value in colour])
    image.putdata(indices.astype(np.uint8).ravel().tolist())
    return image


def with_alpha(mode: str, grey: np.ndarray, alpha: np.ndarray) -> Image.Image:
    image = Image.fromarray(grey).convert("RGB" if mode == "RGBA" else "L")
    image.putalpha(Image.fromarray(alpha))
    return image


FULL = np.full_like(BITS, 255)
NOISE = np.random.default_rng(0).integers(0, 256, BITS.shape, dtype=np.uint8)
KINDS: dict[str, Callable[[], Image.Image]] = {
    "1 bit": lambda: Image.fromarray(SHAPE),
    "0/1": lambda: Image.fromarray(BITS),
    "0/255": lambda: Image.fromarray(BITS * 255),
    "RGB 0/1": lambda: Image.fromarray(BITS).convert("RGB"),
    "RGB 0/255": lambda: Image.fromarray(BITS * 255).convert("RGB"),
    "RGBA": lambda: with_alpha("RGBA", BITS * 255, FULL),
    "RGBA, noise in alpha": lambda: with_alpha("RGBA", BITS * 255, NOISE),
    "LA 0/1": lambda: with_alpha("LA", BITS, FULL),
    "palette black/white": lambda: palette(SHAPE, (0, 0, 0), (255, 255, 255)),
    "palette white/black, indices the other way": lambda: palette(~SHAPE, (255, 255, 255), (0, 0, 0)),
    "palette black/dark red": lambda: palette(SHAPE, (0, 0, 0), (128, 0, 0)),
    "16 bits 0/1": lambda: Image.fromarray(BITS.astype(np.uint16)),
    "16 bits 0/255": lambda: Image.fromarray(BITS.astype(np.uint16) * 255),
    "16 bits 0/65535": lambda: Image.fromarray(BITS.astype(np.uint16) * 65535),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_mask(tmp_path: Path, kind: str) -> None:
    KINDS[kind]().save(tmp_path / "m.png")
    mask = load_mask(tmp_path / "m.png")
    assert mask.dtype == bool and np.array_equal(mask, SHAPE)


@pytest.mark.parametrize("suffix", ["bmp", "tif", "gif"])
@pytest.mark.parametrize("kind", ["1 bit", "0/255"])
def test_other_formats(tmp_path: Path, suffix: str, kind: str) -> None:
    KINDS[kind]().save(tmp_path / f"m.{suffix}")
    assert np.array_equal(load_mask(tmp_path / f"m.{suffix}"), SHAPE)


@pytest.mark.parametrize(("value", "lesion"), [(0, 0.0), (1, 1.0), (255, 1.0)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_constant_masks(tmp_path: Path, value: int, lesion: float, mode: str) -> None:
    """A mask of ones is all lesion (dithering, as published, would leave 0.05 % of it)."""
    Image.fromarray(np.full((50, 70), value, np.uint8)).convert(mode).save(tmp_path / "m.png")
    assert load_mask(tmp_path / "m.png").mean() == lesion


@pytest.mark.parametrize("quality", [30, 75, 95])
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("options", [{"suffix": "jpg"}, {"suffix": "webp"}])
def test_lossy_masks(tmp_path: Path, quality: int, mode: str, options: dict) -> None:
    path = tmp_path / f"m.{options['suffix']}"
    big = SHAPE.repeat(4, axis=0).repeat(4, axis=1)
    Image.fromarray(big.astype(np.uint8) * 255).convert(mode).save(path, quality=quality)
    assert (load_mask(path) != big).mean() < 0.001
    levels = big.astype(np.uint8) * 255
    levels[:16, :16], levels[:16, 32:48] = 110, 150  # a few pixels between
    Image.fromarray(levels).convert(mode).save(path, quality=quality)
    assert not load_mask(path)[2:14, 2:14].any() and load_mask(path)[2:14, 34:46].all()
    Image.fromarray(np.ones_like(big, dtype=np.uint8)).convert(mode).save(path, quality=quality)
    assert not load_mask(path).any(), "ones in a lossy file are noise"


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(BITS * 255).save(tmp_path / "m.png", exif=exif)
    assert np.array_equal(load_mask(tmp_path / "m.png"), np.rot90(SHAPE, -1))
    assert upright_size(tmp_path / "m.png") == (WIDTH, HEIGHT)


@pytest.mark.parametrize(("values", "told"), [
    ((0, 1, 255), "0 and 1 and 255"), ((0, 1, 2), "0 and 1 and 2"), ((0, 128), "0 and 128"), ((0, 2), "0 and 2"),
    ((3, 255), "3 and 255"), ((0, 64, 128, 192, 255), r"0 and 64 and 128 and 192 \.\.\."), ((7,), "7"),
])
def test_other_values_are_refused(tmp_path: Path, values: tuple[int, ...], told: str) -> None:
    Image.fromarray(np.resize(np.array(values, np.uint8), (20, 30))).save(tmp_path / "m.png")
    with pytest.raises(MaskError, match=f"grey values {told}$"):
        load_mask(tmp_path / "m.png")


@pytest.mark.parametrize(("image", "name", "told"), [
    (Image.fromarray(np.dstack([NOISE, BITS, BITS])), "m.png", "colour picture"),
    (palette(SHAPE * 2, (0, 0, 0), (0, 128, 0), (128, 0, 0)), "m.png", "colour picture"),
    (Image.fromarray(np.dstack([NOISE, BITS, BITS])), "m.jpg", "colour picture"),
    (Image.fromarray(NOISE), "m.jpg", "% of its pixels are neither black nor white"),
    (with_alpha("RGBA", FULL, BITS * 255), "m.png", "transparency alone"),
    (Image.fromarray(SHAPE.astype(np.float32)), "m.tif", "floating-point"),
])
def test_pictures_that_are_no_masks(tmp_path: Path, image: Image.Image, name: str, told: str) -> None:
    image.save(tmp_path / name)
    with pytest.raises(MaskError, match=told) as caught:
        load_mask(tmp_path / name)
    assert isinstance(caught.value, DECODE_ERRORS)


# ----------------------------------------------------------------------------------------------- the check of a set

def table(masks: list[str | None], images: list[str] | None = None) -> pd.DataFrame:
    frame = pd.DataFrame({"image": images or ["a.png"] * len(masks), "mask": masks}, dtype=object)
    return frame.assign(**{ROW: range(2, len(frame) + 2)})


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    """a.png and sub/b.png of 90 x 60, and masks good and bad."""
    draw_images(tmp_path, ["a.png", "sub/b.png"], size=(WIDTH, HEIGHT))
    Image.fromarray(BITS * 255).save(tmp_path / "good.png")
    Image.fromarray(BITS).save(tmp_path / "sub/good.png")
    Image.fromarray(BITS * 0).save(tmp_path / "none.png")
    Image.fromarray(BITS[:, :-1]).save(tmp_path / "narrow.png")
    Image.fromarray(BITS + 1).save(tmp_path / "three.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "zero.png").write_bytes(b"")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[:len(content) // 2])
    return tmp_path


def test_good_masks(folder: Path) -> None:
    problems: list = []
    digest, pixels = check_masks(table(["good.png", "sub/good.png"]), folder, problems)
    assert not problems and pixels.tolist() == [SHAPE.sum()] * 2 and pixels.dtype == np.int64
    Image.fromarray(255 - BITS * 255).save(folder / "good.png")
    other, _ = check_masks(table(["good.png", "sub/good.png"]), folder, problems)
    assert other != digest and len(digest) == 64


def test_all_that_is_wrong_with_masks(folder: Path) -> None:
    masks = ["good.png", None, "gone.png", "zero.png", "text.png", "cut.png", "narrow.png", "three.png", "none.png"]
    problems: list = []
    _, pixels = check_masks(table(masks), folder, problems)
    found = {p.row: (p.kind, p.file, p.warning) for p in problems}
    assert found == {3: ("missing mask", "", False), 4: ("missing mask", "gone.png", False),
                     5: ("unreadable mask", "zero.png", False), 6: ("unreadable mask", "text.png", False),
                     7: ("unreadable mask", "cut.png", False), 8: ("mask of another size", "narrow.png", False),
                     9: ("mask values", "three.png", False), 10: ("empty mask", "none.png", True)}
    assert all(p.column == "mask" and p.text and p.remedy for p in problems) and len(problems) == 8
    texts = {p.row: p.text for p in problems}
    assert texts[8] == "has 89 x 60 pixels and its image a.png 90 x 60"
    assert texts[9] == "it has the grey values 1 and 2"
    assert pixels.tolist() == [SHAPE.sum(), -1, -1, -1, -1, -1, -1, -1, 0]


def test_no_mask_there_at_all(folder: Path) -> None:
    problems: list = []
    check_masks(table(["x/1.png", "x/2.png"]), folder, problems)
    assert [p.kind for p in problems] == ["no mask found", "missing mask", "missing mask"]
    assert "not one of the 2 masks lies under" in problems[0].text and "mask column" in problems[0].remedy


def test_an_image_turned_by_its_exif(folder: Path) -> None:
    """Sizes are compared as an upright viewer sees them."""
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (HEIGHT, WIDTH)).save(folder / "turned.jpg", exif=exif)
    problems: list = []
    check_masks(table(["good.png"], ["turned.jpg"]), folder, problems)
    assert not problems
