"""Loaders: the manifest's order, every image once, nothing padded, broken files listed; seeded augmentation."""

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from furnace.data import datasets
from furnace.data.datasets import (
    Batch,
    ImageDataset,
    StridedSampler,
    broken_files,
    build_loader,
    build_train_loader,
    collate,
    refuse_broken,
    subset_loader,
)
from furnace.data.manifest import Manifest, read_manifest
from furnace.data.samplers import Draw, TrainSampler
from furnace.runtime import distributed
from furnace.runtime.batch_plan import BatchPlan
from furnace.runtime.files import UserError
from furnace.runtime.seeding import seed_all
from helpers import draw_images, small_set


def tensor(image: Image.Image) -> torch.Tensor:
    """(H, W, 3) uint8 -> (3, H, W) float32."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """21 images of 40 x 32."""
    return read_manifest(small_set(tmp_path_factory.mktemp("set")), nb_classes=3)


@pytest.fixture()
def broken(tmp_path: Path) -> Manifest:
    """21 images; 3, 4 and 20 are cut off after their header."""
    manifest = read_manifest(small_set(tmp_path), nb_classes=3)
    for index in (3, 4, 20):
        path = manifest.path_of(index)
        path.write_bytes(path.read_bytes()[:200])
    return manifest


def test_dataset(manifest: Manifest) -> None:
    dataset = ImageDataset(manifest, tensor)
    image, index = dataset[7]
    assert len(dataset) == 21 and index == 7
    with Image.open(manifest.path_of(7)) as expected:
        assert torch.equal(image, tensor(expected))


@pytest.mark.parametrize(("batch_size", "sizes"), [(1, [1] * 21), (4, [4] * 5 + [1]), (7, [7] * 3), (8, [8, 8, 5])])
def test_order_and_the_last_batch(manifest: Manifest, batch_size: int, sizes: list[int]) -> None:
    batches = list(build_loader(manifest, tensor, batch_size=batch_size, num_workers=0))
    assert [len(batch.images) for batch in batches] == [len(batch.indices) for batch in batches] == sizes
    assert [i for batch in batches for i in batch.indices] == list(range(21))
    whole = torch.cat([batch.images for batch in batches])
    expected = torch.stack([tensor(Image.open(manifest.path_of(i))) for i in range(21)])
    assert whole.dtype == torch.float32 and torch.equal(whole, expected)
    assert not any(batch.broken for batch in batches)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_batch_size_is_an_upper_bound(monkeypatch, manifest: Manifest, device: str) -> None:
    monkeypatch.setitem(datasets.LARGEST_BATCH, device, 6)
    for asked, given in ((1000, 6), (6, 6), (5, 5)):
        assert build_loader(manifest, tensor, batch_size=asked, num_workers=0, device=device).batch_size == given


def test_a_published_batch_of_1000_is_read_in_pieces(monkeypatch, manifest: Manifest) -> None:
    monkeypatch.setitem(datasets.LARGEST_BATCH, "cpu", 10)
    batches = list(build_loader(manifest, tensor, batch_size=1000, num_workers=0))
    assert [len(batch.images) for batch in batches] == [10, 10, 1]
    assert [i for batch in batches for i in batch.indices] == list(range(21))


def test_workers_make_no_difference(broken: Manifest) -> None:
    alone, two = (list(build_loader(broken, tensor, batch_size=4, num_workers=n)) for n in (0, 2))
    assert len(alone) == len(two) == 6
    for a, b in zip(alone, two, strict=True):
        assert a.indices == b.indices and a.broken == b.broken
        assert torch.equal(a.images, b.images) if a.images is not None else b.images is None


def test_broken_files_are_listed(broken: Manifest) -> None:
    batches = list(build_loader(broken, tensor, batch_size=4, num_workers=0))
    assert [i for batch in batches for i, _ in batch.broken] == [3, 4, 20]
    assert all(reason for batch in batches for _, reason in batch.broken)
    assert [i for batch in batches for i in batch.indices] == [i for i in range(21) if i not in (3, 4, 20)]
    assert [len(batch.images) if batch.images is not None else None for batch in batches] == [3, 3, 4, 4, 4, None]


def test_a_file_that_vanished_is_listed(manifest: Manifest, tmp_path: Path) -> None:
    gone = manifest.take([0]).frame.assign(image=str(tmp_path / "gone.png"))
    item = ImageDataset(Manifest(**{**vars(manifest), "frame": gone}), tensor)[0]
    assert item[1] == 0 and "gone.png" in item[0]


def test_an_error_of_the_transform_is_not_the_files_fault(manifest: Manifest) -> None:
    def fails(image: Image.Image) -> torch.Tensor:
        raise ValueError("my mistake")

    with pytest.raises(ValueError, match="my mistake"):
        ImageDataset(manifest, fails)[0]


def test_collate() -> None:
    images = [torch.full((3, 2, 2), float(i)) for i in range(3)]
    batch = collate([(images[0], 4), ("bad", 5), (images[2], 9)])
    assert isinstance(batch, Batch) and batch.indices == [4, 9] and batch.broken == [(5, "bad")]
    assert torch.equal(batch.images, torch.stack([images[0], images[2]]))
    assert collate([("bad", 1)]).images is None


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [0, 1, 3, 4, 21])
def test_shards_cover_everything_once(monkeypatch, world_size: int, length: int) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: world_size)
    shards = []
    for rank in range(world_size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        sampler = StridedSampler(range(length))
        shards.append(list(sampler))
        assert len(sampler) == len(shards[-1]) and all(i % world_size == rank for i in shards[-1])
        assert shards[-1] == sorted(shards[-1])
    assert sorted(i for shard in shards for i in shard) == list(range(length))


def test_a_loader_reads_its_shard(monkeypatch, manifest: Manifest) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    batches = list(build_loader(manifest, tensor, batch_size=4, num_workers=0))
    assert [i for batch in batches for i in batch.indices] == list(range(1, 21, 2))


def test_an_empty_manifest(manifest: Manifest) -> None:
    assert list(build_loader(manifest.take([]), tensor, batch_size=4, num_workers=2)) == []


def test_images_of_two_sizes_need_a_transform(tmp_path: Path, manifest: Manifest) -> None:
    draw_images(tmp_path, ["wide.png"], size=(50, 32))
    frame = manifest.take([0, 1]).frame.copy()
    frame.loc[1, "image"] = str(tmp_path / "wide.png")
    loader = build_loader(Manifest(**{**vars(manifest), "frame": frame}), lambda image: tensor(image.resize((8, 8))),
                          batch_size=2, num_workers=0)
    assert [tuple(batch.images.shape) for batch in loader] == [(2, 3, 8, 8)]


# --------------------------------------------------------------------------------------------------------- training

PLAN = BatchPlan(micro=3, accumulation=2, world_size=1, steps_per_epoch=3)  # 18 of 21 images


def numbers(image: Image.Image) -> torch.Tensor:
    """(4,): a number from each of the three generators, and the image's first red value."""
    return torch.tensor([random.random(), np.random.rand(), torch.rand(()).item(), image.getpixel((0, 0))[0]],
                        dtype=torch.float64)


