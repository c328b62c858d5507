"""Masks of a segmenter: against one picture at a time with everything written out, windows, shares, faults, memory."""

import dataclasses
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from torchvision.transforms.v2 import functional

from furnace.data.unlabelled import read_images
from furnace.evaluation import lesion_masks as module
from furnace.evaluation.features import NotFiniteError
from furnace.evaluation.lesion_masks import SCALES, Masking, lesion_masks, scaled_sizes, to_size
from furnace.models.segmenter import SegmentationModel, create_segmenter, resize_segmenter
from furnace.runtime.files import ProcessError
from helpers import ROOT

MEAN, STD = (0.5, 0.4, 0.45), (0.2, 0.25, 0.3)
CPU = torch.device("cpu")
PLAIN = Masking(transform="default", mean=MEAN, std=STD, device=CPU, num_workers=0)
VIT, CNN = "timm:test_vit", "timm:test_resnet"
SIZES = [(41, 60), (70, 52), (64, 64), (33, 90), (48, 47), (50, 50), (90, 40), (61, 61), (40, 44), (39, 57)]

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def made(name: str, size: tuple[int, int], *, head: str = "linear") -> SegmentationModel:
    """A random segmenter whose masks are neither empty nor full, and whose probabilities fill 0 to 1."""
    model = create_segmenter(name, "random", head=head, input_size=size, channels=8, seed=3)
    noise = F.interpolate(torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0)), size, mode="bicubic")
    model.decode_head.conv_seg.weight.div_(model(noise).diff(dim=1).std() / 1.5)
    model.decode_head.conv_seg.bias[1] -= model(noise).diff(dim=1).median()
    return model


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory):
    """Ten pictures of ten sizes: smooth noise, so that neighbouring pixels agree."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i, (height, width) in enumerate(SIZES):
        smooth = ndimage.gaussian_filter(rng.normal(0, 1, (height, width, 3)), (4, 4, 0))
        pixels = 128 + 60 * smooth / smooth.std()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"p{i}.png")
    return read_images(folder)


# ------------------------------------------------------------------------------------------------------- the reference

FLIPPED = (lambda x: x, lambda x: torch.flip(x, (-1,)), lambda x: torch.flip(x, (-2,)), lambda x: torch.rot90(
    x, 2, (-2, -1)))  # each is its own inverse


def squashed(pixels: torch.Tensor, recipe: str, size: tuple[int, int]) -> torch.Tensor:
    """(3, H, W) uint8 -> (3, h, w): PanDerm's bicubic without antialiasing, the others' bilinear with it."""
    if recipe == "panderm":
        small = F.interpolate(pixels[None].float(), size, mode="bicubic")[0].round().clamp(0, 255)
    else:
        small = functional.resize(pixels, list(size), antialias=True).float()
    return (small / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


@torch.no_grad()
def slow_probability(model: SegmentationModel, pixels: torch.Tensor, how: Masking, *,
                     sizes: list[tuple[int, int]]) -> torch.Tensor:
    """(H, W) of one picture: every size and flip in a pass of its own, their mean, brought to the picture's size."""
    maps = []
    for size in sizes:
        brought = resize_segmenter(model, size) if model.plain else model
        image = squashed(pixels, how.transform, size)
        for flip in FLIPPED if how.flips else FLIPPED[:1]:
            logits = brought(flip(image)[None].contiguous())[0]
            lesion = flip(logits[1].exp() / logits.exp().sum(dim=0))
            maps.append(F.interpolate(lesion[None, None], sizes[0], mode="bilinear")[0, 0])
    return F.interpolate(torch.stack(maps).mean(dim=0)[None, None], pixels.shape[-2:], mode="bilinear")[0, 0]


def pixels_of(manifest, index: int) -> torch.Tensor:
    with Image.open(manifest.path_of(index)) as picture:
        return functional.pil_to_tensor(picture)


