"""Copies within and between lists: exact, near and neither; the search against brute force; the refusal."""

import functools
import io
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from furnace.data import overlap as module
from furnace.data.image_prints import Prints, image_prints
from furnace.data.overlap import Pair, candidates, describe, find_overlap, forbid_overlap
from furnace.data.unlabelled import read_images
from furnace.runtime.files import UserError
from helpers import HAM, write_csv

FLIP, TURN = Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_90


@functools.cache
def picture(seed: int, side: int = 128) -> Image.Image:
    """A colour picture of coarse and fine structure."""
    noise = np.random.default_rng(seed).normal(size=(side, side, 3))
    planes = sum(s * gaussian_filter(noise, (s, s, 0), mode="wrap") for s in (5, 10, 20))
    return Image.fromarray((127 + 120 * planes / np.abs(planes).max()).astype(np.uint8))


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    """Compressed and read again."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def cropped(image: Image.Image, share: float) -> Image.Image:
    """Without this share at every border."""
    x, y = (round(side * share) for side in image.size)
    return image.crop((x, y, image.width - x, image.height - y))


def prints_of(folder: Path, images: dict[str, Image.Image], number: int = 0) -> Prints:
    """Prints of PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        image.save(folder / f"{name}.png")
    return replace(image_prints(read_images(folder)), number=number)


def told(pairs: list[Pair]) -> list[tuple[str, str, str]]:
    """Names without endings, and the kind."""
    return [(pair.first.removesuffix(".png"), pair.second.removesuffix(".png"), pair.kind) for pair in pairs]


COPIES = {
    "compressed": (lambda image: jpeg(image, 50), "same"),
    "half": (lambda image: image.resize((64, 64)), "same"),
    "double": (lambda image: image.resize((256, 256)), "same"),
    "squeezed": (lambda image: image.resize((160, 120)), "same"),
    "cropped": (lambda image: cropped(image, 0.02), "same"),
    "mirrored": (lambda image: image.transpose(FLIP), "mirrored"),
    "turned": (lambda image: jpeg(image.transpose(TURN), 70), "turned 270"),  # three more make the round
    "turned and mirrored": (lambda image: image.transpose(TURN).transpose(FLIP).resize((90, 90)),
                            "mirrored, turned 270"),
}


@pytest.mark.parametrize("copy", COPIES)
def test_near_copies(tmp_path: Path, copy: str) -> None:
    """Found within a list and between lists, with what turns the second into the first."""
    change, orientation = COPIES[copy]
    images = {f"p{seed}": picture(seed) for seed in range(6)}
    (pair,) = find_overlap(prints_of(tmp_path / "within", {**images, "q": change(images["p3"])}))
    assert told([pair]) == [("p3", "q", "near")] and pair.orientation == orientation
    assert 0 <= pair.distance <= 12 and 0.98 <= pair.similarity <= 1
    (pair,) = find_overlap(prints_of(tmp_path / "a", images, 4), prints_of(tmp_path / "b", {"q": change(images["p2"])},
                                                                           5))
    assert (*told([pair]), pair.list_a, pair.list_b) == (("p2", "q", "near"), 4, 5)
    assert pair.orientation == orientation


def test_same_layout_is_not_a_copy(tmp_path: Path) -> None:
    """The hashes agree, the grain does not."""
    rng = np.random.default_rng(0)
    layout = gaussian_filter(rng.normal(size=(128, 128)), 9, mode="wrap")
    images = {}
    for seed in range(6):
        grain = gaussian_filter(rng.normal(size=(128, 128)), 3, mode="wrap")
        values = 127 + 35 * layout / layout.std() + 7 * grain / grain.std()
        images[f"p{seed}"] = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    prints = prints_of(tmp_path, images)
    distances = [int(x ^ y).bit_count() for k, x in enumerate(prints.hashes[:, 0]) for y in prints.hashes[:k, 0]]
    assert min(distances) <= 12 and find_overlap(prints) == []


def test_exact_copies_are_listed_once_each(tmp_path: Path) -> None:
    """Three equal files: two pairs; two of one list and three of another: four, in which all five occur."""
    one, other = picture(0), picture(1)
    a = prints_of(tmp_path / "a", {"a1": one, "a2": one, "x": other}, 0)
    b = prints_of(tmp_path / "b", {"b1": one, "b2": one, "b3": one, "y": picture(2)}, 1)
    assert told(find_overlap(a)) == [("a1", "a2", "exact")]
    assert told(find_overlap(b)) == [("b1", "b2", "exact"), ("b1", "b3", "exact")]
    pairs = find_overlap(a, b)
    assert told(pairs) == [("a1", "b1", "exact"), ("a1", "b2", "exact"), ("a1", "b3", "exact"), ("a2", "b1", "exact")]
    assert all((p.distance, p.orientation, p.similarity, p.list_a, p.list_b) == (0, "same", 1, 0, 1) for p in pairs)


