"""Pretraining's images and labels: what is read, what is refused, and the batches of crops, masks and targets."""

import logging
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from furnace.data.block_masks import block_masks
from furnace.data.datasets import outlive_signals
from furnace.data.images import load_rgb
from furnace.data.multicrop import Crops, MultiCropBatch, build_multicrop
from furnace.data.pretraining_data import PretrainingData, build_pretraining_loader, read_pretraining
from furnace.data.problems import ManifestError
from furnace.data.samplers import TrainSampler
from furnace.runtime.batch_plan import BatchPlan
from furnace.runtime.files import UserError
from furnace.runtime.seeding import seed_of
from helpers import draw_images, write_csv

CROPS = Crops(global_size=16, local_size=8, local_crops=3)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
ONTOLOGY = ("id,name,synonyms,parent,sources", "tumour,tumour,,,ham;fitz", "mel,melanoma,MM,tumour,ham",
            "nv,nevus,,tumour,ham", "acne,acne,,,fitz")  # classes 0 to 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve images 0.png to 11.png, and an ontology."""
    draw_images(tmp_path, [f"{i}.png" for i in range(12)])
    (tmp_path / "o.csv").write_text("\n".join(ONTOLOGY) + "\n")
    return tmp_path


def read(folder: Path, *, ontology: bool = True, options: dict | None = None, **columns: list) -> PretrainingData:
    """A CSV of these columns; the images are 0.png, 1.png ... unless given."""
    rows = len(next(iter(columns.values())))
    csv = write_csv(folder / "list.csv", **{"image": [f"{i}.png" for i in range(rows)], **columns})
    return read_pretraining(csv, ontology=folder / "o.csv" if ontology else None, **(options or {}))


def faults(folder: Path, **more) -> list[tuple]:
    """(kind, row, column) of the errors; each has a text and a remedy."""
    with pytest.raises(ManifestError) as caught:
        read(folder, **more)
    assert all(problem.text and problem.remedy for problem in caught.value.problems)
    return [(problem.kind, problem.row, problem.column) for problem in caught.value.problems]


# ---------------------------------------------------------------------------------------------------------- reading

def test_a_folder_is_unlabelled(folder: Path, caplog) -> None:
    with caplog.at_level(logging.INFO):
        data = read_pretraining(folder)
    assert len(data.manifest) == 12 and data.labels is None and data.ontology is None
    assert set(data.manifest.frame["split"]) == {"train"} and "12 images to train on" in caplog.text
    with pytest.raises(UserError, match="--ontology is for labels, and .* is no CSV: leave it out"):
        read_pretraining(folder, ontology=folder / "o.csv")


@pytest.mark.parametrize("columns", [{"age": [1, 2, 3]}, {"labels": ["", "", ""]}, {"source": ["ham", "ham", "x"]}])
def test_a_csv_without_labels(folder: Path, columns: dict) -> None:
    """Neither a column nor an ontology is needed."""
    data = read(folder, ontology=False, **columns)
    assert data.manifest.filenames == ["0.png", "1.png", "2.png"] and data.labels is None and data.ontology is None
    assert data.manifest.labels.tolist() == [-1] * 3 and data.manifest.path_of(2) == folder / "2.png"


def test_labels(folder: Path, caplog) -> None:
    with caplog.at_level(logging.INFO):
        data = read(folder, labels=["MM", "", "acne", "mel;nv"], source=["ham", "ham", "Fitz", "HAM"])
    assert data.labels.labelled.tolist() == [True, False, True, True] and len(data.labels) == len(data.manifest)
    assert data.labels.rows([0, 1, 2, 3]).tolist() == [[1, 1, 0, 0], [0] * 4, [0, 0, 0, 1], [1, 1, 1, 0]]
    assert data.labels.known([0, 1, 2, 3]).tolist() == [[True] * 3 + [False], [False] * 4, [True, False, False, True],
                                                        [True] * 3 + [False]]
    assert data.ontology is data.labels.ontology and pickle.loads(pickle.dumps(data.labels)).labelled.sum() == 3
    assert "4 images to train on; 3 with labels, of 4 of 4 classes; sources: ham 2, Fitz 1, HAM 1" in caplog.text
    assert not any(record.levelno > logging.INFO for record in caplog.records)


