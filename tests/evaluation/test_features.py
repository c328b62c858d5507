"""Extraction: the order, the numbers, nothing lost or padded, in one process and in two."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import furnace
from furnace.data.datasets import build_loader
from furnace.data.images import load_rgb
from furnace.data.manifest import Manifest, read_manifest
from furnace.data.transforms import build_transform
from furnace.evaluation.features import extract_features
from furnace.models import create_backbone
from furnace.runtime.files import UserError
from helpers import ROOT, small_set


def tensor(image: Image.Image) -> torch.Tensor:
    """(H, W, 3) uint8 -> (3, H, W) in 0..1."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


class Calls(list):
    """What forward saw; a copy of the backbone (bf16 runs on one) writes into the same list."""

    def __deepcopy__(self, _: dict) -> "Calls":
        return self


class Tiny(nn.Module):
    """A backbone with batch norm and dropout, which eval mode must silence."""

    num_features = 5

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 5, 4, stride=4)
        self.norm = nn.BatchNorm2d(5)
        self.drop = nn.Dropout(0.5)
        self.calls: list[tuple[int, bool, bool, torch.dtype]] = Calls()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 5)."""
        out = self.drop(self.norm(self.conv(x))).mean(dim=(2, 3))
        self.calls.append((len(x), self.training, torch.is_grad_enabled(), out.dtype))
        return out


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """21 images."""
    return read_manifest(small_set(tmp_path_factory.mktemp("set")), nb_classes=3)


def plain(manifest: Manifest) -> np.ndarray:
    """(N, 5) by a loop over single images."""
    backbone = Tiny().eval()
    with torch.no_grad():
        rows = [backbone(tensor(load_rgb(manifest.path_of(i)))[None])[0].numpy() for i in range(len(manifest))]
    return np.stack(rows)


def extract(manifest: Manifest, backbone: nn.Module | None = None, batch_size: int = 4, transform=tensor, **more):
    """One process."""
    loader = build_loader(manifest, transform, batch_size=batch_size, num_workers=0)
    return extract_features(backbone or Tiny(), loader, device="cpu", **more)


@pytest.mark.parametrize("batch_size", [1, 4, 7, 8])
def test_equal_to_a_plain_loop(manifest: Manifest, batch_size: int) -> None:
    backbone = Tiny()
    found = extract(manifest, backbone, batch_size)
    np.testing.assert_allclose(found.embeddings, plain(manifest), rtol=0, atol=1e-6)
    assert found.embeddings.dtype == np.float32 and found.embeddings.shape == (21, 5)
    assert found.filenames == manifest.filenames and found.labels.tolist() == manifest.labels.tolist()
    assert [size for size, *_ in backbone.calls] == [batch_size] * -(-21 // batch_size)  # the last one is filled up


def test_order_of_a_shuffled_manifest(manifest: Manifest) -> None:
    order = np.random.default_rng(0).permutation(21)
    found = extract(manifest.take(order))
    np.testing.assert_allclose(found.embeddings, plain(manifest)[order], rtol=0, atol=1e-6)
    assert found.filenames == [manifest.filenames[i] for i in order]
    np.testing.assert_array_equal(found.labels, manifest.labels[order])


@pytest.mark.parametrize("count", [1, 3])
def test_fewer_images_than_a_batch(manifest: Manifest, count: int) -> None:
    found = extract(manifest.take(range(count)))
    np.testing.assert_allclose(found.embeddings, plain(manifest)[:count], rtol=0, atol=1e-6)


def test_no_image(manifest: Manifest) -> None:
    found = extract(manifest.take([]))
    assert found.embeddings.shape == (0, 5) and found.filenames == [] and len(found.labels) == 0


def test_eval_mode_without_gradients(manifest: Manifest) -> None:
    backbone = Tiny().train()
    statistics = backbone.norm.running_mean.clone()
    found = extract(manifest, backbone)
    assert {(training, grad) for _, training, grad, _ in backbone.calls} == {(False, False)}
    assert torch.equal(backbone.norm.running_mean, statistics)
    assert all(parameter.grad is None for parameter in backbone.parameters())
    np.testing.assert_array_equal(extract(manifest, backbone).embeddings, found.embeddings)


def test_the_backbone_can_be_trained_afterwards(manifest: Manifest) -> None:
    backbone = Tiny()
    extract(manifest, backbone)
    backbone(torch.rand(2, 3, 8, 8)).sum().backward()
    assert backbone.conv.weight.grad.abs().sum() > 0


def test_a_backbone_that_was_moved_can_be_trained_afterwards(manifest: Manifest) -> None:
    class Moved(Tiny):
        """A move that copies every tensor, as the one to a GPU does."""

        def to(self, device: torch.device) -> nn.Module:
            return super().to(device, torch.float64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.double())

    backbone = Moved()
    extract(manifest.take([0]), backbone)
    inputs = torch.rand(2, 3, 8, 8, requires_grad=True)
    backbone(inputs).sum().backward()
    assert inputs.grad.abs().sum() > 0


def test_bf16_is_stored_as_float32(manifest: Manifest) -> None:
    backbone = Tiny()
    found = extract(manifest, backbone, amp_dtype="bf16")
    exact = plain(manifest)
    assert found.embeddings.dtype == np.float32 and {dtype for *_, dtype in backbone.calls} == {torch.bfloat16}
    difference = np.abs(found.embeddings - exact).max()
    assert 1e-6 < difference < 0.02


def test_bf16_weights_are_cast_once_as_autocast_would(manifest: Manifest) -> None:
    """On a real ViT; the backbone itself stays in fp32.

    Bit for bit where the processor multiplies in bf16; others round some batches otherwise, by their place in memory.
    """
    backbone = create_backbone("timm:test_vit", "random", input_size=160)
    transform = build_transform(backbone)
    found = extract(manifest, backbone, batch_size=7, transform=transform, amp_dtype="bf16")
    images = torch.stack([transform(load_rgb(manifest.path_of(i))) for i in range(21)])
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        expected = torch.cat([backbone(part) for part in images.split(7)])
    distance = np.abs(found.embeddings - expected.float().numpy()).max(axis=1)  # (21,)
    assert (distance == 0).mean() > 0.5 and distance.max() < 0.03
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}


def test_features_do_not_depend_on_company(manifest: Manifest) -> None:
    """The last bit of an image's features is the same alone, among others, and in another place of the batch."""
    backbone = create_backbone("timm:test_vit", "random", input_size=160)
    transform = build_transform(backbone)
    whole = extract(manifest, backbone, batch_size=8, transform=transform).embeddings
    order = np.random.default_rng(1).permutation(21)[:13]
    np.testing.assert_array_equal(extract(manifest.take(order), backbone, batch_size=8, transform=transform).embeddings,
                                  whole[order])
    np.testing.assert_array_equal(extract(manifest.take([4]), backbone, batch_size=8, transform=transform).embeddings,
                                  whole[[4]])