def test_near_copies_of_exact_copies_are_all_listed(tmp_path: Path) -> None:
    """Otherwise one would stay in training."""
    one = picture(0)
    a = prints_of(tmp_path / "a", {"a1": one, "a2": one, "x": picture(1)})
    b = prints_of(tmp_path / "b", {"b1": jpeg(one, 70), "b2": jpeg(one, 70), "b3": one})
    assert told(find_overlap(a, b)) == [("a1", "b3", "exact"), ("a2", "b3", "exact"), ("a1", "b1", "near"),
                                        ("a1", "b2", "near"), ("a2", "b1", "near")]


def test_pairs_come_by_distance(tmp_path: Path) -> None:
    """The surest first; the threshold is the largest distance."""
    one = picture(0)
    prints = prints_of(tmp_path, {"a": one, "b": cropped(one, 0.03), "c": one.transpose(FLIP), "d": picture(1)})
    pairs = find_overlap(prints)
    assert told(pairs)[0] == ("a", "c", "near") and ("a", "b", "near") in told(pairs)
    distances = [pair.distance for pair in pairs]
    assert distances == sorted(distances) and distances[0] == 0 < distances[-1]
    below = find_overlap(prints, threshold=distances[-1] - 1)
    assert below == [pair for pair in pairs if pair.distance < distances[-1]]
    for wrong in (-1, 21):
        with pytest.raises(ValueError, match="not in 0..20"):
            find_overlap(prints, threshold=wrong)


def test_images_of_one_colour(tmp_path: Path, caplog) -> None:
    """They have no structure to compare: only equal pixels count. An empty list has no pairs."""
    caplog.set_level("INFO")
    plain = {name: Image.new("RGB", (40, 40), (level,) * 3) for name, level in (("a", 90), ("b", 90), ("c", 91))}
    prints = prints_of(tmp_path, {**plain, "p": picture(0)})
    assert told(find_overlap(prints)) == [("a", "b", "exact")]
    assert "3 images are of (nearly) one colour" in caplog.text
    nothing = prints.take([], number=1)
    assert find_overlap(nothing) == find_overlap(prints, nothing) == find_overlap(nothing, prints) == []


# ------------------------------------------------------------------------------------------------------------- search

