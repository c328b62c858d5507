"""Crops of an image: the published changes and their chances, against torchvision's own functions."""

import colorsys
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F

from furnace.data import multicrop
from furnace.data.multicrop import (
    Crops,
    MultiCropBatch,
    blank_batch,
    blend,
    blur,
    build_multicrop,
    crop_box,
    jitter,
    luma,
    resized_crop,
    turn_hue,
)
from furnace.runtime.files import UserError
from furnace.runtime.seeding import seeded

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALL = Crops(global_size=12, local_size=8, local_crops=3)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """A smooth picture of 120 x 90 in many colours."""
    coarse = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((120, 90), Image.Resampling.BICUBIC)


def made(crops: Crops = SMALL) -> multicrop.MultiCrop:
    """Values stay in 0..1."""
    return build_multicrop(crops, mean=(0, 0, 0), std=(1, 1, 1))


def within(count: int, draws: int, chance: float) -> bool:
    """Five standard deviations; exact for chances of 0 and 1."""
    return abs(count - draws * chance) <= 5 * (draws * chance * (1 - chance)) ** 0.5


# ----------------------------------------------------------------------------------------------------- whole crops

def published(image: Image.Image, size: int, scale: tuple, blurs: float, solarize: float,
              rng: random.Random) -> torch.Tensor:
    """One view with torchvision's functions, in the same order of random numbers."""
    view = F.resized_crop(image, *crop_box(image.height, image.width, scale, rng), [size, size],
                          InterpolationMode.BICUBIC)
    view = F.to_tensor(F.hflip(view) if rng.random() < 0.5 else view)
    if rng.random() < 0.8:
        for step in rng.sample(range(4), 4):
            change, low, high = [(F.adjust_brightness, 0.6, 1.4), (F.adjust_contrast, 0.6, 1.4),
                                 (F.adjust_saturation, 0.8, 1.2), (F.adjust_hue, -0.1, 0.1)][step]
            view = change(view, rng.uniform(low, high))
    if rng.random() < 0.2:
        view = F.rgb_to_grayscale(view, 3)
    if rng.random() < blurs:
        view = F.gaussian_blur(view, [9, 9], [rng.uniform(0.1, 2.0)] * 2)
    if rng.random() < solarize:
        view = F.solarize(view, 128 / 255)
    return F.normalize(view, MEAN, STD)


@pytest.mark.parametrize("compat", [False, True])
def test_crops_are_the_published_ones(photo: Image.Image, compat: bool) -> None:
    """Fifteen draws; only resizing differs, by one level of 255 in one of 200 pixels, before the changes."""
    first, second, local = (0.0, 0.9, 0.5) if compat else (1.0, 0.1, 0.5)
    crops = Crops(global_size=56, local_size=28, local_crops=3, dinov2_compat=compat)
    make = build_multicrop(crops, mean=MEAN, std=STD)
    for seed in range(15):
        rng = random.Random(seed)
        expected = [published(photo, 56, (0.32, 1), first, 0.0, rng), published(photo, 56, (0.32, 1), second, 0.2, rng),
                    *(published(photo, 28, (0.05, 0.32), local, 0.0, rng) for _ in range(3))]
        larges, smalls = make(photo, random.Random(seed))
        for found, wanted in zip([*larges, *smalls], expected, strict=True):
            apart = (found - wanted).abs().mul(255 * 0.225)
            assert apart.mean() < 0.25 and apart.max() < 8


def test_shapes(photo: Image.Image) -> None:
    """By default DermINO's: 2 x 224 and 8 x 98 pixels, whole numbers of patches of 14."""
    larges, smalls = build_multicrop(Crops(), mean=MEAN, std=STD)(photo)
    assert larges.shape == (2, 3, 224, 224) and smalls.shape == (8, 3, 98, 98)
    assert larges.dtype == smalls.dtype == torch.float32 and 224 % 14 == 98 % 14 == 0
    larges, smalls = made(Crops(global_size=16, local_crops=0))(photo)
    assert larges.shape == (2, 3, 16, 16) and smalls.shape == (0, 3, 98, 98)


