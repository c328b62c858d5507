"""The evaluation and training transforms against the published ones and closed forms."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from torchvision import transforms as T

from furnace.data.images import load_rgb
from furnace.data.transforms import build_train_transform, build_transform
from furnace.models.panderm import PANDERM_EVAL as PANDERM
from furnace.runtime.files import UserError
from furnace.runtime.seeding import seeded
from helpers import GOLDEN


def config(**change) -> dict:
    """A plain config: no normalisation, no extra margin."""
    return {"input_size": (3, 32, 32), "mean": (0.0,) * 3, "std": (1.0,) * 3, "crop_pct": 1.0, "crop_mode": "center",
            "interpolation": "bilinear", **change}


def test_published_transform() -> None:
    with Image.open(GOLDEN / "synthetic_640x480.png") as image:
        found = build_transform(PANDERM)(image.convert("RGB"))
    expected = np.load(GOLDEN / "transformed_png.npy").reshape(3, 224, 224)
    assert found.dtype == torch.float32 and tuple(found.shape) == (3, 224, 224)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-6)


def test_a_backbone_and_its_config_are_the_same() -> None:
    backbone = SimpleNamespace(provenance=SimpleNamespace(data_config=PANDERM))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
    assert torch.equal(build_transform(backbone)(image), build_transform(PANDERM)(image))


def test_normalisation() -> None:
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.25, 2.0)
    image = Image.new("RGB", (50, 40), (255, 51, 0))
    found = build_transform(config(mean=mean, std=std))(image)
    expected = (np.array([1.0, 0.2, 0.0]) - mean) / std
    np.testing.assert_allclose(found.numpy(), np.broadcast_to(expected[:, None, None], (3, 32, 32)), atol=1e-6)


def test_centre_crop_of_an_image_of_the_right_height() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 52, 3), dtype=np.uint8)
    found = build_transform(config())(Image.fromarray(pixels))
    np.testing.assert_allclose(found.numpy(), pixels[:, 10:42].transpose(2, 0, 1) / 255, atol=1e-6)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("side", "crop_pct"), [(32, 0.875), (33, 0.9), (518, 1.0), (224, 0.95)])
def test_resize_follows_the_config(side: int, crop_pct: float, interpolation: str) -> None:
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (61, 83, 3), dtype=np.uint8))
    found = build_transform(config(input_size=(3, side, side), crop_pct=crop_pct, interpolation=interpolation))(image)
    height = int(side / crop_pct)
    how = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]
    resized = np.asarray(image.resize((int(height * 83 / 61), height), how))
    top, left = round((height - side) / 2), round((resized.shape[1] - side) / 2)
    expected = resized[top:top + side, left:left + side].transpose(2, 0, 1) / 255
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (300, 7), (7, 300), (32, 32)])
def test_any_image_gives_the_input_size(size: tuple[int, int]) -> None:
    found = build_transform(config(crop_pct=0.9))(Image.new("RGB", size, (255, 255, 255)))
    assert tuple(found.shape) == (3, 32, 32) and torch.equal(found, torch.ones(3, 32, 32))


@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
@pytest.mark.parametrize("size", [(224, 224), (600, 450), (450, 601), (1300, 1000)])
def test_fast_stays_within_one_grey_value(tmp_path, size: tuple[int, int], crop_pct: float) -> None:
    """Of camera-like JPEGs, smooth with noise."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noisy = np.asarray(coarse) + rng.normal(0, 10, (size[1], size[0], 3))
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(tmp_path / "a.jpg", quality=90)
    numbers = config(input_size=(3, 224, 224), crop_pct=crop_pct)
    fast = build_transform(numbers, "fast")
    one, two = build_transform(numbers)(load_rgb(tmp_path / "a.jpg")), fast(fast.load(tmp_path / "a.jpg"))
    assert one.shape == two.shape == (3, 224, 224) and two.dtype == torch.float32
    assert (one - two).abs().max() <= 1.001 / 255


def test_fast_normalises_by_the_same_numbers() -> None:
    picture = Image.new("RGB", (300, 300), (10, 200, 90))
    torch.testing.assert_close(build_transform(PANDERM, "fast")(picture), build_transform(PANDERM)(picture))


@pytest.mark.parametrize("change", [{"interpolation": "bicubic"}, {"crop_mode": "squash"},
                                    {"input_size": (3, 224, 196)}])
def test_fast_is_refused_where_it_would_differ(change: dict) -> None:
    with pytest.raises(UserError, match="--transform fast is for square centre crops"):
        build_transform(config(**change), "fast")