def test_ancestors_can_be_left_out(folder: Path, caplog) -> None:
    with caplog.at_level(logging.INFO):
        data = read(folder, labels=["mel"], source=["ham"], options={"label_ancestors": False})
    assert data.labels.rows([0]).tolist() == [[0, 1, 0, 0]] and "1 with labels, of 1 of 4 classes" in caplog.text


def test_rows_of_other_splits_are_left_out(folder: Path, caplog) -> None:
    """Their files and labels are not looked at; rows keep their lines; an empty cell is train."""
    with caplog.at_level(logging.INFO):
        data = read(folder, image=["gone.png", "1.png", "2.png", "3.png"], split=["test", "train", "", "val"],
                    labels=["nonsense", "nv", "", ""], source=["x", "ham", "", ""])
    assert data.manifest.filenames == ["1.png", "2.png"] and data.manifest.frame["_row"].tolist() == [3, 4]
    assert data.labels.labelled.tolist() == [True, False] and set(data.manifest.frame["split"]) == {"train"}
    assert "2 rows of val and test are left out" in caplog.text
    assert len(data.manifest.split("train")) == 2


def test_no_row_to_train_on(folder: Path) -> None:
    assert faults(folder, split=["test", "val"], labels=["", ""], source=["", ""]) == [("empty split", None, "split")]
    assert faults(folder, image=[]) == [("no rows", None, ""), ("missing column", None, "labels")]


def test_all_problems_in_one_list(folder: Path) -> None:
    assert faults(folder, image=["0.png", "gone.png", "2.png", "3.png", "4.png"],
                  split=["train", "", "Train", "", ""], labels=["mel", "", "", "melanom", "acne"],
                  source=["ham", "", "", "ham", "ham"]) == [
        ("unknown split", 4, "split"), ("missing file", 3, "image"), ("label outside the ontology", 5, "labels"),
        ("label its source does not annotate", 6, "labels")]


def test_labels_outside_the_ontology(folder: Path, caplog) -> None:
    """An error that proposes a term; with strict_labels off a warning, and the image is unlabelled."""
    columns = {"labels": ["melanom", "nv"], "source": ["ham", "ham"]}
    with pytest.raises(ManifestError, match="'melanom' .1 row. is no id, name or synonym .*write 'melanoma'"):
        read(folder, **columns)
    data = read(folder, options={"strict_labels": False}, **columns)
    assert data.labels.labelled.tolist() == [False, True] and "label outside the ontology" in caplog.text


def test_a_source_nobody_annotates(folder: Path, caplog) -> None:
    columns = {"labels": ["mel", "nv", ""], "source": ["ham", "scin", "scin"]}
    assert faults(folder, **columns) == [("source nobody annotates", 3, "source")]
    data = read(folder, options={"strict_labels": False}, **columns)
    assert data.labels.labelled.tolist() == [True, False, False] and "lists 'scin'" in caplog.text
    assert read(folder, labels=["mel", ""], source=["ham", "scin"]).labels.labelled.tolist() == [True, False]


@pytest.mark.parametrize("spelling", ["0.png", "./0.png"])
def test_an_image_of_two_sources(folder: Path, caplog, spelling: str) -> None:
    """It is there twice, each row with the classes of its own source; only labels that differ are told."""
    data = read(folder, image=["0.png", spelling], labels=["mel", "acne"], source=["ham", "fitz"])
    assert data.manifest.path_of(0).resolve() == data.manifest.path_of(1).resolve()
    assert data.labels.rows([0, 1]).tolist() == [[1, 1, 0, 0], [0, 0, 0, 1]]
    assert data.labels.known([0, 1]).tolist() == [[True, True, True, False], [True, False, False, True]]
    assert "image of two sources (row 3, column labels, 0.png)" in caplog.text and "repeated row" not in caplog.text
    assert faults(folder, image=["0.png", spelling], labels=["mel", "nv"], source=["ham", "ham"]) == [
        ("one image with other labels", 3, "labels")]


