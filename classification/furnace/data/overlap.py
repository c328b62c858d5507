"""Images that are the same picture, within a list and between lists: what must not be in training and in test.

Exact: the same decoded pixels. Near: one is the other compressed, resized, cropped by about 2 %, mirrored or turned by
quarter turns. Near pairs are found by perceptual hashes and confirmed on small grey thumbnails, so that different
lesions of similar layout are not called copies.
"""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from furnace.data.image_prints import FLAT, ORIENTATIONS, PIECE, Prints, confirm, image_prints, threads
from furnace.data.manifest import Manifest
from furnace.data.unlabelled import read_images
from furnace.runtime import distributed
from furnace.runtime.files import UserError
from furnace.runtime.progress import progress

logger = logging.getLogger(__name__)

# Measured on 7,496 dermoscopic images, one of each lesion, 28 million pairs: three pairs are called near, each of two
# photographs of one lesion, and no others. Of 7,496 copies each are found: all at JPEG quality 50 and 90, at half and
# double size, mirrored, turned; all but 4 without 2 % at every border, all but 13 without 2 % at two borders, all but 2
# halved, mirrored and at quality 50; but only 68 % without 4 % at every border.
THRESHOLD = 12  # bits of 63 in which the hashes of a near pair may differ
LARGEST_THRESHOLD = 20  # beyond, too many pairs of different images would have to be confirmed
ROWS, COLUMNS = 64, 16384  # of a block of the search; the hashes of COLUMNS images are 1 MB
TOLD = 20


@dataclass(frozen=True)
class Pair:
    """Two images that are one picture.

    Attributes:
        first, second: the images as their lists name them.
        list_a, list_b: numbers of the lists they are in (``Prints.number``).
        kind: exact or near.
        distance: bits in which the perceptual hashes differ.
        orientation: what turns the second into the first, one of ORIENTATIONS.
        similarity: correlation of the aligned thumbnails.
    """

    first: str
    second: str
    list_a: int
    list_b: int
    kind: str
    distance: int
    orientation: str
    similarity: float


def find_overlap(a: Prints, b: Prints | None = None, *, threshold: int = THRESHOLD,
                 workers: int | None = None) -> list[Pair]:
    """The pairs of images that are one picture, within ``a`` or between ``a`` and ``b``.

    Every image that has a copy is in at least one pair. Not every pair is listed: of n copies each is listed with the
    first, so that a thousand equal files do not make half a million lines. Images of (nearly) one colour are compared
    by their pixels only.

    Args:
        a: a list.
        b: another, None for the pairs within ``a``.
        threshold: bits in which the hashes of near pairs may differ, 0 to 20.
        workers: threads; None: as many as the machine has cores.

    Returns:
        Exact pairs, then near ones by their distance.
    """
    if not 0 <= threshold <= LARGEST_THRESHOLD:
        raise ValueError(f"threshold {threshold} is not in 0..{LARGEST_THRESHOLD}")
    of_a = _copies(a)
    of_b = of_a if b is None else _copies(b)
    second = a if b is None else b
    found = []
    for digest, rows in of_a.items():
        for i, j in _star(rows, of_b.get(digest, []) if b is not None else None):
            found.append((i, j, 0, 0, 1.0, "exact"))
    firsts_a, firsts_b = ([rows[0] for rows in of.values()] for of in (of_a, of_b))
    for row, column, distance, orientation, similarity in _near(a, b, firsts_a, firsts_b, threshold, workers):
        if b is not None and a.digests[row] == b.digests[column]:
            continue
        for i, j in _star(of_a[a.digests[row]], of_b[second.digests[column]]):
            found.append((i, j, distance, orientation, similarity, "near"))
    found.sort(key=lambda pair: (pair[5] != "exact", pair[2], pair[0], pair[1]))
    return [Pair(first=a.names[i], second=second.names[j], list_a=a.number, list_b=second.number, kind=kind,
                 distance=distance, orientation=ORIENTATIONS[orientation], similarity=similarity)
            for i, j, distance, orientation, similarity, kind in found]


def _copies(prints: Prints) -> dict[bytes, list[int]]:
    """Positions of the images of each content, the earliest first."""
    copies: dict[bytes, list[int]] = {}
    for i, digest in enumerate(prints.digests.tolist()):
        copies.setdefault(digest, []).append(i)
    return copies


def _star(first: list[int], second: list[int] | None) -> Iterator[tuple[int, int]]:
    """Pairs in which every copy occurs: within ``first`` (``second`` None), or between the two."""
    if second is None:
        yield from ((first[0], i) for i in first[1:])
    elif second:
        yield from ((first[0], j) for j in second)
        yield from ((i, second[0]) for i in first[1:])


def _near(a: Prints, b: Prints | None, firsts_a: list[int], firsts_b: list[int], threshold: int,
          workers: int | None) -> list[tuple[int, int, int, int, float]]:
    """Confirmed near pairs: (position in a, position in b, distance, orientation, similarity)."""
    rows = _structured(a, firsts_a)
    columns = rows if b is None else _structured(b, firsts_b)
    second = a if b is None else b
    hashes = second.hashes[columns]

    def search(start: int) -> list[tuple[int, int, int, int, float]]:
        best: dict[tuple[int, int], tuple[int, int, float]] = {}
        block = a.hashes[rows[start:start + ROWS], 0]
        for i, j, distance, orientation in candidates(block, hashes, threshold, first_row=start if b is None else None):
            i, j = rows[start + i], columns[j]
            similarity = confirm(a.thumbnails, second.thumbnails, i, j, orientation)
            for k in np.flatnonzero(~np.isnan(similarity)):
                pair = (int(distance[k]), int(orientation[k]), float(similarity[k]))
                key = (int(i[k]), int(j[k]))
                if key not in best or best[key][2] < pair[2]:
                    best[key] = pair
        return [(*key, *pair) for key, pair in best.items()]

    starts = range(0, len(rows), ROWS)
    with ThreadPoolExecutor(max_workers=threads(workers)) as pool:
        blocks = progress(pool.map(search, starts), total=len(starts), unit=f" x {ROWS} images", desc="comparing",
                          leave=False, disable=len(starts) < 100 or not distributed.is_main())
        return [pair for block in blocks for pair in block]