def test_batches_are_halved_when_the_gpu_is_full(manifest: Manifest, caplog) -> None:
    """The same features; later batches begin with the size that fitted; a single image that does not fit is told."""
    class Small(Tiny):
        room = 3

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) > self.room:
                raise torch.cuda.OutOfMemoryError("full")
            return super().forward(x)

    backbone = Small()
    found = extract(manifest, backbone, batch_size=8)
    np.testing.assert_allclose(found.embeddings, plain(manifest), rtol=0, atol=1e-6)
    assert {size for size, *_ in backbone.calls} == {2}
    assert caplog.text.count("going on with batches of 4") == caplog.text.count("going on with batches of 2") == 1
    backbone.room = 0
    with pytest.raises(UserError, match="one image does not fit into the GPU's memory"):
        extract(manifest, backbone, batch_size=8)


def test_all_broken_files_in_one_error(tmp_path: Path) -> None:
    manifest = read_manifest(small_set(tmp_path), nb_classes=3)
    for index in (2, 9, 20):
        path = manifest.path_of(index)
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="3 images cannot be decoded") as caught:
        extract(manifest)
    lines = str(caught.value).splitlines()
    for line, index in zip(lines[1:4], (2, 9, 20), strict=True):
        assert line.startswith(f"  row {index + 2}, {manifest.path_of(index)}: ")
    with pytest.raises(UserError, match="1 image cannot be decoded"):
        extract(manifest.take([0, 9]))
    assert len(extract(manifest.take([0, 1])).embeddings) == 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(manifest: Manifest, value: float) -> None:
    class Bad(Tiny):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = super().forward(x)
            if len(self.calls) == 2:
                out[1, 3] = value
            return out

    with pytest.raises(UserError, match=r"features of 1 images are not finite in bf16") as caught:
        extract(manifest, Bad(), amp_dtype="bf16")
    assert f"({manifest.filenames[5]})" in str(caught.value) and "--amp_dtype fp32" in str(caught.value)


