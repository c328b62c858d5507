"""audit_dataset.py: what is told and written, exit codes, and users' mistakes."""

import functools
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

import audit_dataset
from helpers import write_csv


@functools.cache
def picture(seed: int) -> Image.Image:
    """A colour picture of coarse and fine structure."""
    noise = np.random.default_rng(seed).normal(size=(96, 96, 3))
    planes = sum(s * gaussian_filter(noise, (s, s, 0), mode="wrap") for s in (4, 8, 16))
    return Image.fromarray((127 + 120 * planes / np.abs(planes).max()).astype(np.uint8))


def save(folder: Path, **images: Image.Image) -> Path:
    """PNG files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in images.items():
        image.save(folder / f"{name}.png")
    return folder


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Two data sets: a/list.csv without splits, b/list.csv with; two pictures are in both."""
    mirrored = picture(1).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    save(tmp_path / "a", p0=picture(0), p1=picture(1), p2=picture(2), copy=picture(2))
    save(tmp_path / "b", q0=picture(0), q1=mirrored, q7=picture(7), q8=picture(8))
    write_csv(tmp_path / "a" / "list.csv", image=["p0.png", "p1.png", "p2.png", "copy.png"])
    write_csv(tmp_path / "b" / "list.csv", image=["q7.png", "q0.png", "q8.png", "q1.png"],
              split=["test", "train", "val", "test"])
    return tmp_path


def run(*words: object) -> int:
    """The script in this process."""
    return audit_dataset.main([*map(str, words), "--num_workers", "1"])


def test_within_and_between(world: Path, caplog) -> None:
    """Every pair of lists in a line, the pairs between lists, the table; exit code 1."""
    a, b, output = world / "a" / "list.csv", world / "b" / "list.csv", world / "out" / "pairs.csv"
    assert run(a, b, "--output", output) == 1
    lines = [record.message for record in caplog.records if record.name == "furnace.command_line"]
    assert lines == [
        f"within {a}, 4 images: 1 exact and 0 near pairs",
        f"between {a} and {b} (train): 1 exact and 0 near pairs, 1 of 4 and 1 of 1 images",
        f"between {a} and {b} (val): 0 exact and 0 near pairs",
        f"between {a} and {b} (test): 0 exact and 1 near pairs, 1 of 4 and 1 of 2 images",
        f"within {b} (train), 1 images: 0 exact and 0 near pairs",
        f"between {b} (train) and {b} (val): 0 exact and 0 near pairs",
        f"between {b} (train) and {b} (test): 0 exact and 0 near pairs",
        f"within {b} (val), 1 images: 0 exact and 0 near pairs",
        f"between {b} (val) and {b} (test): 0 exact and 0 near pairs",
        f"within {b} (test), 2 images: 0 exact and 0 near pairs",
        f"  p0.png of {a} and q0.png of {b} (train): the same pixels",
        f"  p1.png of {a} and q1.png of {b} (test): nearly the same (0 of 63 bits differ, mirrored)",
        f"3 pairs written to {output}"]
    table = pd.read_csv(output, keep_default_na=False)
    assert list(table) == ["list_a", "split_a", "image_a", "list_b", "split_b", "image_b", "kind", "distance",
                           "similarity", "orientation"]
    assert table.drop(columns="similarity").to_numpy().tolist() == [
        [str(a), "", "p2.png", str(a), "", "copy.png", "exact", 0, "same"],
        [str(a), "", "p0.png", str(b), "train", "q0.png", "exact", 0, "same"],
        [str(a), "", "p1.png", str(b), "test", "q1.png", "near", 0, "mirrored"]]
    assert table["similarity"].tolist() == pytest.approx([1, 1, 1], abs=0.002)


def test_copies_within_a_list_end_with_0(world: Path, caplog) -> None:
    """They may be meant; --between_only does not look for them. A table without pairs has its header."""
    assert run(world / "a" / "list.csv") == 0 and "1 exact and 0 near" in caplog.text
    caplog.clear()
    fine = save(world / "fine", x=picture(20))
    assert run(world / "a" / "list.csv", fine, "--between_only", "--output", world / "none.csv") == 0
    assert "within /" not in caplog.text and f"and {fine}: 0 exact and 0 near pairs" in caplog.text
    assert (world / "none.csv").read_text().startswith("list_a,split_a,image_a") and \
        len((world / "none.csv").read_text().splitlines()) == 1