def _structured(prints: Prints, positions: list[int]) -> np.ndarray:
    """The positions whose thumbnail is not of one colour."""
    return np.array([i for i in positions if prints.thumbnails[i].std() >= FLAT], dtype=np.int64)


def candidates(hashes: np.ndarray, others: np.ndarray, threshold: int, *, first_row: int | None = None
               ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """The pairs whose hashes differ in at most ``threshold`` bits, some thousands at a time.

    Args:
        hashes: (R,) uint64.
        others: (M, 8) uint64.
        threshold: bits.
        first_row: where ``hashes`` begins in ``others`` when both are of one list; only later ones are compared then.

    Yields:
        Row, column, distance and orientation of each, (n,) integers.
    """
    for start in range(0 if first_row is None else first_row, len(others), COLUMNS):
        block = np.ascontiguousarray(others[start:start + COLUMNS]).reshape(-1)  # (m, 8) -> (8 m,)
        different, count = np.empty_like(block), np.empty(len(block), dtype=np.uint8)
        waiting, size = [], 0
        for row, one in enumerate(hashes):
            np.bitwise_xor(block, one, out=different)
            distance = _count_bits(different, count)
            hits = np.flatnonzero(distance <= threshold)
            column = hits // 8 + start
            if first_row is not None:
                hits, column = hits[column > first_row + row], column[column > first_row + row]
            waiting.append((np.full(len(hits), row), column, distance[hits].astype(np.int64), hits % 8))
            size += len(hits)
            if size >= PIECE or row == len(hashes) - 1:
                if size:
                    yield tuple(np.concatenate(parts) for parts in zip(*waiting, strict=True))
                waiting, size = [], 0


BITS = np.unpackbits(np.arange(65536, dtype=np.uint16).view(np.uint8)).reshape(65536, 16).sum(axis=1, dtype=np.uint8)


def _count_bits(numbers: np.ndarray, out: np.ndarray) -> np.ndarray:
    """(n,) uint64 -> how many bits are set, (n,) uint8."""
    if hasattr(np, "bitwise_count"):
        return np.bitwise_count(numbers, out=out)
    return BITS[numbers.view(np.uint16)].reshape(-1, 4).sum(axis=1, dtype=np.uint8)  # numpy 1


# ------------------------------------------------------------------------------------------------------------ refusal

def forbid_overlap(train: Manifest, tests: Sequence[Path], *, roots: Sequence[Path | None] | None = None,
                   threshold: int = THRESHOLD, workers: int | None = None,
                   report_folder: Path | None = None) -> None:
    """Refuse training images that are also in test lists.

    Of a test list with a column split the rows of train are left out: they may be trained on.

    Args:
        train: the images that are trained on.
        tests: CSVs or folders of images.
        roots: for each of ``tests`` the folder of its images; None for the CSVs' own.
        threshold: as for ``find_overlap``.
        workers: threads.
        report_folder: where the full list of a test list's problems goes.

    Raises:
        UserError: there are such images (the first 20 pairs are listed), or a test list has no images to compare.
    """
    manifests = []
    for path, root in zip(tests, roots or [None] * len(tests), strict=True):
        manifest = read_images(path, root, report_folder=report_folder)
        held_out = np.flatnonzero(manifest.frame["split"] != "train")
        if len(held_out) == 0:
            raise UserError(f"{path} has images of the split train only, and those may be trained on: give the list of "
                            "the test images")
        if len(held_out) < len(manifest):
            logger.info("%s: %d images of its split train are not compared", path, len(manifest) - len(held_out))
        manifests.append(manifest.take(held_out))
    prints = image_prints(train, workers=workers)
    pairs = []
    for number, manifest in enumerate(manifests, start=1):
        pairs += find_overlap(prints, replace(image_prints(manifest, workers=workers), number=number),
                              threshold=threshold, workers=workers)
    if not pairs:
        logger.info("none of the %s training images is in %s", f"{len(train):,}", ", ".join(map(str, tests)))
        return
    images = len({pair.first for pair in pairs})
    lines = [f"  {pair.first} and {pair.second} of {tests[pair.list_b - 1]}: {describe(pair)}" for pair in pairs[:TOLD]]
    if len(pairs) > TOLD:
        lines.append(f"  ... and {len(pairs) - TOLD} more pairs")
    raise UserError(f"{images} training image{'s are' if images > 1 else ' is'} also in a test list:\n"
                    + "\n".join(lines) + "\n  Take them out of the training list (audit_dataset.py lists all of them), "
                    "or the test result is too good.")


def describe(pair: Pair) -> str:
    """A pair's kind in words."""
    turned = "" if pair.orientation == "same" else f", {pair.orientation}"
    return "the same pixels" if pair.kind == "exact" else f"nearly the same ({pair.distance} of 63 bits differ{turned})"