@pytest.mark.parametrize(("mode", "crop_pct"), [("published", 0.5), ("fast", 0.5), ("published", 1.0)])
def test_crop_pct_overrides_the_config(mode: str, crop_pct: float) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
    numbers = config(crop_pct=0.875)
    found = build_transform(numbers, mode, crop_pct=crop_pct)(image)
    assert torch.equal(found, build_transform(config(crop_pct=crop_pct), mode)(image))
    assert not torch.equal(found, build_transform(numbers, mode)(image)) and numbers["crop_pct"] == 0.875


@pytest.mark.parametrize("crop_pct", [0, -1, 1.5])
def test_crop_pct_out_of_range(crop_pct: float) -> None:
    for build in (build_transform, build_train_transform):
        with pytest.raises(UserError, match=r"--crop_pct .* is not in \(0, 1\]"):
            build(config(), crop_pct=crop_pct)


# --------------------------------------------------------------------------------------------------------- training

BILINEAR, BICUBIC = T.InterpolationMode.BILINEAR, T.InterpolationMode.BICUBIC
PANDERM_STD = (0.228, 0.224, 0.225)  # published, as the next list


def by_hand(*jitter: object, crop: object = None) -> T.Compose:
    """The published transform, for 224 pixels and PanDerm's numbers."""
    return T.Compose([T.Resize(256), crop or T.RandomResizedCrop(224, scale=(0.75, 1), interpolation=BILINEAR),
                      T.RandomHorizontalFlip(0.5), T.RandomVerticalFlip(0.5), T.RandomRotation((-45, 45)), *jitter,
                      T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), PANDERM_STD)])


def smooth(size: tuple[int, int] = (300, 240)) -> Image.Image:
    """(width, height): a picture with colours and edges."""
    small = np.random.default_rng(3).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def assert_same(transform, expected, times: int = 12) -> list[torch.Tensor]:
    """Equal bit for bit under the same seeds, and not all alike."""
    found = []
    for seed in range(times):
        with seeded(seed):
            found.append(transform(smooth()))
        with seeded(seed):
            assert torch.equal(found[-1], expected(smooth()))
        assert found[-1].shape == (3, 224, 224) and found[-1].dtype == torch.float32
    assert len({image.sum().item() for image in found}) == times
    return found


def test_published_training_transform() -> None:
    assert_same(build_train_transform(PANDERM), by_hand(T.ColorJitter(hue=0.2)))
    backbone = SimpleNamespace(provenance=SimpleNamespace(data_config=PANDERM))
    assert_same(build_train_transform(backbone), by_hand(T.ColorJitter(hue=(-0.2, 0.2))), times=2)


def test_color_jitter() -> None:
    """Zero is the published one, hue alone; a negative strength is refused."""
    assert_same(build_train_transform(PANDERM, color_jitter=0.4), by_hand(T.ColorJitter(0.4, 0.4, 0.4, hue=0.2)))
    assert_same(build_train_transform(PANDERM, color_jitter=0.0), by_hand(T.ColorJitter(hue=0.2)), times=2)
    with pytest.raises(UserError, match="--color_jitter -0.1 is negative"):
        build_train_transform(PANDERM, color_jitter=-0.1)


def test_bicubic_crop() -> None:
    """Only the crop; the first resize stays bilinear."""
    crop = T.RandomResizedCrop(224, scale=(0.75, 1), interpolation=BICUBIC)
    assert_same(build_train_transform(PANDERM, interpolation="bicubic"), by_hand(T.ColorJitter(hue=0.2), crop=crop))


def test_random_interpolation() -> None:
    """Each of the two, of the same crops, about as often."""
    base = build_train_transform(PANDERM, interpolation="random")
    counts = {BILINEAR: 0, BICUBIC: 0}
    for seed in range(40):
        with seeded(seed):
            found = base.transforms[1](smooth())
        for mode in counts:
            with seeded(seed):
                row, column, height, width = base.transforms[1].get_params(smooth(), (0.75, 1.0), (3 / 4, 4 / 3))
            box = (column, row, column + width, row + height)
            how = {BILINEAR: Image.Resampling.BILINEAR, BICUBIC: Image.Resampling.BICUBIC}[mode]
            counts[mode] += np.array_equal(np.asarray(found), np.asarray(smooth().crop(box).resize((224, 224), how)))
    assert sum(counts.values()) == 40 and min(counts.values()) >= 9
    with pytest.raises(ValueError, match="interpolation 'nearest' is none of bilinear, bicubic, random"):
        build_train_transform(PANDERM, interpolation="nearest")