def states() -> tuple:
    """The global generators, comparable."""
    return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()


def train_loader(manifest: Manifest, num_workers: int = 0, seed: int = 5, plan: BatchPlan = PLAN):
    """Of the whole manifest."""
    return build_train_loader(manifest, numbers, TrainSampler(len(manifest), plan=plan, seed=1), plan=plan, seed=seed,
                              num_workers=num_workers)


def epoch(loader, number: int, update: int = 0) -> list[Batch]:
    """The batches from there on."""
    loader.sampler.set_position(number, update)
    return list(loader)


def test_seeded_numbers_depend_on_the_draw_alone(manifest: Manifest) -> None:
    """Seed, epoch and position change them, the image does not, and they are those of ``seed_all``."""
    dataset = ImageDataset(manifest, numbers, seed=5)
    first, index = dataset[Draw(7, 2, 11)]
    assert index == 7
    torch.rand(3), random.random()
    assert torch.equal(dataset[Draw(7, 2, 11)][0], first)
    assert torch.equal(dataset[Draw(8, 2, 11)][0][:3], first[:3])
    others = [dataset[Draw(7, 3, 11)], dataset[Draw(7, 2, 12)], ImageDataset(manifest, numbers, seed=6)[Draw(7, 2, 11)]]
    for other, _ in others:
        assert (other[:3] != first[:3]).all() and other[3] == first[3]
    seed_all(5, 2, 11)
    with Image.open(manifest.path_of(7)) as image:
        assert torch.equal(numbers(image), first)


def test_an_index_is_a_draw_of_epoch_0(manifest: Manifest) -> None:
    dataset = ImageDataset(manifest, numbers, seed=5)
    assert torch.equal(dataset[7][0], dataset[Draw(7, 0, 7)][0]) and dataset[7][1] == 7


def test_seeded_images_leave_the_global_generators_alone(manifest: Manifest) -> None:
    before = states()
    ImageDataset(manifest, numbers, seed=5)[3]
    epoch(train_loader(manifest), 0)
    epoch(train_loader(manifest, num_workers=1), 0)
    assert states() == before
    ImageDataset(manifest, numbers)[3]
    assert states() != before, "without a seed they are used"


def test_train_batches(manifest: Manifest) -> None:
    loader = train_loader(manifest)
    batches = epoch(loader, 4)
    assert [len(batch.images) for batch in batches] == [3] * 6 == [3] * len(loader)
    assert [i for batch in batches for i in batch.indices] == loader.sampler.epoch_indices(4).tolist()
    dataset = ImageDataset(manifest, numbers, seed=5)
    wanted = [dataset[Draw(int(i), 4, p)][0] for p, i in enumerate(loader.sampler.epoch_indices(4))]
    assert torch.equal(torch.cat([batch.images for batch in batches]), torch.stack(wanted))
    assert not torch.equal(batches[0].images, epoch(train_loader(manifest, seed=6), 4)[0].images)