def test_repeated_rows_warn(folder: Path, caplog) -> None:
    data = read(folder, image=["0.png", "1.png", "./0.png"], labels=["mel", "mel", "mel"], source=["ham"] * 3)
    assert len(data.manifest) == 3 and "repeated row (row 4, column image, 0.png): stands in rows 2, 4" in caplog.text


def test_an_image_that_is_tested_on_warns(folder: Path, caplog) -> None:
    read(folder, ontology=False, image=["0.png", "1.png", "./0.png"], split=["train", "", "test"])
    assert "image in two splits (row 2, column split, 0.png): is in train and in test (rows 2, 4)" in caplog.text
    assert "repeated row" not in caplog.text and "1.png" not in caplog.text


def test_labels_need_an_ontology(folder: Path) -> None:
    with pytest.raises(ManifestError, match="2 rows have labels.*Remedy: pass --ontology FILE.csv, or take the column"):
        read(folder, ontology=False, labels=["", "mel", "nv"], source=["ham"] * 3)


def test_an_ontology_needs_labels(folder: Path, caplog) -> None:
    assert faults(folder, source=["ham", "ham"]) == [("missing column", None, "labels")]
    assert faults(folder, labels=["mel", ""], Source=["ham", "ham"]) == [("missing column", None, "source")]
    data = read(folder, labels=["", ""], source=["ham", "ham"])
    assert not data.labels.labelled.any() and "no labelled image" in caplog.text


def test_other_columns(folder: Path, tmp_path: Path) -> None:
    """filename will do for image; a column label is kept as text and not read; patients are groups."""
    csv = write_csv(tmp_path / "sub" / "list.csv", filename=["1.png", "0.png"], label=["5", "x"], patient_id=["P", "Q"])
    data = read_pretraining(csv, folder)
    assert data.manifest.filenames == ["1.png", "0.png"] and data.manifest.frame["label_text"].tolist() == ["5", "x"]
    assert data.manifest.labels.dtype == np.int64 and data.manifest.group_columns == ("patient_id",)
    assert (data.manifest.name, data.manifest.root) == ("list", folder) and len(data.manifest.images_digest) == 64
    with pytest.raises(ManifestError, match="rename Image to image"):
        read_pretraining(write_csv(folder / "list.csv", Image=["0.png"]))


def test_the_full_list_goes_to_a_file(folder: Path) -> None:
    with pytest.raises(ManifestError, match="and 5 more; all of them are in .*list_problems_"):
        read(folder, ontology=False, image=[f"no{i}.png" for i in range(24)], options={"report_folder": folder / "out"})
    assert len(list((folder / "out").iterdir())) == 1


# ---------------------------------------------------------------------------------------------------------- loading

@pytest.fixture
def labelled(folder: Path) -> PretrainingData:
    """Twelve images; 1, 4, 7 and 10 have labels."""
    labels = ["", "mel", "", "", "acne", "", "", "nv", "", "", "tumour", ""]
    return read(folder, labels=labels, source=["fitz" if name == "acne" else "ham" for name in labels])


def loader_of(data: PretrainingData, micro: int = 4, *, seed: int = 0, images: int | None = None, crops: Crops = CROPS,
              steps: int = 3, workers: int = 0, **more) -> DataLoader:
    plan = BatchPlan(micro=micro, accumulation=1, world_size=1, steps_per_epoch=steps)
    sampler = TrainSampler(images or len(data.manifest), plan=plan, seed=seed, endless=True)
    return build_pretraining_loader(data, crops, sampler, plan=plan, seed=seed, patch_size=4, mean=MEAN, std=STD,
                                    num_workers=workers, **more)


