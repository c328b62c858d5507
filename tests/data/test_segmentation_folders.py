"""Public sets in the folders of their archives: images, masks, splits, and what else a folder looks like."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from furnace.data.problems import ManifestError
from furnace.data.segmentation import read_segmentation
from furnace.data.segmentation_folders import LAYOUTS, known_name, read_folders
from furnace.runtime.files import UserError
from helpers import draw_images, write_csv

SIZE = (12, 9)
RNG = np.random.default_rng(0)


def draw_pair(base: Path, image: str, mask: str) -> None:
    """An image and its mask."""
    draw_images(base, [image], size=SIZE, seed=int(RNG.integers(2**31)))
    path = base / mask
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.random((SIZE[1], SIZE[0])) < 0.5).save(path)


def isic(base: Path, images: str, masks: str, ending: str, counts: dict[str, int]) -> None:
    for word, count in counts.items():
        for i in range(count):
            draw_pair(base, f"{images.format(word)}/ISIC_{word}_{i}.jpg",
                      f"{masks.format(word)}/ISIC_{word}_{i}{ending}")
        (base / images.format(word) / "LICENSE.txt").write_text("")


def isic2016(base: Path) -> None:
    isic(base, "ISBI2016_ISIC_Part1_{}_Data", "ISBI2016_ISIC_Part1_{}_GroundTruth", "_Segmentation.png",
         {"Training": 16, "Test": 3})


def isic2017(base: Path) -> None:
    isic(base, "ISIC-2017_{}_Data", "ISIC-2017_{}_Part1_GroundTruth", "_segmentation.png",
         {"Training": 5, "Validation": 2, "Test_v2": 3})
    draw_images(base / "ISIC-2017_Training_Data", ["ISIC_Training_0_superpixels.png"])


def isic2018(base: Path) -> None:
    isic(base, "ISIC2018_Task1-2_{}_Input", "ISIC2018_Task1_{}_GroundTruth", "_segmentation.png",
         {"Training": 5, "Validation": 2, "Test": 3})


def renamed(base: Path) -> None:
    isic(base, "{}_Data", "{}_GroundTruth", "_segmentation.png", {"Training": 5, "Validation": 2, "Test": 3})


def ph2(base: Path) -> None:
    for i in range(10):
        name = f"IMD{i:03d}"
        folder = f"PH2 Dataset images/{name}"
        draw_pair(base, f"{folder}/{name}_Dermoscopic_Image/{name}.bmp", f"{folder}/{name}_lesion/{name}_lesion.bmp")
        draw_images(base / folder / f"{name}_roi", [f"{name}_R1_Label3.bmp"])


def ham10000(base: Path) -> None:
    for i in range(20):
        draw_pair(base, f"HAM10000_images_part_{1 + i // 12}/ISIC_{i}.jpg",
                  f"HAM10000_segmentations_lesion_tschandl/ISIC_{i}_segmentation.png")


def waterloo(base: Path) -> None:
    for part, kind in ((1, "melanoma"), (2, "notmelanoma")):
        for i in range(6):
            folder = f"Skin Image Data Set-{part}/skin_data/{kind}/{'dermis' if i % 2 else 'dermquest'}"
            draw_pair(base, f"{folder}/S{i}_2_orig.jpg", f"{folder}/S{i}_2_contour.png")


SETS = {"ISIC2016": isic2016, "ISIC2017": isic2017, "ISIC2018": isic2018, "PH2": ph2, "HAM10000": ham10000,
        "Waterloo": waterloo}
COUNTS = {"ISIC2016": (14, 2, 3), "ISIC2017": (5, 2, 3), "ISIC2018": (5, 2, 3), "PH2": (7, 1, 2),
          "HAM10000": (14, 2, 4), "Waterloo": (7, 2, 3)}  # drawn: a fifth test, an eighth of the rest val, rounded up


def test_every_name_has_a_set_here() -> None:
    assert set(SETS) == set(LAYOUTS) == set(COUNTS)


@pytest.mark.parametrize("where", ["", "{}", "{}/archive"])
@pytest.mark.parametrize("name", SETS)
def test_layouts(tmp_path: Path, name: str, where: str) -> None:
    """In the parent itself, in a folder of the set's name, and a level deeper; masks are the images' own."""
    base = tmp_path / where.format(name)
    base.mkdir(parents=True, exist_ok=True)
    SETS[name](base)
    manifest = read_segmentation(dataset=name, parent=tmp_path)
    assert tuple(len(manifest.split(split)) for split in ("train", "val", "test")) == COUNTS[name]
    assert manifest.name == name and len(manifest) == sum(COUNTS[name])
    for i in range(len(manifest)):
        image, mask = manifest.path_of(i), manifest.mask_path_of(i)
        assert image.is_file() and mask.is_file() and mask.stem.startswith(image.stem.removesuffix("_orig"))
    assert bool(manifest.split_note) == (name not in ("ISIC2017", "ISIC2018"))


def test_official_splits(tmp_path: Path) -> None:
    isic2017(tmp_path)
    manifest = read_segmentation(dataset="ISIC2017", parent=tmp_path)
    for split, word in (("train", "Training"), ("val", "Validation"), ("test", "Test_v2")):
        rows = manifest.split(split).frame
        assert rows["image"].str.startswith(f"ISIC-2017_{word}_Data/ISIC_{word}_").all()
        assert rows["mask"].str.startswith(f"ISIC-2017_{word}_Part1_GroundTruth/ISIC_{word}_").all()
        assert rows["image"].is_monotonic_increasing
    assert manifest.frame["lesion_pixels"].tolist() == [
        int(np.asarray(Image.open(manifest.mask_path_of(i))).sum()) for i in range(len(manifest))]


def test_the_published_renamed_folders(tmp_path: Path) -> None:
    (tmp_path / "ISIC2018").mkdir()
    renamed(tmp_path / "ISIC2018")
    manifest = read_segmentation(dataset="ISIC2018", parent=f"{tmp_path}/")
    assert manifest.frame["split"].value_counts().to_dict() == {"train": 5, "test": 3, "val": 2}
    assert manifest.filenames[0] == "Training_Data/ISIC_Training_0.jpg"


def test_a_folder_within_a_folder_of_its_name(tmp_path: Path) -> None:
    """As some unpackers leave it; resource forks beside the images are no images."""
    isic2018(tmp_path / "d")
    for folder in list((tmp_path / "d").iterdir()):
        target = tmp_path / "ISIC2018" / folder.name / folder.name
        target.parent.mkdir(parents=True)
        folder.rename(target)
    (target.parent / "._ISIC_0.jpg").write_bytes(b"x")
    manifest = read_segmentation(dataset="ISIC2018", parent=tmp_path)
    assert len(manifest) == 10 and manifest.filenames[0].count("ISIC2018_Task1-2_Training_Input") == 2


@pytest.mark.parametrize(("text", "name"), [("isic_2018", "ISIC2018"), ("ISIC2018_task1", "ISIC2018"), ("ph2", "PH2"),
                                            ("ISIC-2016", "ISIC2016"), ("waterloo", "Waterloo")])
def test_names(text: str, name: str) -> None:
    assert known_name(text) == name


@pytest.mark.parametrize("text", ["staining134", "", "ISIC", "PH2+HAM10000"])
def test_unknown_names(text: str) -> None:
    with pytest.raises(UserError, match="is none of ISIC2016, ISIC2017, ISIC2018, PH2, HAM10000, Waterloo"):
        known_name(text)


@pytest.mark.parametrize("asked", SETS)
@pytest.mark.parametrize("there", SETS)
def test_another_sets_layout(tmp_path: Path, asked: str, there: str) -> None:
    """The message names what was expected and what is there."""
    if asked == there:
        return
    SETS[there](tmp_path)
    told = f"does not look like {asked}: .* It looks like {there}: pass --dataset {there}"
    with pytest.raises(UserError, match=told):
        read_folders(asked, tmp_path, needed=("train", "test"), problems=[])


def test_a_folder_of_no_known_layout(tmp_path: Path) -> None:
    draw_images(tmp_path, ["imgs/a.jpg"])
    with pytest.raises(UserError, match="no folder PH2 Dataset images with images in it. It has: imgs. Pass the"):
        read_segmentation(dataset="PH2", parent=tmp_path)
    with pytest.raises(UserError, match="is not a folder: it must hold the folder PH2"):
        read_segmentation(dataset="PH2", parent=tmp_path / "gone")


def faults(name: str, parent: Path, **options) -> list:
    with pytest.raises(ManifestError) as caught:
        read_segmentation(dataset=name, parent=parent, **options)
    return caught.value.problems


def test_missing_masks_and_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    isic2018(tmp_path)
    (tmp_path / "ISIC2018_Task1_Training_GroundTruth/ISIC_Training_3_segmentation.png").unlink()
    (tmp_path / "ISIC2018_Task1-2_Validation_Input/ISIC_Validation_1.jpg").unlink()
    for path in (tmp_path / "ISIC2018_Task1-2_Test_Input").iterdir():
        path.unlink()
    problems = faults("ISIC2018", tmp_path)
    assert [(p.kind, p.file, p.row) for p in problems] == [
        ("missing folder", "", None),
        ("missing mask", "ISIC2018_Task1_Training_GroundTruth/ISIC_Training_3_segmentation.png", None)]
    assert "ISIC2018_Task1-2_Test_Input" in problems[0].text and "unpack the archive" in problems[1].remedy
    assert "1 masks of ISIC2018_Task1_Validation_GroundTruth have no image" in caplog.text


def test_test_images_are_enough_for_scoring(tmp_path: Path) -> None:
    isic(tmp_path, "ISIC2018_Task1-2_{}_Input", "ISIC2018_Task1_{}_GroundTruth", "_segmentation.png", {"Test": 3})
    manifest = read_segmentation(dataset="ISIC2018", parent=tmp_path, needed=("test",))
    assert manifest.frame["split"].tolist() == ["test"] * 3
    assert "missing folder" in {p.kind for p in faults("ISIC2018", tmp_path)}


def test_masks_without_their_folder(tmp_path: Path) -> None:
    ham10000(tmp_path)
    (tmp_path / "HAM10000_segmentations_lesion_tschandl").rename(tmp_path / "masks")
    problems = faults("HAM10000", tmp_path)
    assert {p.kind for p in problems} == {"missing folder"} and "lesion_tschandl" in problems[0].text


@pytest.mark.parametrize("file", ["HAM10000_metadata.csv", "HAM10000_metadata"])
def test_ham10000_lesions_stay_together(tmp_path: Path, file: str, caplog: pytest.LogCaptureFixture) -> None:
    ham10000(tmp_path)
    write_csv(tmp_path / file, lesion_id=[f"HAM_{i // 3}" for i in range(20)],
              image_id=[f"ISIC_{i}" for i in range(20)])
    manifest = read_segmentation(dataset="HAM10000", parent=tmp_path)
    assert manifest.group_columns == ("lesion_id",) and "too good" not in caplog.text
    numbers = manifest.frame["image"].str.extract(r"_(\d+)\.jpg")[0].astype(int)
    assert (manifest.frame["lesion_id"] == "HAM_" + (numbers // 3).astype(str)).all()
    assert (manifest.frame.groupby("lesion_id")["split"].nunique() == 1).all()


def test_ham10000_without_its_metadata(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ham10000(tmp_path)
    assert read_segmentation(dataset="HAM10000", parent=tmp_path).group_columns == ()
    assert "images of one lesion can come into different splits" in caplog.text
