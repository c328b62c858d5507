"""extract_features.py: files written, values, and users' mistakes."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors
import torch
from PIL import Image

import extract_features
from furnace.data.images import load_rgb
from furnace.data.transforms import build_transform
from furnace.models import create_backbone
from helpers import draw_images, write_csv

plot = extract_features.plot_scatter
VIT = ["--model", "timm:test_vit", "--pretrained_checkpoint", "random", "--input_size", "64"]


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    """Five images with labels, ages and sites, in an order that is not the alphabet's."""
    names = ["d.png", "a.png", "sub/e.png", "b.png", "c.png"]
    draw_images(tmp_path / "data", names, size=(80, 72))
    return write_csv(tmp_path / "data" / "list.csv", image=names, label=[1, 0, 2, 0, 1], age=[30, 41.5, "", 52, 63],
                     site=["arm", "leg", "arm", "", "face"])


def run(source: Path, output: Path, *more: str, model: list[str] | None = None) -> int:
    """extract_features.py in this process."""
    return extract_features.main([str(source), "--output", str(output), "--amp_dtype", "fp32", "--num_workers", "0",
                                  *(model or VIT), *more])


def by_hand(paths: list[Path]) -> np.ndarray:
    """(N, D), an image at a time."""
    backbone = create_backbone("timm:test_vit", "random", input_size=64)
    transform = build_transform(backbone)
    with torch.no_grad():
        return torch.cat([backbone(transform(load_rgb(path))[None]) for path in paths]).numpy()


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file's bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---------------------------------------------------------------------------------------------------- what is written

def test_npz_of_a_csv(csv: Path, tmp_path: Path) -> None:
    """The rows of the CSV in its order, with all its columns; the input untouched."""
    before = snapshot(csv.parent)
    assert run(csv, tmp_path / "out" / "features.npz") == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["features.csv", "features.npz"]
    table = pd.read_csv(tmp_path / "out" / "features.csv")
    source = pd.read_csv(csv)
    assert list(table) == ["row", "filename", "label", "age", "site"] and table["row"].tolist() == [0, 1, 2, 3, 4]
    pd.testing.assert_frame_equal(table.drop(columns=["row", "filename"]), source.drop(columns="image"))
    with np.load(tmp_path / "out" / "features.npz", allow_pickle=False) as read:
        assert read["filenames"].tolist() == table["filename"].tolist() == source["image"].tolist()
        assert read["labels"].tolist() == [1, 0, 2, 0, 1]
        want = by_hand([csv.parent / name for name in source["image"]])
        np.testing.assert_allclose(read["embeddings"], want, atol=1e-5)
        metadata = json.loads(str(read["metadata"]))
    backbone = create_backbone("timm:test_vit", "random", input_size=64)
    assert metadata["model"] == "timm:test_vit" and metadata["precision"] == "fp32"
    assert metadata["weights_sha256"] == backbone.provenance.sha256
    assert metadata["transform"] == {"mode": "published", **backbone.provenance.data_config}
    assert snapshot(csv.parent) == before


def test_safetensors_of_a_folder(csv: Path, tmp_path: Path) -> None:
    """No labels; the CSV in the folder is no image."""
    assert run(csv.parent, tmp_path / "f.safetensors") == 0
    with safetensors.safe_open(tmp_path / "f.safetensors", framework="numpy") as read:
        names = json.loads(read.metadata()["filenames"])
        assert names == ["a.png", "b.png", "c.png", "d.png", "sub/e.png"] and list(read.keys()) == ["embeddings"]
        np.testing.assert_allclose(read.get_tensor("embeddings"), by_hand([csv.parent / n for n in names]), atol=1e-5)
    assert list(pd.read_csv(tmp_path / "f.csv")) == ["row", "filename"]


def test_one_image(csv: Path, tmp_path: Path) -> None:
    assert run(csv.parent / "a.png", tmp_path / "f.npz") == 0
    with np.load(tmp_path / "f.npz") as read:
        np.testing.assert_allclose(read["embeddings"], by_hand([csv.parent / "a.png"]), atol=1e-5)


def test_root_path_and_own_list_as_input(csv: Path, tmp_path: Path) -> None:
    """features.csv names the images in its column filename: it can be read again."""
    assert run(csv, tmp_path / "one.npz") == 0
    assert run(tmp_path / "one.csv", tmp_path / "two.npz", "--root_path", str(csv.parent)) == 0
    one, two = (np.load(tmp_path / f"{name}.npz") for name in ("one", "two"))
    np.testing.assert_array_equal(one["embeddings"], two["embeddings"])
    assert "input_row" in pd.read_csv(tmp_path / "two.csv")


def test_features_come_from_the_cache(csv: Path, tmp_path: Path, caplog) -> None:
    """And --no_cache leaves it alone."""
    cache = ["--cache_dir", str(tmp_path / "cache")]
    assert run(csv, tmp_path / "a.npz", *cache, "--no_cache") == 0 and not (tmp_path / "cache").exists()
    assert run(csv, tmp_path / "b.npz", *cache) == 0 and list((tmp_path / "cache").rglob("chunk-*"))
    caplog.clear()
    assert run(csv, tmp_path / "c.npz", *cache) == 0 and "5 of 5 images from the cache" in caplog.text
    b, c = (np.load(tmp_path / f"{name}.npz")["embeddings"] for name in "bc")
    np.testing.assert_array_equal(b, c)


@pytest.mark.parametrize(("color", "want"), [(None, None), ("label", [1, 0, 2, 0, 1]),
                                             ("age", ["30", "41.5", None, "52", "63"]),
                                             ("site", ["arm", "leg", "arm", None, "face"])])
