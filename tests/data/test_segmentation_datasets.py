"""Pairs of tensors: seeded as images alone are, the same with workers and after a resume, broken files named."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from furnace.data.datasets import LARGEST_BATCH, build_loader, loader_in_order
from furnace.data.joint_transforms import build_image_transform, build_joint_transform
from furnace.data.samplers import Draw, TrainSampler
from furnace.data.segmentation import SegmentationManifest, read_segmentation
from furnace.data.segmentation_datasets import (
    PhotoDataset,
    SegmentationDataset,
    build_photo_loader,
    build_segmentation_loader,
    collate_photos,
    collate_with_masks,
)
from furnace.runtime.batch_plan import BatchPlan
from furnace.runtime.seeding import seed_all
from helpers import draw_images, write_csv

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
FIXED = build_joint_transform("dermino", size=(24, 30), **PLAIN)
RANDOM = build_joint_transform("default", size=(24, 30), **PLAIN)
PLAN = BatchPlan(micro=3, accumulation=2, world_size=1, steps_per_epoch=3)
COUNT = 20

pytestmark = pytest.mark.usefixtures("one_thread")


def made(folder: Path) -> SegmentationManifest:
    draw_images(folder, [f"i{i}.png" for i in range(COUNT)], size=(40, 32))
    rng = np.random.default_rng(1)
    for i in range(COUNT):
        Image.fromarray(rng.random((32, 40)) < 0.5).save(folder / f"m{i}.png")
    csv = write_csv(folder / "s.csv", image=[f"i{i}.png" for i in range(COUNT)],
                    mask=[f"m{i}.png" for i in range(COUNT)], split=["train"] * 19 + ["test"])
    return read_segmentation(csv, val_fraction=0.0)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> SegmentationManifest:
    return made(tmp_path_factory.mktemp("good"))


def loader(manifest: SegmentationManifest, *, plan: BatchPlan = PLAN, num_workers: int = 0):
    sampler = TrainSampler(len(manifest), plan=plan, seed=0)
    return build_segmentation_loader(manifest, RANDOM, sampler, plan=plan, seed=5, num_workers=num_workers)


def epoch(loader, number: int, update: int = 0) -> list:
    loader.sampler.set_position(number, update)
    return list(loader)


def test_an_item_is_the_pair_of_its_files(manifest: SegmentationManifest) -> None:
    for i in (0, 13):
        image, mask, index = SegmentationDataset(manifest, FIXED)[i]
        with Image.open(manifest.root / f"i{i}.png") as picture, Image.open(manifest.root / f"m{i}.png") as truth:
            wanted = FIXED(picture, np.asarray(truth))
        assert index == i and torch.equal(image, wanted[0]) and torch.equal(mask, wanted[1])
    assert len(SegmentationDataset(manifest, FIXED)) == COUNT


def test_seeded_numbers_depend_on_the_draw_alone(manifest: SegmentationManifest) -> None:
    """Those of ``seed_all`` with seed, epoch, position; the process's own generator stays where it is."""
    dataset = SegmentationDataset(manifest, RANDOM, seed=5)
    before = torch.get_rng_state()
    image, mask, index = dataset[Draw(7, 2, 11)]
    assert torch.equal(torch.get_rng_state(), before) and index == 7
    torch.rand(3)
    assert torch.equal(dataset[Draw(7, 2, 11)][1], mask)
    for other in (dataset[Draw(7, 3, 11)], dataset[Draw(7, 2, 12)],
                  SegmentationDataset(manifest, RANDOM, seed=6)[Draw(7, 2, 11)]):
        assert not torch.equal(other[0], image) and not torch.equal(other[1], mask)
    assert torch.equal(dataset[7][1], dataset[Draw(7, 0, 7)][1])
    seed_all(5, 2, 11)
    with Image.open(manifest.path_of(7)) as picture, Image.open(manifest.mask_path_of(7)) as truth:
        wanted = RANDOM(picture, np.asarray(truth))
    assert torch.equal(image, wanted[0]) and torch.equal(mask, wanted[1])


def test_batches(manifest: SegmentationManifest) -> None:
    trained = loader(manifest)
    batches = epoch(trained, 4)
    assert [tuple(b.images.shape) for b in batches] == [(3, 3, 24, 30)] * 6
    assert all(b.masks.shape == (3, 24, 30) and b.masks.dtype == torch.int64 and b.broken == [] for b in batches)
    drawn = trained.sampler.epoch_indices(4).tolist()
    assert [i for b in batches for i in b.indices] == drawn
    dataset = SegmentationDataset(manifest, RANDOM, seed=5)
    wanted = [dataset[Draw(i, 4, p)] for p, i in enumerate(drawn)]
    assert torch.equal(torch.cat([b.images for b in batches]), torch.stack([image for image, _, _ in wanted]))
    assert torch.equal(torch.cat([b.masks for b in batches]), torch.stack([mask for _, mask, _ in wanted]))


def test_batches_after_a_resume_with_workers_and_halved(manifest: SegmentationManifest) -> None:
    wide = BatchPlan(micro=6, accumulation=1, world_size=1, steps_per_epoch=3)
    alone, workers = loader(manifest), loader(manifest, num_workers=2)
    for number, update in ((0, 0), (1, 2)):
        wanted = epoch(alone, number)[2 * update:]
        for other in (workers, loader(manifest, plan=wide), loader(manifest, plan=wide.halved())):
            found = epoch(other, number, update)
            assert torch.equal(torch.cat([b.images for b in found]), torch.cat([b.images for b in wanted]))
            assert torch.equal(torch.cat([b.masks for b in found]), torch.cat([b.masks for b in wanted]))
    assert workers.persistent_workers