def test_no_two_views_are_alike(photo: Image.Image) -> None:
    larges, smalls = made()(photo, random.Random(0))
    assert not torch.equal(*larges) and len({view.sum().item() for view in smalls}) == 3


def test_normalisation(monkeypatch) -> None:
    monkeypatch.setattr(multicrop, "JITTER", 0)
    monkeypatch.setattr(multicrop, "GREY", 0)
    crops = build_multicrop(SMALL, mean=MEAN, std=STD)(Image.new("RGB", (20, 20), (100, 50, 20)), random.Random(1))
    for views in crops:
        for channel, value in enumerate((100, 50, 20)):
            expected = (value / 255 - MEAN[channel]) / STD[channel]
            assert (views[:, channel] - expected).abs().max() < 1e-4


def test_random_numbers(photo: Image.Image) -> None:
    """They come from the generator that is given, else from Python's own; nothing else moves."""
    make = made()
    state, torch_state = random.getstate(), torch.get_rng_state()
    first, again, other = (make(photo, random.Random(seed)) for seed in (3, 3, 4))
    assert random.getstate() == state and torch.equal(torch.get_rng_state(), torch_state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    found = []
    for seed in (5, 5, 6):
        with seeded(seed):
            found.append(make(photo)[0])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_a_tensor_is_as_good_and_stays(photo: Image.Image, tmp_path: Path) -> None:
    pixels = F.pil_to_tensor(photo)
    before = pixels.clone()
    found, expected = made()(pixels, random.Random(0)), made()(photo, random.Random(0))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)) and torch.equal(pixels, before)
    photo.save(tmp_path / "p.png")
    assert torch.equal(made().load(tmp_path / "p.png"), before)


# ---------------------------------------------------------------------------------------------------------- chances

@pytest.mark.parametrize(("compat", "chances"), [(False, [1, 0.1, 0.5, 0.5, 0.5]), (True, [0, 0.9, 0.5, 0.5, 0.5])])
def test_blur_as_often_as_declared(monkeypatch, photo: Image.Image, compat: bool, chances: list) -> None:
    """Inverted only with dinov2_compat; sigma is uniform in 0.1 to 2."""
    sigmas = []

    def mark(values: np.ndarray, sigma: float) -> None:
        sigmas.append(sigma)
        values[:] = np.nan

    monkeypatch.setattr(multicrop, "blur", mark)
    make = made(Crops(global_size=12, local_size=8, local_crops=3, dinov2_compat=compat))
    counts = np.zeros(5, dtype=int)
    for seed in range(400):
        counts += torch.cat([views.isnan().flatten(1).all(1) for views in make(photo, random.Random(seed))]).numpy()
    assert all(within(count, 400, chance) for count, chance in zip(counts, chances, strict=True)), counts
    assert 0.1 <= min(sigmas) < 0.2 and 1.9 < max(sigmas) <= 2 and abs(np.mean(sigmas) - 1.05) < 0.1


@pytest.mark.parametrize(("name", "chance"), [("jitter", 0.8), ("luma", 0.2)])
def test_jitter_and_grey_as_often_as_declared(monkeypatch, photo: Image.Image, name: str, chance: float) -> None:
    calls = []
    monkeypatch.setattr(multicrop, "jitter", lambda values, rng: None)
    original = multicrop.luma
    monkeypatch.setattr(multicrop, name, lambda values, rng=None: calls.append(1) or original(values))
    for seed in range(200):
        made()(photo, random.Random(seed))
    assert within(len(calls), 1000, chance)


