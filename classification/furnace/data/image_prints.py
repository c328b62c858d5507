"""What images are compared by to find copies: digests of their pixels, perceptual hashes and small grey thumbnails."""

import hashlib
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.fft import dctn
from scipy.ndimage import gaussian_filter

from furnace.data.datasets import decode, refuse_broken
from furnace.data.images import load_rgb
from furnace.data.manifest import Manifest
from furnace.runtime import distributed
from furnace.runtime.progress import progress

logger = logging.getLogger(__name__)

SIDE = 32  # pixels of a thumbnail
FLAT = 2.0  # grey levels: a thumbnail that varies less (standard deviation) has nothing to compare
# what turns a picture into another: mirrored left to right, then turned counterclockwise
ORIENTATIONS = ("same", "turned 90", "turned 180", "turned 270", "mirrored", "mirrored, turned 90",
                "mirrored, turned 180", "mirrored, turned 270")
PIECE = 2048  # thumbnails that are worked on at once
ROUGH, ALIKE, DETAIL = 0.93, 0.98, 0.85  # least correlations of thumbnails: as they are, aligned, and of fine structure


@dataclass(frozen=True)
class Prints:
    """What images are compared by, about 1.1 kB for each.

    Attributes:
        names: (N,) as the list names them.
        digests: (N,) of size and decoded pixels.
        thumbnails: (N, 32, 32) uint8, grey.
        hashes: (N, 8) uint64, of the thumbnail in each of ORIENTATIONS.
        number: of the list.
    """

    names: np.ndarray
    digests: np.ndarray
    thumbnails: np.ndarray
    hashes: np.ndarray
    number: int = 0

    def __len__(self) -> int:
        return len(self.names)

    def take(self, indices: Sequence[int] | np.ndarray, *, number: int) -> "Prints":
        """The images at these positions, as a list of another number."""
        chosen = np.asarray(indices, dtype=np.int64)
        return Prints(names=self.names[chosen], digests=self.digests[chosen], thumbnails=self.thumbnails[chosen],
                      hashes=self.hashes[chosen], number=number)


def image_prints(manifest: Manifest, *, workers: int | None = None) -> Prints:
    """Decode every image once, with threads.

    Args:
        manifest: the images.
        workers: threads; None: as many as the machine has cores.

    Raises:
        UserError: files that cannot be decoded, all of them.
    """
    paths = [manifest.path_of(i) for i in range(len(manifest))]
    thumbnails = np.zeros((len(paths), SIDE, SIDE), dtype=np.uint8)
    digests, broken = np.zeros(len(paths), dtype="S32"), []
    with ThreadPoolExecutor(max_workers=threads(workers)) as pool:
        prints = progress(pool.map(lambda path: decode(_print, path), paths), total=len(paths), unit="image",
                          desc=f"hashing {manifest.name}", disable=not distributed.is_main())
        for i, (found, reason) in enumerate(prints):
            if reason is not None:
                broken.append((i, reason))
            else:
                digests[i], thumbnails[i] = found
    if broken:
        refuse_broken(manifest, broken)
    if flat := sum(thumbnail.std() < FLAT for thumbnail in thumbnails):
        logger.info("%s: %d images are of (nearly) one colour: only their pixels are compared", manifest.name, flat)
    return Prints(names=np.array(manifest.filenames, dtype=object), digests=digests, thumbnails=thumbnails,
                  hashes=perceptual_hashes(thumbnails))


def threads(workers: int | None) -> int:
    """As many as asked for; None: one per core, at most 16."""
    return workers or min(16, os.cpu_count() or 1)


def _print(path: Path) -> tuple[str, np.ndarray]:
    """The digest of size and pixels, and the (32, 32) thumbnail."""
    image = load_rgb(path)
    digest = hashlib.blake2b(repr(image.size).encode(), digest_size=16)
    digest.update(image.tobytes())
    small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return digest.hexdigest(), np.asarray(small)