def test_train_batches_after_a_resume_and_with_workers(manifest: Manifest) -> None:
    """The same pictures; the workers outlive an epoch."""
    alone, two = train_loader(manifest), train_loader(manifest, num_workers=2)
    for number, update in ((0, 0), (1, 0), (1, 2)):
        whole, tail = epoch(alone, number)[2 * update:], epoch(two, number, update)
        assert [batch.indices for batch in tail] == [batch.indices for batch in whole]
        assert all(torch.equal(a.images, b.images) for a, b in zip(tail, whole, strict=True))
    assert two.persistent_workers and not alone.persistent_workers


def test_halved_batches_have_the_same_pictures(manifest: Manifest) -> None:
    """A plan for less memory changes how many are stacked, not which."""
    plan = BatchPlan(micro=6, accumulation=1, world_size=1, steps_per_epoch=3)
    whole, half = (torch.cat([batch.images for batch in epoch(train_loader(manifest, plan=p), 0)])
                   for p in (plan, plan.halved()))
    assert torch.equal(whole, half)


def test_seeded_loader_in_order(manifest: Manifest) -> None:
    """Random views of evaluation: the same whatever batch size, workers, and part of the manifest."""
    one = torch.cat([b.images for b in build_loader(manifest, numbers, batch_size=1, num_workers=0, seed=5)])
    loader = build_loader(manifest, numbers, batch_size=4, num_workers=2, seed=5)
    assert torch.equal(torch.cat([b.images for b in loader]), one)
    assert torch.equal(torch.cat([b.images for b in subset_loader(loader, [9, 2])]), one[[9, 2]])


def test_views_are_stacked(manifest: Manifest) -> None:
    loader = build_loader(manifest, lambda image: tensor(image).expand(5, 3, 32, 40), batch_size=2, num_workers=0)
    assert next(iter(loader)).images.shape == (2, 5, 3, 32, 40)


# ----------------------------------------------------------------------------------------------------- broken files

def test_broken_files(broken: Manifest) -> None:
    found = broken_files(broken)
    assert [(row, path) for row, path, _ in found] == [(i + 2, broken.path_of(i)) for i in (3, 4, 20)]
    assert all(reason for *_, reason in found)
    assert broken_files(broken.take([20, 0]))[0][0] == 22, "rows are those of the CSV"
    assert broken_files(broken.take([0, 1])) == []


def test_a_broken_file_in_training_is_told_with_all_others(broken: Manifest) -> None:
    """Both ways of finding them, the same words."""
    with pytest.raises(UserError, match="^3 images cannot be decoded:") as searched:
        refuse_broken(broken)
    reasons = [(i, ImageDataset(broken, tensor)[i][0]) for i in (20, 3, 4)]
    with pytest.raises(UserError) as told:
        refuse_broken(broken, reasons)
    assert str(told.value) == str(searched.value)
    lines = str(told.value).splitlines()
    assert lines[1] == f"  row 5, {broken.path_of(3)}: {reasons[1][1]}"
    assert lines[-1] == ("  Copy or download them again, or delete their rows (an unfinished training goes on with the "
                         "same list and files only).")
    with pytest.raises(UserError, match="^1 image cannot be decoded:"):
        refuse_broken(broken.take([3, 7]))
    with pytest.raises(UserError, match="the storage is not reliable"):
        refuse_broken(broken.take([0, 1]))


def test_a_broken_file_of_a_draw_is_named_by_its_image(broken: Manifest) -> None:
    reason, index = ImageDataset(broken, numbers, seed=0)[Draw(4, 2, 11)]
    assert index == 4 and isinstance(reason, str)


def test_a_worker_outlives_one_sigterm_for_a_while(tmp_path, monkeypatch) -> None:
    """A job's SIGTERM reaches workers, too: the batch in work still comes; a second one, or time, ends them."""
    monkeypatch.setattr(datasets, "LINGER", 2)
    manifest = read_manifest(small_set(tmp_path), nb_classes=3)
    loader = build_loader(manifest, pil_to_tensor, batch_size=2, num_workers=1)
    batches = iter(loader)
    next(batches)
    (worker,) = batches._workers
    os.kill(worker.pid, signal.SIGTERM)
    assert len(list(batches)) == 10 and not worker.is_alive()
    batches = iter(loader)
    next(batches)
    (worker,) = batches._workers
    began = time.monotonic()
    worker.terminate()
    with contextlib.suppress(RuntimeError):  # how PyTorch tells the loss of a worker
        time.sleep(0.2)
        worker.terminate()
        worker.join(timeout=10)
    assert worker.exitcode == 143 and time.monotonic() - began < 1.5