def test_evaluation_reads_images_only(manifest: SegmentationManifest) -> None:
    """The loader of classification serves, on any part."""
    transform = build_image_transform("dermino", size=(24, 30), **PLAIN)
    batch = next(iter(build_loader(manifest.take([4, 2]), transform, batch_size=8, num_workers=0)))
    wanted = [SegmentationDataset(manifest, FIXED)[i][0] for i in (4, 2)]
    assert torch.equal(batch.images, torch.stack(wanted)) and not hasattr(batch, "masks")


# --------------------------------------------------------------------------------------------- photographs in order

TRANSFORMS = [build_image_transform("dermino", size=size, **PLAIN) for size in ((24, 30), (16, 16))]


def test_photographs_in_each_size_of_input(manifest: SegmentationManifest) -> None:
    """In the manifest's order; the size is (H, W) of the picture, not of the input."""
    batches = list(build_photo_loader(manifest.take([4, 2, 9]), TRANSFORMS, batch_size=2, num_workers=0))
    assert [len(batch.photos) for batch in batches] == [2, 1] and not any(batch.broken for batch in batches)
    photos = [photo for batch in batches for photo in batch.photos]
    assert [photo.index for photo in photos] == [0, 1, 2]
    for photo, number in zip(photos, (4, 2, 9), strict=True):
        with Image.open(manifest.path_of(number)) as picture:
            wanted = [transform(picture) for transform in TRANSFORMS]
        assert photo.size == (32, 40) and photo.pixels is None
        assert len(photo.inputs) == 2 and all(map(torch.equal, photo.inputs, wanted))


def test_without_a_transform_the_pixels_are_kept(manifest: SegmentationManifest) -> None:
    (photo,) = next(iter(build_photo_loader(manifest.take([5]), [], batch_size=1, num_workers=0))).photos
    with Image.open(manifest.path_of(5)) as picture:
        wanted = np.asarray(picture).transpose(2, 0, 1)
    assert photo.inputs == [] and photo.pixels.dtype == torch.uint8 and np.array_equal(photo.pixels.numpy(), wanted)
    assert photo.size == (32, 40)


def test_photographs_with_workers(manifest: SegmentationManifest) -> None:
    photos = [photo for batch in build_photo_loader(manifest, TRANSFORMS, batch_size=3, num_workers=2)
              for photo in batch.photos]
    alone = PhotoDataset(manifest, TRANSFORMS)
    assert [photo.index for photo in photos] == list(range(COUNT)) == list(range(len(alone)))
    assert all(torch.equal(photo.inputs[1], alone[photo.index].inputs[1]) for photo in photos)


def test_every_process_has_its_share_of_the_photographs(manifest: SegmentationManifest, monkeypatch) -> None:
    """0, 3, 6 ... and so on: none twice, none filled up."""
    shares = []
    monkeypatch.setattr("furnace.runtime.distributed.world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr("furnace.runtime.distributed.rank", lambda rank=rank: rank)
        loader = build_photo_loader(manifest, [], batch_size=4, num_workers=0)
        shares.append([photo.index for batch in loader for photo in batch.photos])
    assert shares == [list(range(rank, COUNT, 3)) for rank in range(3)]


def test_broken_photographs_are_told(tmp_path: Path) -> None:
    manifest = made(tmp_path)
    (tmp_path / "i3.png").write_bytes(b"x")
    (tmp_path / "i5.png").write_bytes((tmp_path / "i5.png").read_bytes()[:900])
    (batch,) = build_photo_loader(manifest.take([2, 3, 5]), TRANSFORMS, batch_size=8, num_workers=0)
    assert [photo.index for photo in batch.photos] == [0] and [index for index, _ in batch.broken] == [1, 2]
    assert all(isinstance(reason, str) and reason for _, reason in batch.broken)
    empty = collate_photos([PhotoDataset(manifest, [])[3]])
    assert empty.photos == [] and len(empty.broken) == 1


def test_a_loader_in_order_of_any_dataset() -> None:
    """Batches of the size asked for, on a CPU at most eight; its own way to put items together."""
    squares = [i * i for i in range(11)]
    loader = loader_in_order(squares, batch_size=4, num_workers=0, collate_fn=tuple)
    assert list(loader) == [(0, 1, 4, 9), (16, 25, 36, 49), (64, 81, 100)]
    assert loader_in_order(squares, batch_size=64, num_workers=0).batch_size == LARGEST_BATCH["cpu"] == 8
    assert loader_in_order(squares, batch_size=64, num_workers=0, device="cuda").batch_size == 64
    assert loader_in_order(squares[:2], batch_size=4, num_workers=30).num_workers == 2, "no more workers than images"


def test_broken_files_are_told(tmp_path: Path) -> None:
    manifest = made(tmp_path)
    (tmp_path / "i3.png").write_bytes(b"x")
    (tmp_path / "m5.png").write_bytes((tmp_path / "m5.png").read_bytes()[:60])
    Image.fromarray(np.full((32, 40), 7, np.uint8)).save(tmp_path / "m6.png")
    dataset = SegmentationDataset(manifest, RANDOM, seed=0)
    batch = collate_with_masks([dataset[i] for i in (2, 3, 5, Draw(6, 1, 9), 4)])
    assert batch.indices == [2, 4] and batch.images.shape[0] == batch.masks.shape[0] == 2
    assert [index for index, _ in batch.broken] == [3, 5, 6]
    assert batch.broken[1][1].startswith("its mask m5.png: ") and batch.broken[2][1].endswith("grey values 7")
    empty = collate_with_masks([dataset[3]])
    assert empty.images is None and empty.masks is None and empty.pin_memory() is empty