def test_flip_and_solarize_as_often_as_declared(monkeypatch) -> None:
    """A ramp from left to right; of five views the second is inverted above 128 in one of five."""
    monkeypatch.setattr(multicrop, "JITTER", 0)
    ramp = Image.fromarray(np.tile(np.linspace(0, 120, 60, dtype=np.uint8)[None, :, None], (50, 1, 3)))
    white = Image.new("RGB", (50, 50), (200, 200, 200))
    make, flipped, inverted = made(), np.zeros(5, dtype=int), np.zeros(5, dtype=int)
    for seed in range(400):
        views = [view for views in make(ramp, random.Random(seed)) for view in views]
        flipped += [bool(view[0, :, 0].mean() > view[0, :, -1].mean()) for view in views]
        views = [view for views in make(white, random.Random(seed)) for view in views]
        inverted += [bool(view.mean() < 0.5) for view in views]
        assert all(abs(view.mean().item() * 255 - (55 if view.mean() < 0.5 else 200)) < 0.01 for view in views)
    assert all(within(count, 400, 0.5) for count in flipped), flipped
    assert within(inverted[1], 400, 0.2) and inverted[[0, 2, 3, 4]].sum() == 0, inverted


@pytest.mark.parametrize("scale", [(0.32, 1.0), (0.05, 0.32)])
def test_boxes_are_distributed_as_torchvisions(scale: tuple[float, float]) -> None:
    rng = random.Random(0)
    found = np.array([crop_box(90, 120, scale, rng) for _ in range(4000)])
    image = torch.empty(3, 90, 120)
    torch.manual_seed(0)
    expected = np.array([RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(4000)])
    for number in range(4):
        assert ks_2samp(found[:, number], expected[:, number]).pvalue > 1e-3
    assert (found[:, 0] + found[:, 2] <= 90).all() and (found[:, 1] + found[:, 3] <= 120).all() and found.min() >= 0
    assert (found[:, 0] + found[:, 2] == 90).any() and (found[:, 1] + found[:, 3] == 120).any()
    share = found[:, 2] * found[:, 3] / (90 * 120)
    assert share.min() > scale[0] * 0.95 and share.max() < min(1, scale[1] * 1.05) + 1e-9


@pytest.mark.parametrize(("height", "width"), [(10, 1000), (1000, 10), (1, 1)])
def test_a_box_that_never_fits_is_centred(height: int, width: int) -> None:
    expected = RandomResizedCrop.get_params(torch.empty(3, height, width), (1.0, 1.0), (3 / 4, 4 / 3))
    assert crop_box(height, width, (1.0, 1.0), random.Random(0)) == tuple(expected)


# ----------------------------------------------------------------------------------------------------------- pixels

@pytest.mark.parametrize("size", [12, 49, 150])
@pytest.mark.parametrize("box", [(0, 0, 90, 120), (11, 37, 40, 31)])
def test_resizing_is_pillows(photo: Image.Image, box: tuple, size: int) -> None:
    """Within two levels of 255, hardly anywhere more than none; no pixel outside the box has an influence."""
    pixels = F.pil_to_tensor(photo)[None].contiguous(memory_format=torch.channels_last)
    found = resized_crop(pixels, box, size)
    expected = np.asarray(F.resized_crop(photo, *box, [size, size], InterpolationMode.BICUBIC))
    assert found.dtype == np.uint8 and found.shape == (size, size, 3)
    apart = np.abs(found.astype(int) - expected)
    assert apart.max() <= 2 and (apart > 0).mean() < 0.01


@pytest.mark.parametrize("sigma", [0.1, 0.6, 2.0])
@pytest.mark.parametrize("shape", [(3, 5, 5), (3, 42, 42), (3, 9, 30)])
def test_blur(shape: tuple[int, int, int], sigma: float) -> None:
    values = np.random.default_rng(0).uniform(0, 255, shape).astype(np.float32)
    expected = F.gaussian_blur(torch.from_numpy(values.copy()), [9, 9], [sigma])
    blur(values, sigma)
    np.testing.assert_allclose(values, expected.numpy(), atol=1e-3)