def test_splits_of_one_list_are_lists(world: Path, caplog) -> None:
    """A picture in train and test of one CSV: exit code 1. An empty cell and other names are lists, too."""
    images = ["p0.png", "p1.png", "p2.png", "copy.png"]
    leaking = write_csv(world / "a" / "leaking.csv", image=images, split=["pool", "", "test", "train"])
    assert run(leaking) == 1
    assert f"copy.png of {leaking} (train) and p2.png of {leaking} (test): the same pixels" in caplog.text
    order = re.findall(r"within .*leaking\.csv(?: \((\w+)\))?,", caplog.text)
    assert order == ["train", "test", "", "pool"]
    clean = write_csv(world / "a" / "clean.csv", image=images, split=["train", "val", "test", "test"])
    assert run(clean) == 0


def test_folders_and_roots(world: Path, caplog) -> None:
    """A folder beside a CSV elsewhere: one --root_path for the CSVs, or one for each list."""
    moved = (world / "b" / "list.csv").rename(world / "moved.csv")
    for roots in ([world / "b"], ["", world / "b"]):
        caplog.clear()
        assert run(world / "a", moved, "--root_path", *roots) == 1
        assert f"p0.png of {world / 'a'} and q0.png of {moved} (train): the same pixels" in caplog.text


def test_threshold(world: Path) -> None:
    """--threshold reaches the search."""
    image = picture(2)
    crop = save(world / "c", crop=image.crop((3, 3, 93, 93)))
    alone = save(world / "d", p2=image)
    assert run(alone, crop) == 1 and run(alone, crop, "--threshold", 0) == 0


def test_twenty_pairs_are_told(world: Path, caplog) -> None:
    """The rest is counted."""
    pictures = {f"p{seed}": picture(seed) for seed in range(22)}
    assert run(save(world / "c", **pictures), save(world / "d", **pictures)) == 1
    assert caplog.text.count(": the same pixels") == 20 and "... and 2 more between lists" in caplog.text


def test_output_is_replaced_only_when_asked(world: Path, capsys) -> None:
    """Nor is an input."""
    output = world / "pairs.csv"
    output.write_text("mine")
    assert run(world / "a", "--output", output) == 2 and "add --overwrite" in capsys.readouterr().err
    assert output.read_text() == "mine"
    assert run(world / "a", "--output", output, "--overwrite") == 0 and output.read_text().startswith("list_a,")
    csv = world / "a" / "list.csv"
    before = csv.read_bytes()
    assert run(csv, "--output", csv, "--overwrite") == 2 and "is the input" in capsys.readouterr().err
    assert csv.read_bytes() == before


def damage(world: Path) -> list[object]:
    """A file in each list that breaks while decoded."""
    for path in (world / "a" / "p1.png", world / "b" / "q8.png"):
        path.write_bytes(path.read_bytes()[:3000])
    return [world / "a" / "list.csv", world / "b" / "list.csv"]


def empty(world: Path) -> list[object]:
    """Files that are no images, in each list."""
    (world / "a" / "p1.png").write_bytes(b"")
    (world / "b" / "q8.png").write_text("text")
    return [world / "a" / "list.csv", world / "b" / "list.csv"]


MISTAKES = {
    "damaged images": (damage, r"1 image cannot be decoded:\n  row 3, .*p1\.png.*1 image cannot be decoded:\n  row 4, "
                               r".*q8\.png"),
    "no images": (empty, r"1 problem in .*p1\.png.*0 bytes.*1 problem in .*q8\.png.*no image format"),
    "no such list": (lambda w: [w / "a", w / "nowhere"], "nowhere does not exist: give an image file"),
    "a list twice": (lambda w: [w / "a", w / "b" / ".." / "a"], "is given twice"),
    "another ending": (lambda w: [w / "a", "--output", w / "x.txt"], r"x\.txt must end in \.csv"),
    "output in the folder": (lambda w: [w / "a", "--output", w / "a" / "x.csv"], "written into the input folder"),
    "roots too few": (lambda w: [w / "a", w / "b", w / "b" / "list.csv", "--root_path", w, w],
                      "2 folders for 3 lists: give one for all"),
    "root that is none": (lambda w: [w / "b" / "list.csv", "--root_path", w / "no"], "is not a folder"),
    "threshold": (lambda w: [w / "a", "--threshold", 21], "21 is above 20"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_end_with_2_and_a_message(world: Path, capsys, case: str) -> None:
    """No traceback, nothing written."""
    act, words = MISTAKES[case]
    command = act(world)
    before = sorted(world.rglob("*"))
    assert run(*command) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and "Traceback" not in error
    assert re.search(words, error, re.S), error
    assert sorted(world.rglob("*")) == before
