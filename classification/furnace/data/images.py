"""From an image file to correct RGB, and the check that a file is an image at all."""

import hashlib
import os
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms.v2.functional import pil_to_tensor

from furnace.data.problems import ROW, Problem

# what Pillow raises on damaged files, by format (RuntimeError: AVIF)
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error, zlib.error,
                 Image.DecompressionBombError)
PIECE = 32768  # bytes at either end of a file that its content id reads
EXTENSIONS = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".jpe", ".jfif", ".jp2", ".avif",
              ".ppm", ".pgm", ".tga")


def load_rgb(path: str | Path) -> Image.Image:
    """Decode an image file to 8-bit RGB, upright.

    EXIF orientation is applied; grey, palette and CMYK images are converted; 16-bit grey is scaled to 8 bits (and not
    clipped); transparency is dropped.

    Raises:
        One of DECODE_ERRORS: the file is damaged or of a kind that has no RGB meaning (floating point).
    """
    with Image.open(path) as image:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # I;16 and, from older decoders, I with 16-bit values
            values = np.asarray(image).astype(np.int64)
            if values.min() < 0 or values.max() > 65535:
                raise ValueError(f"its values {values.min()}..{values.max()} are not 16-bit grey")
            image = Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
        elif image.mode == "F":
            raise ValueError("it holds floating-point values; save it with 8 bits a channel")
        elif image.mode == "P":
            image = image.convert("RGBA")  # palettes with transparency need the step over RGBA
        return image if image.mode == "RGB" else image.convert("RGB")  # convert copies, RGB or not


def load_rgb_tensor(path: str | Path) -> torch.Tensor:
    """Decode an image file to an upright (3, H, W) uint8 tensor; colour JPEGs by torchvision's faster decoder.

    Raises:
        One of DECODE_ERRORS, as ``load_rgb``.
    """
    with Image.open(path) as image:
        colour_jpeg = image.format == "JPEG" and image.mode == "RGB"
    try:
        from torchvision.io import ImageReadMode, decode_image
    except ImportError:  # deprecated in torchvision 0.29
        colour_jpeg = False
    if not colour_jpeg:
        return pil_to_tensor(load_rgb(path))
    content = torch.from_numpy(np.fromfile(path, dtype=np.uint8))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*TorchVision are deprecated.*")
        return decode_image(content, mode=ImageReadMode.RGB, apply_exif_orientation=True)


def check_files(frame: pd.DataFrame, root: Path, problems: list[Problem]) -> tuple[str, list[str]]:
    """Look at every image's header, with threads: missing, empty and non-image files become problems.

    Args:
        frame: with the columns image and ROW.
        root: the folder of the images.
        problems: extended in the order of the rows.

    Returns:
        Hex SHA-256 over the sorted names and contents of the images that exist, and the content id of each row's image
        ("" where there is none). A content id is the SHA-256 of the size and of the first and last 32 kB.
    """
    with ThreadPoolExecutor(max_workers=16) as pool:
        found = list(pool.map(lambda name: _look(root, name), frame["image"]))
    missing = sum(size is None for size, _, _, _ in found)
    if missing == len(found) and missing:
        problems.append(Problem("wrong folder", text=f"not one of the {missing} images lies under {root}",
                                remedy="pass the --root_path that the image column is relative to"))
    for (size, text, remedy, _), name, row in zip(found, frame["image"], frame[ROW], strict=True):
        if text:
            kind = {None: "missing file", 0: "empty file"}.get(size, "not an image")
            problems.append(Problem(kind if name else "no file name", file=name or "", row=int(row), column="image",
                                    text=text, remedy=remedy))
    ids = [content for _, _, _, content in found]
    digest = hashlib.sha256()
    for name, content in sorted({(str(name), content) for name, content in zip(frame["image"], ids, strict=True)
                                 if content}):
        digest.update(f"{name}\0{content}\n".encode())
    return digest.hexdigest(), ids


def _content_id(path: Path, size: int) -> str:
    """Tells files apart without reading large ones whole."""
    with open(path, "rb") as file:
        digest = hashlib.sha256(str(size).encode() + file.read(PIECE))
        if size > PIECE:
            file.seek(max(PIECE, size - PIECE))
            digest.update(file.read(PIECE))
    return digest.hexdigest()


def _look(root: Path, name: str | None) -> tuple[int | None, str, str, str]:
    """Size in bytes (None when missing), what is wrong ("" when nothing), the remedy, and the content id."""
    if not name:
        return None, "the cell is empty", "name the image or delete the row", ""
    path = root / name
    try:
        size = path.stat().st_size
        if path.is_dir():
            return None, "is a folder", "name an image file", ""
    except ValueError:
        return None, "the name holds a NUL byte", "correct the name", ""
    except OSError:
        ends = [end for lower in EXTENSIONS for end in (lower, lower.upper())]
        other = next((name + end for end in ends if os.path.exists(f"{path}{end}")), None)
        return None, f"{path} does not exist", f"write {other}" if other else "correct the name or --root_path", ""
    if size == 0:
        return 0, "the file has 0 bytes", "copy or download it again", ""
    try:
        with Image.open(path):
            return size, "", "", _content_id(path, size)
    except UnidentifiedImageError:
        return size, "the file's header is no image format that Pillow knows", "replace it by a real image", ""
    except DECODE_ERRORS as error:
        return size, f"cannot be opened ({error})", "replace it by a real image, readable for you", ""
