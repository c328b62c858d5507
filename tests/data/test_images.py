"""Decoding: every kind of file gives the right RGB, upright, and a damaged one is refused."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from furnace.data.images import DECODE_ERRORS, check_files, load_rgb, load_rgb_tensor

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 10, 3), dtype=np.uint8)


def saved(image: Image.Image, path: Path, **options) -> np.ndarray:
    """Save, load with the function under test, as an array."""
    image.save(path, **options)
    result = load_rgb(path)
    assert result.mode == "RGB"
    fast = load_rgb_tensor(path).numpy()
    assert fast.dtype == np.uint8
    np.testing.assert_array_equal(fast.transpose(1, 2, 0), np.asarray(result))  # (3, H, W) -> (H, W, 3)
    return np.asarray(result)


# what an upright viewer must do with stored pixels of each orientation (EXIF 2.32, tag 0x0112)
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_exif_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = saved(Image.fromarray(PIXELS), tmp_path / f"x.{suffix}", exif=exif)
    np.testing.assert_array_equal(found, UPRIGHT[orientation](PIXELS))


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_of_a_jpeg(tmp_path: Path, orientation: int) -> None:
    corner = np.full((32, 48, 3), 20, dtype=np.uint8)
    corner[:16, :24] = (230, 60, 40)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = saved(Image.fromarray(corner), tmp_path / "x.jpg", exif=exif, quality=95, subsampling=0)
    expected = UPRIGHT[orientation](corner)
    assert found.shape == expected.shape and np.abs(found.astype(int) - expected).mean() < 3


def test_rgb(tmp_path: Path) -> None:
    np.testing.assert_array_equal(saved(Image.fromarray(PIXELS), tmp_path / "x.png"), PIXELS)


@pytest.mark.parametrize("suffix", ["bmp", "webp", "tif", "gif"])
def test_other_formats(tmp_path: Path, suffix: str) -> None:
    image = Image.fromarray(PIXELS)
    if suffix == "gif":
        image = image.quantize(256)
    found = saved(image, tmp_path / f"x.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    np.testing.assert_array_equal(found, np.asarray(image.convert("RGB")))


def test_grey(tmp_path: Path) -> None:
    grey = PIXELS[..., 0]
    found = saved(Image.fromarray(grey), tmp_path / "x.png")
    np.testing.assert_array_equal(found, np.repeat(grey[..., None], 3, axis=2))


@pytest.mark.parametrize("alpha", [0, 3, 255])
def test_transparency_is_dropped(tmp_path: Path, alpha: int) -> None:
    rgba = np.dstack([PIXELS, np.full(PIXELS.shape[:2], alpha, dtype=np.uint8)])
    np.testing.assert_array_equal(saved(Image.fromarray(rgba, "RGBA"), tmp_path / "x.png"), PIXELS)
    la = np.dstack([PIXELS[..., 0], rgba[..., 3]])
    found = saved(Image.fromarray(la, "LA"), tmp_path / "y.png")
    np.testing.assert_array_equal(found, np.repeat(PIXELS[..., :1], 3, axis=2))


@pytest.mark.parametrize("transparency", [None, 1, b"\x00\x80\xff"])
def test_palette(tmp_path: Path, transparency) -> None:
    colours = np.array([[250, 10, 20], [30, 240, 50], [60, 70, 230]], dtype=np.uint8)
    indices = RNG.integers(0, 3, (5, 7), dtype=np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(colours.tobytes())
    assert image.mode == "P"
    options = {} if transparency is None else {"transparency": transparency}
    np.testing.assert_array_equal(saved(image, tmp_path / "x.png", **options), colours[indices])


def test_16_bit_grey_is_scaled(tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 256, 257], [1000, 32768, 40000, 65406, 65535]], dtype=np.uint16)
    image = Image.fromarray(values)
    expected = np.floor(values / 257 + 0.5).astype(np.uint8)  # clipping would give 255 nearly everywhere
    for suffix in ("png", "tif"):
        found = saved(image, tmp_path / f"x.{suffix}")
        np.testing.assert_array_equal(found, np.repeat(expected[..., None], 3, axis=2))


def test_16_bit_grey_is_turned_upright(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.uint16).reshape(2, 3) * 257
    exif = Image.Exif()
    exif[0x0112] = 6
    found = saved(Image.fromarray(values), tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(found[..., 0], [[3, 0], [4, 1], [5, 2]])


def test_32_bit_values_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 70000]], dtype=np.int32)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match="0..70000 are not 16-bit grey"):
        load_rgb(tmp_path / "x.tif")


def test_floating_point_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((3, 3), dtype=np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match="floating-point"):
        load_rgb(tmp_path / "x.tif")


def test_cmyk_jpeg(tmp_path: Path) -> None:
    ink = np.zeros((16, 16, 4), dtype=np.uint8)
    ink[:, 8:] = (200, 0, 100, 0)  # no cyan -> red is 255; 200 cyan -> red is 55
    found = saved(Image.fromarray(ink, "CMYK"), tmp_path / "x.jpg", quality=100, subsampling=0).astype(int)
    assert np.abs(found[:, :7] - 255).max() <= 3
    assert np.abs(found[:, 9:] - (55, 255, 155)).max() <= 3


def test_one_bit(tmp_path: Path) -> None:
    bits = RNG.integers(0, 2, (9, 9)).astype(bool)
    found = saved(Image.fromarray(bits), tmp_path / "x.png")
    np.testing.assert_array_equal(found, np.repeat(bits[..., None] * np.uint8(255), 3, axis=2))


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "bmp", "webp", "gif"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str, share: float) -> None:
    whole = tmp_path / f"whole.{suffix}"
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole)
    cut = tmp_path / f"cut.{suffix}"
    cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * share)])
    for decode in (load_rgb, load_rgb_tensor):
        with pytest.raises(DECODE_ERRORS):
            decode(cut)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_rubbish_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.jpg").write_bytes(content)
    with pytest.raises(DECODE_ERRORS):
        load_rgb(tmp_path / "x.jpg")


def test_a_damaged_png_checksum_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.fromarray(PIXELS).save(path)
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 8] ^= 0xFF
    path.write_bytes(bytes(content))
    with pytest.raises(DECODE_ERRORS):
        load_rgb(path)


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "x.png")  # 60 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(Image.DecompressionBombError) as caught:
        load_rgb(tmp_path / "x.png")
    assert isinstance(caught.value, DECODE_ERRORS)
    problems: list = []
    check_files(pd.DataFrame({"image": ["x.png"], "_row": [2]}), tmp_path, problems)
    assert [problem.kind for problem in problems] == ["not an image"]


def test_check_files_order_and_rows(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "good.png")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("text")
    names = ["gone.png", "good.png", "text.png", None, "empty.png", "x" * 300 + ".png"]
    problems: list = []
    frame = pd.DataFrame({"image": names, "_row": range(2, 8)}, dtype=object)
    digest, ids = check_files(frame, tmp_path, problems)
    assert [(p.kind, p.row, p.file, p.warning) for p in problems] == [
        ("missing file", 2, "gone.png", False), ("not an image", 4, "text.png", False), ("no file name", 5, "", False),
        ("empty file", 6, "empty.png", False), ("missing file", 7, names[5], False)]
    assert len(digest) == 64 and [bool(i) for i in ids] == [False, True, False, False, False, False]


def test_the_digest_knows_names_and_contents_not_order(tmp_path: Path) -> None:
    for name, side in (("a.png", 5), ("b.png", 9)):
        Image.fromarray(np.zeros((side, side), dtype=np.uint8)).save(tmp_path / name)

    def digest(*names: str) -> str:
        return check_files(pd.DataFrame({"image": names, "_row": range(len(names))}), tmp_path, [])[0]

    first = digest("a.png", "b.png")
    assert digest("b.png", "a.png") == digest("a.png", "b.png", "a.png") == first != digest("a.png")
    with open(tmp_path / "a.png", "ab") as file:
        file.write(b"\0")
    longer = digest("a.png", "b.png")
    with open(tmp_path / "a.png", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\1")
    assert len({first, longer, digest("a.png", "b.png")}) == 3


@pytest.mark.skipif(".avif" not in Image.registered_extensions(), reason="this Pillow has no AVIF plugin")
@pytest.mark.parametrize(("box", "keep"), [(b"mdat", 4), (b"iloc", 8)])
def test_a_damaged_avif_is_refused(tmp_path: Path, box: bytes, keep: int) -> None:
    path = tmp_path / "x.jpg"  # browsers save AVIF under the page's name
    Image.fromarray(PIXELS).save(path, format="AVIF")
    content = bytearray(path.read_bytes())
    start = content.index(box) + keep
    content[start:start + 14] = bytes(14)
    path.write_bytes(content)
    check_files(pd.DataFrame({"image": ["x.jpg"], "_row": [2]}), tmp_path, [])
    with pytest.raises(DECODE_ERRORS):
        load_rgb(path)