def check(found: dict[int, np.ndarray], wanted: dict[int, torch.Tensor], *, close: float = 1e-4) -> None:
    """Masks are those of the probabilities, but where these are 0.5 up to rounding; none is trivial."""
    assert list(found) == list(wanted)
    for index, mask in found.items():
        decided = (wanted[index] - 0.5).abs() > close
        assert mask.dtype == bool and mask.shape == tuple(wanted[index].shape)
        assert decided.float().mean() > 0.99
        assert np.array_equal(mask[decided], (wanted[index] > 0.5)[decided].numpy())
    assert 0.05 < np.concatenate([mask.ravel() for mask in found.values()]).mean() < 0.95


@pytest.mark.parametrize("name,size,sizes", [
    (VIT, (64, 64), [(64, 64), (48, 48), (80, 80)]), (CNN, (64, 96), [(64, 96), (64, 64), (64, 128)]),
    (CNN, (40, 52), [(40, 52), (32, 32), (64, 64)])], ids=["vit", "cnn", "cnn, no multiple of 32"])
@pytest.mark.parametrize("flips,scales", [(False, (1.0,)), (True, (1.0,)), (False, SCALES), (True, SCALES)],
                         ids=["plain", "flips", "scales", "both"])
def test_masks_of_one_picture_at_a_time(photos, name, size, sizes, flips: bool, scales: tuple) -> None:
    """In the manifest's order, at every picture's own size."""
    model = made(name, size)
    how = dataclasses.replace(PLAIN, flips=flips, scales=scales)
    used = sizes if scales == SCALES else sizes[:1]
    assert scaled_sizes(model, scales) == used
    wanted = {i: slow_probability(model, pixels_of(photos, i), how, sizes=used) for i in range(len(SIZES))}
    check(dict(lesion_masks(model, photos, how)), wanted)


@pytest.mark.parametrize("scales", [(1.0,), SCALES], ids=["flips", "flips and scales"])
def test_a_transformer_of_a_size_that_is_not_square(photos, scales: tuple) -> None:
    """32 x 64: a grid of 2 x 4 positions, for the sizes of --tta brought to 2 x 3 and 2 x 5."""
    model = made(VIT, (32, 64))
    how = dataclasses.replace(PLAIN, flips=True, scales=scales)
    wanted = {i: slow_probability(model, pixels_of(photos, i), how, sizes=scaled_sizes(model, scales))
              for i in range(len(SIZES))}
    check(dict(lesion_masks(model, photos, how)), wanted)


@pytest.mark.parametrize("recipe", ["panderm", "dermino"])
def test_the_recipe_decides_how_a_picture_is_squashed(photos, recipe: str) -> None:
    """PanDerm's bicubic gives other masks than the bilinear of the others."""
    model, how = made(CNN, (32, 32), head="upernet"), dataclasses.replace(PLAIN, transform=recipe)
    wanted = {i: slow_probability(model, pixels_of(photos, i), how, sizes=[(32, 32)]) for i in range(len(SIZES))}
    found = dict(lesion_masks(model, photos, how))
    check(found, wanted)
    default = dict(lesion_masks(model, photos, PLAIN))
    assert all(np.array_equal(found[i], default[i]) for i in found) == (recipe == "dermino")


def test_sizes_of_the_scales() -> None:
    """Multiples of the patch, or of 32; each once, and never 0."""
    vit, cnn = (create_segmenter(name, "random", head="linear", input_size=32) for name in (VIT, CNN))
    assert scaled_sizes(vit, SCALES) == [(32, 32)], "24 and 40 pixels lie between 16, 32 and 48: rounded to 32"
    assert scaled_sizes(vit, (1.0, 0.1, 2.0)) == [(32, 32), (16, 16), (64, 64)]
    assert scaled_sizes(cnn, (1.0, 0.1, 2.0)) == [(32, 32), (64, 64)]
    large = create_segmenter(VIT, "random", head="linear", input_size=(160, 224))
    assert scaled_sizes(large, (1.0, 0.75, 1.2)) == [(160, 224), (128, 160), (192, 272)]