def perceptual_hashes(thumbnails: np.ndarray) -> np.ndarray:
    """The pHash of thumbnails in eight orientations: of the 8 x 8 lowest frequencies of the cosine transform (without
    the mean), which are above their median (Zauner 2010).

    Args:
        thumbnails: (N, 32, 32) grey.

    Returns:
        (N, 8) uint64 in the order of ORIENTATIONS; one bit of each is always 0.
    """
    hashes = np.zeros((len(thumbnails), 8), dtype=np.uint64)
    sign = (-1.0) ** np.arange(8)  # a picture reversed along an axis: its odd frequencies along it change their sign
    for start in range(0, len(thumbnails), PIECE):
        part = slice(start, start + PIECE)
        low = dctn(thumbnails[part].astype(np.float64), axes=(1, 2), norm="ortho")[:, :8, :8]
        for mirrored in (False, True):
            turned = low * sign if mirrored else low
            for turns in range(4):
                values = turned.reshape(-1, 64)[:, 1:]  # (n, 8, 8) -> (n, 63)
                bits = np.pad(values > np.median(values, axis=1, keepdims=True), ((0, 0), (1, 0)))
                hashes[part, 4 * mirrored + turns] = np.packbits(bits, axis=1).view(np.uint64)[:, 0]
                turned = turned.transpose(0, 2, 1) * sign[:, None]  # a quarter turn: transposed, upside down
    return hashes


def oriented(pictures: np.ndarray, orientation: int) -> np.ndarray:
    """(N, S, S) pictures mirrored and turned, by the number in ORIENTATIONS."""
    return np.rot90(pictures[..., ::-1] if orientation >= 4 else pictures, orientation % 4, axes=(-2, -1))


# ------------------------------------------------------------------------------------------------- comparing thumbnails

def confirm(first: np.ndarray, second: np.ndarray, i: np.ndarray, j: np.ndarray, orientation: np.ndarray
            ) -> np.ndarray:
    """Compare thumbnails ``first[i]`` with ``second[j]`` so oriented; (n,) similarities, NaN where not one picture."""
    similarity = np.full(len(i), np.nan)
    for part in np.array_split(np.arange(len(i)), max(1, len(i) // PIECE)):
        x = first[i[part]].astype(np.float32)
        y = second[j[part]].astype(np.float32)
        for one in range(1, 8):
            these = orientation[part] == one
            y[these] = oriented(y[these], one)
        keep = np.flatnonzero(correlation(x, y) >= ROUGH)
        value = aligned_correlation(x[keep], y[keep])
        alike = value >= ALIKE
        keep, value = keep[alike], value[alike]
        alike = aligned_correlation(fine_structure(x[keep]), fine_structure(y[keep])) >= DETAIL
        similarity[part[keep[alike]]] = value[alike]
    return similarity


def correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(N, S, S) and (N, S, S) -> (N,)."""
    x, y = (pictures - pictures.mean(axis=(1, 2), keepdims=True) for pictures in (x, y))
    return np.einsum("nij,nij->n", x, y) / np.sqrt(np.einsum("nij,nij->n", x, x) * np.einsum("nij,nij->n", y, y))


def fine_structure(pictures: np.ndarray) -> np.ndarray:
    """(N, S, S) without what is wider than a few pixels."""
    return pictures - gaussian_filter(pictures, (0, 1.5, 1.5))


def aligned_correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Correlation after ``x`` is moved, scaled and sheared a little to fit ``y``, brightness and contrast aside.

    To first order a moved picture is the picture plus its gradients times the shifts, and the shifts of an affine map
    are linear in the place (Lucas and Kanade 1981): a linear least-squares fit for each pair, and its correlation.

    Args:
        x: (N, S, S) float32.
        y: (N, S, S) float32.

    Returns:
        (N,) in 0..1.
    """
    down, right = np.gradient(x, axis=(1, 2))
    place = np.linspace(-1, 1, x.shape[-1], dtype=np.float32)
    terms = np.stack([x, right, down, right * place, down * place, right * place[:, None], down * place[:, None]], 1)
    pixels = (x.shape[1] - 2) * (x.shape[2] - 2)  # the border has no gradient across
    terms = terms[..., 1:-1, 1:-1].reshape(len(x), 7, pixels)  # (N, 7, S - 2, S - 2) -> (N, 7, P)
    goal = y[:, 1:-1, 1:-1].reshape(len(x), pixels, 1)
    terms, goal = terms - terms.mean(axis=2, keepdims=True), goal - goal.mean(axis=1, keepdims=True)
    gram = (terms @ terms.transpose(0, 2, 1)).astype(np.float64)  # (N, 7, 7)
    gram += 1e-6 * np.trace(gram, axis1=1, axis2=2)[:, None, None] * np.eye(7) + 1e-12 * np.eye(7)
    product = (terms @ goal).astype(np.float64)  # (N, 7, 1)
    explained = (product * np.linalg.solve(gram, product)).sum(axis=(1, 2))
    return np.sqrt(np.clip(explained / np.maximum((goal ** 2).sum(axis=(1, 2)), 1e-12), 0, 1))