def test_hue(photo: Image.Image) -> None:
    """Of every colour, of greys and of the corners of the cube; value and saturation stay (colorsys agrees)."""
    corners = [(r, g, b) for r in (0, 255) for g in (0, 255) for b in (0, 128, 255)]
    values = np.concatenate([np.array(corners, dtype=np.float32),
                             np.random.default_rng(0).uniform(0, 255, (300, 3)).astype(np.float32)]).T[:, None].copy()
    for turns in (-0.1, -0.03, 0.0, 0.1):
        found = values.copy()
        turn_hue(found, turns)
        for before, after in zip(values[:, 0].T / 255, found[:, 0].T / 255, strict=True):
            h, s, v = colorsys.rgb_to_hsv(*map(float, before))
            np.testing.assert_allclose(after, colorsys.hsv_to_rgb((h + turns) % 1, s, v), atol=1e-5)
        np.testing.assert_allclose(found / 255, F.adjust_hue(torch.from_numpy(values / 255), turns), atol=1e-5)


def test_luma_and_blend() -> None:
    values = np.array([[[10.0]], [[200.0]], [[30.0]]], dtype=np.float32)
    assert luma(values).item() == pytest.approx(0.299 * 10 + 0.587 * 200 + 0.114 * 30, abs=1e-4)
    blend(values, np.float32(100), 1.4)
    np.testing.assert_allclose(values[:, 0, 0], [0, 240, 2], atol=1e-4)
    blend(values, np.float32(100), 1.4)
    assert values[1, 0, 0] == 255


def test_jitter_takes_every_order() -> None:
    """With factors in the declared ranges: all 24 orders occur."""
    class Listening(random.Random):
        def sample(self, population, k):
            orders.add(tuple(order := super().sample(population, k)))
            return order

        def uniform(self, a, b):
            ranges.add((round(a, 6), round(b, 6)))
            return super().uniform(a, b)

    orders: set = set()
    ranges: set = set()
    rng, values = Listening(0), np.full((3, 2, 2), 90, dtype=np.float32)
    for _ in range(400):
        jitter(values.copy(), rng)
    assert len(orders) == 24 and ranges == {(0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)}


# ----------------------------------------------------------------------------------------------- options and batches

@pytest.mark.parametrize(("crops", "words"), [
    (Crops(global_size=4), "--global_crops_size 4 is too small"), (Crops(local_size=0), "--local_crops_size 0 is too"),
    (Crops(local_crops=-1), "--local_crops_number -1 is negative"),
    (Crops(global_scale=(0.5, 0.4)), "--global_crops_scale 0.5 0.4: give"),
    (Crops(local_scale=(0.0, 0.4)), "--local_crops_scale 0.0 0.4: give"),
    (Crops(local_scale=(0.1, 1.2)), "--local_crops_scale 0.1 1.2: give")])
def test_crops_that_cannot_be(crops: Crops, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_multicrop(crops, mean=MEAN, std=STD)


def test_blank_batch() -> None:
    """Twice four images; four crops of 16 patches hide the most that they can: 0.2, 0.3, 0.4 and 0.5 of them."""
    batch = blank_batch(4, Crops(global_size=16, local_size=8, local_crops=3), patch_size=4, classes=5)
    assert batch.globals.shape == (2, 4, 3, 16, 16) and batch.locals.shape == (3, 4, 3, 8, 8)
    assert batch.globals.dtype == batch.locals.dtype == batch.targets.dtype == torch.float32
    assert batch.masks.shape == (2, 4, 16) and batch.masks.dtype == batch.known.dtype == torch.bool
    assert sorted(batch.masks.sum(-1).flatten().tolist()) == [0, 0, 0, 0, 3, 4, 6, 8]
    assert batch.targets.shape == batch.known.shape == (4, 5) and batch.known.all() and batch.indices == [0, 1, 2, 3]
    bare = blank_batch(2, Crops(global_size=16, local_crops=0), patch_size=4, classes=None)
    assert bare.locals is bare.targets is bare.known is None and bare.broken == []


def test_all_tensors_are_pinned(monkeypatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: ("pinned", tuple(tensor.shape)))
    batch = blank_batch(2, SMALL, patch_size=4, classes=5).pin_memory()
    assert [getattr(batch, name)[0] for name in ("globals", "locals", "masks", "targets", "known")] == ["pinned"] * 5
    empty = MultiCropBatch(None, None, None, None, None, indices=[], broken=[(3, "cut off")])
    assert empty.pin_memory() is empty and empty.broken == [(3, "cut off")]