def test_no_matter_how_the_pictures_are_dealt_into_batches(photos) -> None:
    model = made(CNN, (32, 32))
    first, *others = (dict(lesion_masks(model, photos, dataclasses.replace(PLAIN, batch_size=size)))
                      for size in (1, 3, 64))
    for other in others:
        assert sum(int((first[i] != other[i]).sum()) for i in first) <= 2, "but for rounding"


def test_half_precision(photos) -> None:
    """bf16 agrees but at the outline, on a copy of the model: the weights that were given stay float32."""
    model = made(VIT, (64, 64))
    masks, halves = (dict(lesion_masks(model, photos, dataclasses.replace(PLAIN, amp_dtype=name)))
                     for name in ("fp32", "bf16"))
    differ = np.concatenate([(masks[i] != halves[i]).ravel() for i in masks]).mean()
    assert 0 < differ < 0.05
    assert {value.dtype for value in model.state_dict().values() if value.is_floating_point()} == {torch.float32}


def test_largest_component(photos) -> None:
    """Kept and filled in every mask; an empty one stays empty."""
    model = made(VIT, (128, 128))
    every = dict(lesion_masks(model, photos, PLAIN))
    largest = dict(lesion_masks(model, photos, dataclasses.replace(PLAIN, largest=True)))
    changed = 0
    for i, mask in every.items():
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        wanted = ndimage.binary_fill_holes(labels == 1 + np.bincount(labels.ravel())[1:].argmax()) if count else mask
        assert np.array_equal(largest[i], wanted)
        changed += not np.array_equal(wanted, mask)
    assert changed > 2
    with torch.no_grad():
        model.decode_head.conv_seg.bias[1] -= 1e4
    assert not any(mask.any() for _, mask in lesion_masks(model, photos, dataclasses.replace(PLAIN, largest=True)))


def test_half_is_not_a_lesion(photos) -> None:
    """Above 0.5, not at it: equal logits are background, as argmax has it."""
    model = made(CNN, (64, 64))
    with torch.no_grad():
        model.decode_head.conv_seg.weight.zero_()
        model.decode_head.conv_seg.bias.zero_()
    same = photos.take([2])  # of the model's size: nothing is rounded on the way
    assert not any(mask.any() for _, mask in lesion_masks(model, same, PLAIN))
    with torch.no_grad():
        model.decode_head.conv_seg.bias[1] = 1e-3
    assert all(mask.all() for _, mask in lesion_masks(model, same, PLAIN))


# ------------------------------------------------------------------------------------------------------------- windows