def test_scatter(csv: Path, tmp_path: Path, monkeypatch, color: str | None, want: list | None) -> None:
    """Numbers, text, or no colour; the points in the order of the table."""
    drawn = []
    monkeypatch.setattr(extract_features, "plot_scatter", lambda path, xy, values, **more: drawn.append(
        (path, xy, values, more)) or plot(path, xy, values, **more))
    more = ["--color", color] if color else []
    assert run(csv, tmp_path / "features.npz", "--scatter", "pca", *more) == 0
    (path, xy, values, texts), = drawn
    assert path == tmp_path / "features_pca.png" and Image.open(path).width > 300
    x = np.load(tmp_path / "features.npz")["embeddings"].astype(np.float64)
    u, s, _ = np.linalg.svd(x - x.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(xy), np.abs(u[:, :2] * s[:2]), atol=1e-4)
    assert texts["column"] == (color or "") and "timm:test_vit: PCA" in texts["title"]
    assert (None if values is None else [None if pd.isna(v) else v for v in values]) == want


def test_attention(csv: Path, tmp_path: Path) -> None:
    """The first N, and the sheet; another run with fewer leaves no older pictures."""
    assert run(csv, tmp_path / "f.npz", "--attention", "3") == 0
    folder = tmp_path / "f_attention"
    assert sorted(p.name for p in folder.iterdir()) == ["0000_d.png", "0001_a.png", "0002_e.png", "sheet.png"]
    assert Image.open(folder / "0001_a.png").size == (64, 64)
    (folder / "mine.txt").write_text("x")
    assert run(csv, tmp_path / "f.npz", "--attention", "2", "--overwrite") == 0
    assert sorted(p.name for p in folder.iterdir()) == ["0000_d.png", "0001_a.png", "mine.txt", "sheet.png"]
    assert run(csv, tmp_path / "f.npz", "--overwrite", "--attention") == 0 and len(list(folder.glob("0*.png"))) == 5


# ----------------------------------------------------------------------------------------------------------- mistakes

def spoil(csv: Path) -> list[str]:
    """Three faults in the images."""
    (csv.parent / "a.png").write_bytes(b"")
    (csv.parent / "b.png").write_text("text")
    (csv.parent / "c.png").unlink()
    return []


def truncate(csv: Path) -> list[str]:
    """Seen only while decoded."""
    path = csv.parent / "b.png"
    path.write_bytes(path.read_bytes()[:2000])
    return []


MISTAKES = {
    "faulty images": (spoil, r"3 problems in .*row 3.*0 bytes.*row 5.*no image format.*row 6.*c\.png does not exist"),
    "truncated image": (truncate, r"1 image cannot be decoded:\n.*b\.png"),
    "another ending": (lambda csv: ["--output", "x.pt"], r"--output x\.pt must end in \.npz or \.safetensors"),
    "attention of a CNN": (lambda csv: ["--attention", "--model", "timm:resnet18"],
                           "ResNet has no attention.*it works for"),
    "color without scatter": (lambda csv: ["--color", "age"], "add --scatter pca"),
    "unknown color": (lambda csv: ["--scatter", "pca", "--color", "agee"],
                      "agee is no column .*: filename, label, age, site"),
    "scatter of one image": (lambda csv: [str(csv.parent / "a.png"), "--scatter", "pca"], "at least 3 images"),
    "no such input": (lambda csv: [str(csv.parent / "nowhere")], "nowhere does not exist: give an image file"),
    "no such CSV": (lambda csv: [str(csv.parent / "lists.csv")], r"lists\.csv does not exist; .* has: list\.csv"),
    "output in the input folder": (lambda csv: [str(csv.parent), "--output", str(csv.parent / "f.npz")],
                                   "written into the input folder"),
    "manifest onto the input": (lambda csv: ["--output", str(csv.with_suffix(".npz")), "--overwrite"],
                                r"list\.csv is the input; nothing was written"),
    "output that is a folder": (lambda csv: (csv.parent / "f.npz").mkdir() or [
        "--output", str(csv.parent / "f.npz"), "--overwrite"], r"f\.npz is a folder"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_end_with_2_and_a_message(csv: Path, tmp_path: Path, capsys, case: str) -> None:
    """No traceback, nothing written, inputs untouched."""
    act, words = MISTAKES[case]
    more = act(csv)
    source = [] if more and not more[0].startswith("--") else [str(csv)]
    before = snapshot(csv.parent)
    assert extract_features.main([*VIT, "--output", str(tmp_path / "f.npz"), "--amp_dtype", "fp32", "--num_workers",
                                  "0", *source, *more]) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and "Traceback" not in error
    assert re.search(words, error, re.S), error
    assert snapshot(csv.parent) == before and not (tmp_path / "f.npz").exists()


@pytest.mark.parametrize(("name", "more"), [("f.npz", []), ("f.csv", []), ("f_pca.png", ["--scatter", "pca"]),
                                            ("f_attention", ["--attention"])])
def test_outputs_that_are_there_are_kept(csv: Path, tmp_path: Path, capsys, name: str, more: list[str]) -> None:
    """Each of them, before any work."""
    if name == "f_attention":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text("mine")
    assert run(csv, tmp_path / "f.npz", *more) == 2
    assert f"{name} is there already: choose another --output, or add --overwrite" in capsys.readouterr().err
    assert name == "f_attention" or (tmp_path / name).read_text() == "mine"
    assert run(csv, tmp_path / "f.npz", *more, "--overwrite") == 0


def test_umap_that_is_not_installed(csv: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """Told before the features are extracted."""
    monkeypatch.setitem(sys.modules, "umap", None)
    assert run(csv, tmp_path / "f.npz", "--scatter", "umap") == 2
    assert "pip install umap-learn" in capsys.readouterr().err and not list(tmp_path.glob("f*"))