def batches_of(data: PretrainingData, micro: int = 4, *, epoch: int = 0, **more) -> list[MultiCropBatch]:
    loader = loader_of(data, micro, **more)
    loader.sampler.set_position(epoch, 0)
    return list(loader)


def broken_at(data: PretrainingData, *numbers: int) -> None:
    """Cut these files off after their header."""
    for number in numbers:
        path = data.manifest.path_of(number)
        path.write_bytes(path.read_bytes()[:200])


def test_batches_are_view_major(labelled: PretrainingData) -> None:
    """All first views, then all second ones, each the one of its image's draw; labels belong to the images."""
    make, position = build_multicrop(CROPS, mean=MEAN, std=STD), 0
    batches = batches_of(labelled)
    assert sorted(i for batch in batches for i in batch.indices) == list(range(12))
    for batch in batches:
        assert batch.globals.shape == (2, 4, 3, 16, 16) and batch.locals.shape == (3, 4, 3, 8, 8)
        assert batch.masks.shape == (2, 4, 16) and batch.masks.dtype == batch.known.dtype == torch.bool
        assert batch.broken == [] and batch.targets.dtype == torch.float32
        for b, index in enumerate(batch.indices):
            rng = random.Random(seed_of(0, 0, position))
            larges, smalls = make(load_rgb(labelled.manifest.path_of(index)), rng)
            assert torch.equal(batch.globals[:, b], larges) and torch.equal(batch.locals[:, b], smalls)
            position += 1
        np.testing.assert_array_equal(batch.targets.numpy(), labelled.labels.rows(batch.indices))
        np.testing.assert_array_equal(batch.known.numpy(), labelled.labels.known(batch.indices))
        assert (batch.known.any(1).numpy() == labelled.labels.labelled[batch.indices]).all()
    assert position == 12


def test_masks_of_a_batch(labelled: PretrainingData) -> None:
    """Half of the global crops, by the seed and the place of the batch's first draw."""
    for number, batch in enumerate(batches_of(labelled, epoch=2, seed=5)):
        rng = np.random.default_rng(seed_of(5, "masks", 2, 4 * number))
        expected = block_masks(8, (4, 4), rng=rng).reshape(2, 4, 16)
        np.testing.assert_array_equal(batch.masks.numpy(), expected)
    full = batches_of(labelled, mask_share=1.0, mask_ratio=(0.4, 0.5))[0]
    assert full.masks.sum(-1).min() >= 4 and full.masks.sum(-1).max() <= 8


def same(one: MultiCropBatch, other: MultiCropBatch) -> bool:
    tensors = all(torch.equal(getattr(one, name), getattr(other, name))
                  for name in ("globals", "locals", "masks", "targets", "known"))
    return tensors and one.indices == other.indices and one.broken == other.broken


def test_workers_make_no_difference(labelled: PretrainingData) -> None:
    broken_at(labelled, 3)
    alone, loader = batches_of(labelled, epoch=1), loader_of(labelled, workers=2)
    loader.sampler.set_position(1, 0)
    assert loader.worker_init_fn is outlive_signals and loader.num_workers == 2
    two = list(loader)
    assert len(alone) == len(two) == 3 and all(same(a, b) for a, b in zip(alone, two, strict=True))


def test_random_numbers_follow_the_draws(labelled: PretrainingData) -> None:
    """Crops do not depend on the size of a batch; epochs, seeds and positions differ; global generators stay."""
    state = random.getstate(), torch.get_rng_state()
    small, large = batches_of(labelled, 2, steps=6), batches_of(labelled, 4)
    assert torch.equal(torch.cat([batch.globals for batch in small], dim=1),
                       torch.cat([batch.globals for batch in large], dim=1))
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])
    one = labelled.manifest.take([5])
    single = PretrainingData(manifest=one, labels=None, ontology=None)
    crops = [batch.globals for epoch in (0, 1) for seed in (0, 1)
             for batch in batches_of(single, 1, epoch=epoch, seed=seed)]
    assert len({views.sum().item() for views in crops}) == 2 * 2 * 3


