"""The evaluation transform against the published one and closed forms."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from furnace.data.images import load_rgb
from furnace.data.transforms import build_transform
from furnace.models.panderm import PANDERM_EVAL as PANDERM
from furnace.runtime.files import UserError
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