# ------------------------------------------------------------------- two processes

WORKER = """
import sys
sys.path[:0] = [{tests!r}, {library!r}, {here!r}]
import numpy as np, torch
torch.set_num_threads(1)
import test_features as t
from furnace.runtime import distributed
from furnace.data.manifest import read_manifest
from furnace.runtime.files import UserError
distributed.start()
assert distributed.world_size() == 2
for csv, count, out in {jobs}:
    manifest = read_manifest(csv, nb_classes=3).take(range(count))
    try:
        found = t.extract(manifest)
    except UserError as error:
        print("REFUSED", distributed.rank(), str(error).count("  row "), flush=True)
        continue
    assert (found is None) == (distributed.rank() != 0)
    if found is not None:
        np.savez(out, embeddings=found.embeddings, labels=found.labels, filenames=found.filenames)
distributed.stop()
"""


def two_processes(jobs: list[tuple[str, int, str]]) -> list[str]:
    """Do (csv, images, output) in two gloo processes, started with torchrun's variables; what they printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = WORKER.format(tests=str(ROOT / "tests"), library=str(Path(furnace.__file__).parent.parent),
                           here=str(Path(__file__).parent), jobs=jobs)
    processes = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                  text=True, env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank),
                                                  "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                                                  "CUDA_VISIBLE_DEVICES": ""})
                 for rank in range(2)]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return outputs


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    """Even and odd N, N = 1 (the second process has none), and broken files in both shares, over one start."""
    good, damaged = small_set(tmp_path / "good"), small_set(tmp_path / "damaged")
    broken = read_manifest(damaged, nb_classes=3)
    for index in (3, 6, 20):  # one lies in the second process's share, two in the first's
        path = broken.path_of(index)
        path.write_bytes(path.read_bytes()[:200])
    counts = [21, 20, 2, 1]
    outputs = two_processes([(str(good), n, f"{tmp_path}/{n}.npz") for n in counts] +
                            [(str(damaged), 21, f"{tmp_path}/no.npz"), (str(damaged), 3, f"{tmp_path}/3.npz")])
    manifest = read_manifest(good, nb_classes=3)
    for count in [*counts, 3]:  # the first three of the damaged set are whole, and the same pictures
        one = extract(manifest.take(range(count)))
        with np.load(tmp_path / f"{count}.npz") as two:
            np.testing.assert_allclose(two["embeddings"], one.embeddings, rtol=0, atol=1e-6)
            assert two["embeddings"].dtype == np.float32 and two["embeddings"].shape == (count, 5)
            np.testing.assert_array_equal(two["labels"], one.labels)
            assert two["filenames"].tolist() == one.filenames
    for rank, output in enumerate(outputs):
        assert output.count("REFUSED") == 1 and f"REFUSED {rank} 3" in output  # the whole list in every process
    assert not (tmp_path / "no.npz").exists()