def slow_windows(model: SegmentationModel, pixels: torch.Tensor, how: Masking, sizes: list[tuple[int, int]]
                 ) -> torch.Tensor:
    """Windows placed, weighted by a Hann curve, summed and divided, pixel sums in float64."""
    (height, width), side = pixels.shape[-2:], how.window
    side = (min(side[0], height), min(side[1], width))
    starts = []
    for whole, part in zip((height, width), side, strict=True):
        count = 1 if part == whole else int(np.ceil((whole - part) / max(1, int(part * (1 - how.overlap))))) + 1
        starts.append([0] if count == 1 else [i * (whole - part) // (count - 1) for i in range(count)])
    curve = [np.sin(np.pi * (np.arange(n) + 0.5) / n) ** 2 for n in side]
    weight, total, sums = np.outer(*curve), np.zeros((height, width)), np.zeros((height, width))
    for top in starts[0]:
        for left in starts[1]:
            part = pixels[:, top:top + side[0], left:left + side[1]]
            values = slow_probability(model, part, how, sizes=sizes).double().numpy()
            place = np.s_[top:top + side[0], left:left + side[1]]
            total[place] += weight * values
            sums[place] += weight
    return torch.from_numpy(total / sums)


@pytest.mark.parametrize("window,overlap,flips,scales", [
    ((32, 32), 0.5, False, (1.0,)), ((40, 24), 0.25, True, (1.0,)), ((30, 50), 0.6, False, (1.0, 1.5))])
def test_windows_against_a_slow_blend(photos, window, overlap: float, flips: bool, scales: tuple) -> None:
    """Each window is squashed to the model's size, with its views, and brought back to its own."""
    model = made(VIT, (32, 32))
    how = dataclasses.replace(PLAIN, window=window, overlap=overlap, flips=flips, scales=scales, batch_size=5)
    few = photos.take([0, 1, 3, 8])
    wanted = {i: slow_windows(model, pixels_of(few, i), how, scaled_sizes(model, scales)) for i in range(len(few))}
    check(dict(lesion_masks(model, few, how)), wanted)


@pytest.mark.parametrize("window", [(90, 90), (4000, 5000)])
def test_a_window_as_large_as_the_picture_is_none(photos, window: tuple[int, int]) -> None:
    model = made(CNN, (48, 48))
    whole = dict(lesion_masks(model, photos, PLAIN))
    found = dict(lesion_masks(model, photos, dataclasses.replace(PLAIN, window=window)))
    assert sum(int((whole[i] != found[i]).sum()) for i in whole) <= 2, "but for rounding"
    smaller = dict(lesion_masks(model, photos, dataclasses.replace(PLAIN, window=(24, 24))))
    assert sum(int((whole[i] != smaller[i]).sum()) for i in whole) > 100


def test_to_size() -> None:
    maps = torch.rand(2, 5, 7, generator=torch.Generator().manual_seed(0))
    wanted = F.interpolate(maps[:, None], (11, 8), mode="bilinear", align_corners=False)[:, 0]
    assert torch.equal(to_size(maps, (11, 8)), wanted) and torch.equal(to_size(maps[1], (11, 8)), wanted[1])
    assert to_size(maps, (5, 7)) is maps


# ------------------------------------------------------------------------------------------------- shares, faults, care

def test_every_process_has_its_share(photos, monkeypatch) -> None:
    """0, 3, 6 ... and so on: together each picture once, with the masks of a single process."""
    model = made(CNN, (32, 32))
    alone, together = dict(lesion_masks(model, photos, PLAIN)), {}
    monkeypatch.setattr("furnace.runtime.distributed.world_size", lambda: 3)
    monkeypatch.setattr("furnace.runtime.distributed.gather_lists", lambda items: items)
    for rank in range(3):
        monkeypatch.setattr("furnace.runtime.distributed.rank", lambda rank=rank: rank)
        share = dict(lesion_masks(model, photos, PLAIN))
        assert list(share) == list(range(rank, len(SIZES), 3)) and not share.keys() & together.keys()
        together |= share
    assert sum(int((alone[i] != together[i]).sum()) for i in alone) <= 2


@pytest.mark.parametrize("window", [None, (32, 32)])
def test_broken_files_are_listed_together(tmp_path: Path, window) -> None:
    """Those of every batch, after the last; what came before the first is handed out."""
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / f"p{i:02d}.png")
    manifest = read_images(tmp_path)
    for i in (3, 10):
        (tmp_path / f"p{i:02d}.png").write_bytes((tmp_path / f"p{i:02d}.png").read_bytes()[:900])
    got = []
    with pytest.raises(ProcessError, match=r"(?s)2 images cannot be decoded.*p03\.png.*p10\.png") as refused:
        for index, _ in lesion_masks(made(CNN, (32, 32)), manifest, dataclasses.replace(PLAIN, window=window,
                                                                                         batch_size=2)):
            got.append(index)
    assert got == ([0, 1] if window is None else [0, 1, 2]) and "p04" not in str(refused.value)


@pytest.mark.parametrize("window", [None, (32, 32)])
def test_logits_that_are_not_finite_name_the_picture(photos, window) -> None:
    model = made(CNN, (32, 32))
    with torch.no_grad():
        model.decode_head.conv_seg.bias[1] = float("nan")
    with pytest.raises(NotFiniteError, match=r"the logits of p0\.png.* are not finite in fp32 \(run with"):
        list(lesion_masks(model, photos, dataclasses.replace(PLAIN, window=window)))


def test_a_training_around_it_is_not_touched(photos) -> None:
    """Weights, statistics, gradients, what is trained: as before; eval mode is what is asked for.

    Between two masks the caller is outside of inference mode, and afterwards the model learns.
    """
    model = made(CNN, (32, 32)).train()
    frozen = next(model.parameters())
    frozen.requires_grad = False
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    kept = list(model.parameters())
    for number, _ in lesion_masks(model, photos, dataclasses.replace(PLAIN, flips=True, scales=SCALES)):
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu") and not model.training and number >= 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(a is b for a, b in zip(kept, model.parameters(), strict=True)) and not frozen.requires_grad
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (gradient is None) == (parameter.grad is None)
        assert gradient is None or torch.equal(gradient, parameter.grad)
    model.train()(torch.randn(2, 3, 32, 32)).square().mean().backward()


def test_views_in_words() -> None:
    assert PLAIN.views == "none"
    assert dataclasses.replace(PLAIN, flips=True).views == "4 flips"
    assert dataclasses.replace(PLAIN, flips=True, scales=SCALES).views == "4 flips and sizes x 1, 0.75, 1.25"


def test_flips_are_the_four() -> None:
    """None, left and right, up and down, both: each once."""
    assert sorted(module.FLIPS) == [(), (2,), (2, 3), (3,)]


# --------------------------------------------------------------------------------------------------------------- memory

PREDICT = textwrap.dedent("""
    import json, resource, sys
    from pathlib import Path
    import torch
    from PIL import Image
    from furnace.data.joint_transforms import build_image_transform
    from furnace.data.unlabelled import read_images
    from furnace.evaluation.lesion_masks import SCALES, Masking
    from furnace.models.segmentation_files import segmenter_meta, segmenter_of
    from furnace.models.segmenter import create_segmenter
    from furnace.segmentation_results import predict_photographs

    photo, out, window, scales = sys.argv[1:]
    def peak():  # of this process alone: ru_maxrss would begin with that of the process that started it
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * 1024

    model = create_segmenter("timm:test_vit", "random", input_size=64, channels=8)
    numbers = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    with Image.open(photo) as small, torch.no_grad():  # half of the picture is lesion
        small.draft("RGB", (750, 500))  # decoded at an eighth of its size
        image = build_image_transform(size=64, **numbers)(small)[None]
        model.decode_head.conv_seg.bias[1] -= model(image).diff(dim=1).median()
    meta = segmenter_meta(model, amp_dtype="fp32")
    segmenter = segmenter_of({"model": model.state_dict(), "meta": meta, "epoch": 0}, source="memory")
    how = Masking(transform="default", **numbers, device=torch.device("cpu"), flips=scales == "scales",
                  scales=SCALES if scales == "scales" else (1.0,), window=(int(window),) * 2 if int(window) else None,
                  largest=True)
    before = peak()
    table = predict_photographs(Path(out), segmenter, read_images(photo), how)
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 - before  # forked: it begins with the same
    print(json.dumps({"grown": peak() - before, "worker": max(0, worker), **table.iloc[0].to_dict()}, default=int))
""")


@pytest.fixture(scope="module")
def large_photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6000 x 4000 pixels, spots of many colours."""
    path = tmp_path_factory.mktemp("large") / "large.jpg"
    spots = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    Image.fromarray(spots).resize((6000, 4000), Image.Resampling.BILINEAR).save(path)
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read as Linux tells it")
@pytest.mark.parametrize("window,scales", [(0, "scales"), (1024, "plain")], ids=["whole", "window 1024"])
def test_a_photograph_of_24_million_pixels_stays_under_2_gb(tmp_path, large_photo, window: int, scales: str) -> None:
    """Above the weights, with the worker that decodes it, mask and outlined picture written."""
    done = subprocess.run([sys.executable, "-c", PREDICT, str(large_photo), str(tmp_path), str(window), scales],
                          capture_output=True, text=True, cwd=ROOT / "classification", timeout=400, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["height"], told["width"]) == (4000, 6000) and 0.05 < told["lesion_share"] < 1, told
    assert told["grown"] > 6000 * 4000, "at least a mask was in memory: something was measured"
    assert told["grown"] + told["worker"] < 2e9, told
    for name in ("masks/large_segmentation.png", "overlays/large.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (6000, 4000)