def test_a_resumed_epoch_has_the_same_batches(labelled: PretrainingData) -> None:
    whole, loader = batches_of(labelled, epoch=1), loader_of(labelled)
    loader.sampler.set_position(1, 2)
    (last,) = loader
    assert same(last, whole[2])


def test_a_batch_without_a_label(labelled: PretrainingData) -> None:
    """No class counts; the tensors are there."""
    none = [i for i in range(12) if not labelled.labels.labelled[i]]
    batches = batches_of(labelled, 1, steps=12)
    for batch in batches:
        if batch.indices[0] in none:
            assert batch.targets.tolist() == [[0] * 4] and batch.known.tolist() == [[False] * 4]
    assert sum(batch.indices[0] in none for batch in batches) == 8


def test_purely_unlabelled_data(folder: Path) -> None:
    for batch in batches_of(read_pretraining(folder)):
        assert batch.targets is None and batch.known is None and batch.globals.shape[1] == batch.masks.shape[1] == 4


def test_without_local_crops(labelled: PretrainingData) -> None:
    crops = Crops(global_size=16, local_size=9, local_crops=0)  # whose size then does not matter
    assert all(batch.locals is None for batch in batches_of(labelled, crops=crops))


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_corrupt_file_in_the_middle(folder: Path, suffix: str) -> None:
    """It is named; the others keep their pictures and labels, and the masks fit them."""
    for number in range(12):
        load_rgb(folder / f"{number}.png").save(folder / f"{number}{suffix}")
    columns = {"image": [f"{i}{suffix}" for i in range(12)], "labels": ["mel", "nv"] * 6, "source": ["ham"] * 12}
    data = read(folder, **columns)
    before = batches_of(data)
    victim = before[1].indices[2]
    path = data.manifest.path_of(victim)
    path.write_bytes(path.read_bytes()[:-(path.stat().st_size // 3)])
    after = batches_of(data)
    assert same(before[0], after[0]) and same(before[2], after[2])
    found, kept = after[1], [0, 1, 3]
    assert [index for index, _ in found.broken] == [victim] and found.broken[0][1]
    assert found.indices == [before[1].indices[b] for b in kept]
    for name in ("globals", "locals"):
        assert torch.equal(getattr(found, name), getattr(before[1], name)[:, kept])
    assert torch.equal(found.targets, before[1].targets[kept]) and torch.equal(found.known, before[1].known[kept])
    assert found.masks.shape == (2, 3, 16) and 0 < found.masks.any(-1).sum() <= 3


def test_a_batch_of_corrupt_files(labelled: PretrainingData) -> None:
    broken_at(labelled, *range(12))
    for batch in batches_of(labelled):
        assert batch.globals is batch.locals is batch.masks is batch.targets is batch.known is None
        assert batch.indices == [] and len(batch.broken) == 4 and batch.pin_memory() is batch


@pytest.mark.parametrize(("crops", "words"), [
    (Crops(global_size=18, local_size=8), "--global_crops_size 18 is no multiple of the patch size 4: take 16 or 20"),
    (Crops(global_size=16, local_size=9), "--local_crops_size 9 is no multiple of the patch size 4: take 8 or 12"),
    (Crops(global_size=16, local_size=3), "--local_crops_size 3 .*: take 4"),
    (Crops(global_size=16, local_size=4), "--local_crops_size 4 is too small")])
def test_sizes_that_do_not_fit(labelled: PretrainingData, crops: Crops, words: str) -> None:
    with pytest.raises(UserError, match=words):
        loader_of(labelled, crops=crops)