@pytest.mark.parametrize("interpolation", ["bilinear", "random"])
def test_limits_of_the_random_crop(interpolation: str) -> None:
    """75 to 100 % of the area, sides 3 to 4 at most, both ends reached."""
    crop = build_train_transform(PANDERM, interpolation=interpolation).transforms[1]
    areas, ratios = [], []
    for seed in range(300):
        with seeded(seed):
            _, _, height, width = crop.get_params(Image.new("RGB", (256, 256)), crop.scale, crop.ratio)
        areas.append(height * width / 256**2)
        ratios.append(width / height)
    assert 0.745 < min(areas) < 0.77 and 0.95 < max(areas) <= 1
    assert 0.74 < min(ratios) < 0.82 and 1.22 < max(ratios) < 1.35


def test_limits_of_flips_rotation_and_hue() -> None:
    """Of a picture with a white half: mirrored half of the time either way; corners blackened by the rotation."""
    steps = build_train_transform(config(input_size=(3, 64, 64))).transforms
    halves = np.zeros((64, 64, 3), dtype=np.uint8)
    halves[:, 32:] = 255
    flipped = {2: 0, 3: 0}
    for seed in range(200):
        for step in flipped:
            with seeded(seed, step):
                picture = Image.fromarray(halves if step == 2 else halves.transpose(1, 0, 2))
                found = np.asarray(steps[step](picture))
                flipped[step] += not np.array_equal(found, np.asarray(picture))
    assert all(72 <= count <= 128 for count in flipped.values())  # 4 standard deviations of 200 coins
    assert steps[4].degrees == [-45, 45] and steps[5].hue == (-0.2, 0.2)
    with seeded(1):
        corner = steps[4](Image.new("RGB", (64, 64), (255, 255, 255))).getpixel((0, 0))
    assert corner == (0, 0, 0)


def test_training_uses_the_backbones_numbers() -> None:
    """Side, mean, std, crop_pct."""
    numbers = config(input_size=(3, 48, 48), mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2), crop_pct=0.9)
    steps = build_train_transform(numbers).transforms
    assert steps[0].size == 53 and tuple(steps[1].size) == (48, 48)
    assert build_train_transform(numbers, crop_pct=0.5).transforms[0].size == 96
    with seeded(0):
        found = build_train_transform(numbers)(Image.new("RGB", (70, 60)))
    expected = (-np.array([0.5, 0.4, 0.3]) / [0.5, 0.25, 0.2])[:, None, None]
    np.testing.assert_allclose(found.numpy(), np.broadcast_to(expected, (3, 48, 48)), rtol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (300, 7)])
def test_training_takes_any_image(size: tuple[int, int]) -> None:
    for interpolation in ("bilinear", "random"):
        transform = build_train_transform(config(crop_pct=0.9), interpolation=interpolation)
        assert tuple(transform(Image.new("RGB", size)).shape) == (3, 32, 32)


POLICIES = {"rand-m9-mstd0.5-inc1": auto_augment.rand_augment_transform, "v0": auto_augment.auto_augment_transform,
            "original-mstd0.5": auto_augment.auto_augment_transform, "3a": auto_augment.auto_augment_transform,
            "augmix-m3-w2": auto_augment.augment_and_mix_transform}


@pytest.mark.parametrize("policy", POLICIES)
def test_auto_augment(policy: str) -> None:
    """timm's, with the settings of timm's training transform, in the colour jitter's place."""
    settings = {"translate_const": 100, "img_mean": (124, 116, 104)}
    settings |= {"translate_pct": 0.3} if policy.startswith("augmix") else {}
    augment = POLICIES[policy](policy, dict(settings))
    assert_same(build_train_transform(PANDERM, auto_augment=policy), by_hand(augment), times=4)
    assert_same(build_train_transform(PANDERM, auto_augment=policy, color_jitter=0.3),
                by_hand(augment, T.ColorJitter(0.3, 0.3, 0.3, hue=0.2)), times=2)


@pytest.mark.parametrize("policy", ["rand-x9", "rand-m", "randaugment", "rand-m9.5", "rand-tfoo", "v1", "augmix-q1",
                                    "original-std", "rand_m9", "3-augment", "-"])
def test_an_unknown_policy_is_refused(policy: str) -> None:
    with pytest.raises(UserError, match=f"--aa {policy}: timm has no such policy; write rand-m9-mstd0.5-inc1"):
        build_train_transform(PANDERM, auto_augment=policy)