@pytest.mark.parametrize("numpy_1", [False, True])
def test_search_is_brute_force(monkeypatch, numpy_1: bool) -> None:
    """All pairs whose hashes differ little, in blocks of any size, within one list and between two."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2**63, 1, dtype=np.uint64)
    flips = [sum(1 << int(k) for k in rng.choice(64, rng.integers(0, 9), replace=False)) for _ in range(50 * 8)]
    hashes = base ^ np.array(flips, dtype=np.uint64).reshape(50, 8)
    monkeypatch.setattr(module, "COLUMNS", 16)
    monkeypatch.setattr(module, "PIECE", 40)
    if numpy_1:
        monkeypatch.delattr(np, "bitwise_count")
    want = {(i, j, o): (int(hashes[i, 0]) ^ int(hashes[j, o])).bit_count()
            for i in range(50) for j in range(50) for o in range(8)}
    for start, stop, first_row in ((0, 50, None), (20, 33, 20), (0, 7, 0)):
        found = {}
        for i, j, distance, orientation in candidates(hashes[start:stop, 0], hashes, 6, first_row=first_row):
            for key in zip(i + start, j, orientation, distance, strict=True):
                assert key[:3] not in found
                found[tuple(map(int, key[:3]))] = int(key[3])
        assert found == {key: d for key, d in want.items() if d <= 6 and start <= key[0] < stop
                         and (first_row is None or key[1] > key[0])}
        assert len(found) > 50


def test_blocks_do_not_matter(tmp_path: Path, monkeypatch) -> None:
    """Copies far from each other in long lists, threads and small blocks."""
    images = {f"p{seed:02d}": picture(seed, side=64) for seed in range(20)}
    images |= {f"q{seed:02d}": images[f"p{seed:02d}"].transpose(FLIP) for seed in range(0, 20, 3)}
    prints = prints_of(tmp_path, images)
    whole = find_overlap(prints, workers=1)
    assert told(whole) == [(f"p{seed:02d}", f"q{seed:02d}", "near") for seed in range(0, 20, 3)]
    monkeypatch.setattr(module, "ROWS", 3)
    monkeypatch.setattr(module, "COLUMNS", 4)
    assert find_overlap(prints, workers=3) == whole


# ------------------------------------------------------------------------------------------------------------ refusal

@pytest.fixture
def lists(tmp_path: Path) -> tuple[Path, Path]:
    """A list of five training images, and one of a train, a val and two test images, with other names."""
    for name, image in {"a/p0": picture(0), "a/p1": picture(1), "a/p2": picture(2), "a/p3": picture(3),
                        "a/p4": picture(4), "b/x": picture(0), "b/y": picture(1).transpose(FLIP), "b/z": picture(2),
                        "b/new": picture(9)}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        image.save(tmp_path / f"{name}.png")
    return (write_csv(tmp_path / "a" / "train.csv", image=[f"p{k}.png" for k in range(5)]),
            write_csv(tmp_path / "b" / "test.csv", image=["x.png", "y.png", "z.png", "new.png"],
                      split=["train", "val", "test", "test"]))


def test_forbid_overlap(lists: tuple[Path, Path], caplog) -> None:
    """Pairs with held-out images only; the folder of the images; more lists than one."""
    caplog.set_level("INFO")
    train, test = lists
    message = (r"^2 training images are also in a test list:\n"
               r"  p2\.png and z\.png of .*test\.csv: the same pixels\n"
               r"  p1\.png and y\.png of .*test\.csv: nearly the same \(0 of 63 bits differ, mirrored\)\n"
               r"  Take them out")
    with pytest.raises(UserError, match=message):
        forbid_overlap(read_images(train), [test])
    assert "test.csv: 1 images of its split train are not compared" in caplog.text
    elsewhere = shutil.copy(test, test.parent.parent / "moved.csv")
    fine = write_csv(test.parent / "fine.csv", image=["new.png"])
    with pytest.raises(UserError, match=r"z\.png of .*moved\.csv"):
        forbid_overlap(read_images(train), [fine, Path(elsewhere)], roots=[None, test.parent])
    forbid_overlap(read_images(train), [fine])
    assert "none of the 5 training images is in" in caplog.text


def test_forbid_overlap_without_held_out_images(lists: tuple[Path, Path]) -> None:
    train, test = lists
    only = write_csv(test.parent / "only.csv", image=["new.png"], split=["train"])
    with pytest.raises(UserError, match="of the split train only"):
        forbid_overlap(read_images(train), [only])


def test_forbid_overlap_lists_twenty(tmp_path: Path) -> None:
    """And counts the rest."""
    for name in ("a", "b"):
        prints_of(tmp_path / name, {f"p{seed:02d}": picture(seed, side=48) for seed in range(23)})
    with pytest.raises(UserError) as caught:
        forbid_overlap(read_images(tmp_path / "a"), [tmp_path / "b"])
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("23 training images are") and len(lines) == 23
    assert lines[20].startswith("  p19.png and p19.png of") and lines[21] == "  ... and 3 more pairs"


def test_describe() -> None:
    near = Pair(first="a", second="b", list_a=0, list_b=1, kind="near", distance=4, orientation="turned 90",
                similarity=0.99)
    assert describe(near) == "nearly the same (4 of 63 bits differ, turned 90)"
    assert describe(replace(near, orientation="same")) == "nearly the same (4 of 63 bits differ)"
    assert describe(replace(near, kind="exact")) == "the same pixels"


# -------------------------------------------------------------------------------------------------------- real images

@pytest.mark.slow
@pytest.mark.skipif(not HAM.is_dir(), reason="needs the real images in ../shared/data/ham10000_224")
def test_real_images(tmp_path: Path) -> None:
    """7,496 dermoscopic images: three pairs, each of one lesion; and copies of 100 of them are found again."""
    manifest = read_images(HAM / "metadata.csv")
    prints = image_prints(manifest)
    pairs = find_overlap(prints)
    assert {(pair.first[7:-4], pair.second[7:-4]) for pair in pairs} == {
        ("ISIC_0034921", "ISIC_0035597"), ("ISIC_0034228", "ISIC_0034248"), ("ISIC_0034957", "ISIC_0035637")}
    changes = {"q50": lambda image: jpeg(image, 50), "q90": lambda image: jpeg(image, 90),
               "half": lambda image: image.resize((112, 112)), "double": lambda image: image.resize((448, 448)),
               "mirror": lambda image: image.transpose(FLIP), "turn": lambda image: jpeg(image.transpose(TURN), 70),
               "crop": lambda image: cropped(image, 0.02)}
    chosen = manifest.filenames[::75]
    for change, function in changes.items():
        folder = tmp_path / change
        images = {Path(name).stem: function(Image.open(HAM / name).convert("RGB")) for name in chosen}
        found = find_overlap(prints, prints_of(folder, images))
        own = {pair.second for pair in found if Path(pair.first).stem == Path(pair.second).stem}
        assert len(own) >= len(chosen) - (1 if change == "crop" else 0), change
        assert len(found) - len(own) <= 3, change
