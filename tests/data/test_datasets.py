"""Loaders: the manifest's order, every image once, nothing padded, broken files listed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from furnace.data import datasets
from furnace.data.datasets import Batch, ImageDataset, StridedSampler, build_loader, collate
from furnace.data.manifest import Manifest, read_manifest
from furnace.runtime import distributed
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
