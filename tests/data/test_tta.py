"""Test-time augmentation: the published views and logits, the fixed views, and the mean over them."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torchvision.transforms import functional as F

from furnace.data import tta
from furnace.data.datasets import build_loader
from furnace.data.images import load_rgb
from furnace.data.manifest import Manifest, read_manifest
from furnace.data.transforms import build_transform
from furnace.data.tta import TTAHandler, ViewMean
from furnace.evaluation.features import extract_features
from furnace.models import create_backbone
from furnace.models.panderm import PANDERM_EVAL as PANDERM
from furnace.runtime.files import UserError
from furnace.runtime.seeding import seeded
from helpers import GOLDEN, draw_images, golden_state, write_csv

PUBLISHED = json.loads((GOLDEN / "tta.json").read_text())
SMALL = {"input_size": (3, 32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.5, 0.25, 0.2), "crop_pct": 0.875,
         "crop_mode": "center", "interpolation": "bilinear"}


def picture() -> Image.Image:
    """The goldens'."""
    return load_rgb(GOLDEN / "synthetic_640x480.png")


def published_views() -> torch.Tensor:
    """(5, 2, 3, 224, 224): as published, of the picture and its mirror image, view by view."""
    transform = TTAHandler(PANDERM)
    bases = [transform.prepare(image) for image in (picture(), F.hflip(picture()))]
    torch.manual_seed(0)
    return torch.stack([torch.stack([transform.normalise(transform.augment(base)) for base in bases])
                        for _ in range(5)])


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """9 images of three sizes."""
    folder = tmp_path_factory.mktemp("set")
    names = [f"{i}.png" for i in range(9)]
    for part, size in enumerate([(40, 32), (61, 90), (32, 32)]):
        draw_images(folder, names[part::3], size=size, seed=part)
    return read_manifest(write_csv(folder / "set.csv", image=names, label=[0, 1, 2] * 3,
                                   split=["train"] * 3 + ["val"] * 3 + ["test"] * 3), nb_classes=3)


class Tiny(nn.Module):
    """A classifier that is not linear in its input."""

    num_features, num_classes = 7, 4

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 7, 4, stride=4), nn.Linear(7, 4)
        self.sizes: list[tuple] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) -> (B, 4)."""
        self.sizes.append((tuple(x.shape), x.is_contiguous(memory_format=torch.channels_last)))
        weight = torch.arange(1.0, 9, device=x.device)  # places matter: no view looks like another
        return self.head((self.conv(x).tanh() * weight * weight[:, None]).mean(dim=(2, 3)))


# ---------------------------------------------------------------------------------------------------- published views

def test_published_view_without_its_random_parts() -> None:
    """Resize 246, crop 224, std 0.229."""
    transform = TTAHandler(PANDERM)
    found = transform.normalise(transform.prepare(picture()))
    np.testing.assert_allclose(found.numpy(), np.load(GOLDEN / "tta_identity_view.npy"), atol=1e-6, rtol=0)


def test_published_random_views() -> None:
    """Flips, rotation and jitter drawn in the published order give the published pictures."""
    np.testing.assert_allclose(published_views().mean(dim=(2, 3, 4)), PUBLISHED["tta_view_means"], atol=1e-5)


def test_published_logits() -> None:
    """Of the goldens' fine-tuned PanDerm_Base: the view without random parts, each random view, and their mean."""
    state = golden_state("keys_ft_base.json")
    model = timm.create_model("beit_base_patch16_224", num_classes=6, use_abs_pos_emb=True, init_values=0.1)
    model.load_state_dict({k: v for k, v in state.items() if "relative_position_index" not in k}, strict=False)
    mean = ViewMean(model.eval())
    views = published_views().transpose(0, 1)  # (2, 5, 3, 224, 224)
    identity = torch.from_numpy(np.load(GOLDEN / "tta_identity_view.npy")).reshape(1, 1, 3, 224, 224)
    with torch.inference_mode():
        for found, wanted in ((mean(identity), PUBLISHED["identity_view_resize246_crop224_logits"]),
                              (mean(views), PUBLISHED["mean_logits"]),
                              (mean(views[:, 3]), PUBLISHED["per_view_logits"][3])):
            np.testing.assert_allclose(found.numpy(), wanted, atol=1e-4, rtol=0)


def test_a_picture_gives_its_views_one_after_the_other() -> None:
    transform = TTAHandler(PANDERM, n=3)
    with seeded(1):
        found = transform(picture())
    base = transform.prepare(picture())
    with seeded(1):
        expected = [transform.normalise(transform.augment(base)) for _ in range(3)]
    assert transform.views == 3 and found.shape == (3, 3, 224, 224) and torch.equal(found, torch.stack(expected))
    assert not torch.equal(found[0], found[1])


def test_other_backbones_keep_their_numbers() -> None:
    """Mean and std of the config, sizes in proportion: 32 from 35, bilinear, centred."""
    transform = TTAHandler(SMALL)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    resized = torch.nn.functional.interpolate(pixels, (35, 49), mode="bilinear", antialias=True)[0]
    expected = resized[:, 2:34, 8:40]  # 1.5 and 8.5 rounded to even
    mean, std = (torch.tensor(SMALL[name])[:, None, None] for name in ("mean", "std"))
    torch.testing.assert_close(transform.normalise(transform.prepare(image)), (expected - mean) / std)
    black = TTAHandler({**SMALL, "std": (0.229, 0.224, 0.225)})(Image.new("RGB", (32, 32)))
    torch.testing.assert_close(black[0, :, 16, 16], -torch.tensor([0.5 / 0.229, 0.4 / 0.224, 0.3 / 0.225]))


def test_presets_can_be_edited(monkeypatch) -> None:
    """The table is what counts; without random parts each view is the same."""
    still = {"resize": 1.0, "hflip_p": 0, "vflip_p": 0, "degrees": 0, "rotate_p": 0, "hue": 0, "saturation": 0,
             "jitter_p": 0}
    monkeypatch.setitem(tta.TTA_VIEWS, "still", still)
    monkeypatch.setitem(tta.TTA_VIEWS, "mirror", {**still, "hflip_p": 1})
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    found = TTAHandler(SMALL, "still", n=2)(image)
    expected = build_transform({**SMALL, "crop_pct": 1.0})(image)
    torch.testing.assert_close(found, expected.expand(2, 3, 32, 32))
    torch.testing.assert_close(TTAHandler(SMALL, "mirror", n=1)(image)[0], expected.flip(-1))


# -------------------------------------------------------------------------------------------------------- fixed views

def test_deterministic_views() -> None:
    """Of the evaluation's image, with its std and sizes; equal to turning the picture first."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8))
    evaluate, transform = build_transform(PANDERM), TTAHandler(PANDERM, "deterministic")
    found = transform(image)
    turns = [None, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.ROTATE_90,
             Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270]
    expected = [evaluate(image if turn is None else image.transpose(turn)) for turn in turns]
    assert transform.views == 6 and torch.equal(found, torch.stack(expected))
    assert torch.equal(TTAHandler(PANDERM, "deterministic", crop_pct=1.0)(image)[0],
                       build_transform(PANDERM, crop_pct=1.0)(image))


@pytest.mark.parametrize("size", [(1, 1), (300, 7), (7, 300)])
@pytest.mark.parametrize(("views", "count"), [("published", 5), ("deterministic", 6)])
def test_any_image(size: tuple[int, int], views: str, count: int) -> None:
    assert TTAHandler(SMALL, views)(Image.new("RGB", size)).shape == (count, 3, 32, 32)


def test_what_cannot_be_done(monkeypatch) -> None:
    with pytest.raises(UserError, match="'many': the presets are published, deterministic"):
        TTAHandler(SMALL, "many")
    with pytest.raises(UserError, match="with 0 views"):
        TTAHandler(SMALL, n=0)
    oblong = {**SMALL, "input_size": (3, 32, 48)}
    with pytest.raises(UserError, match="by 90 degrees, but this backbone sees 32 x 48"):
        TTAHandler(oblong, "deterministic")
    assert TTAHandler(oblong, n=2)(Image.new("RGB", (50, 50))).shape == (2, 3, 32, 48)
    monkeypatch.setitem(tta.TTA_VIEWS, "mine", ("identity", "rot45"))
    with pytest.raises(UserError, match="no view is called rot45; take identity, hflip"):
        TTAHandler(SMALL, "mine")


# ------------------------------------------------------------------------------------------------- through the loader

@pytest.mark.parametrize(("batch_size", "num_workers"), [(1, 0), (4, 0), (4, 2)])
def test_views_do_not_depend_on_batches_or_workers(manifest: Manifest, batch_size: int, num_workers: int) -> None:
    """Images of different sizes in one batch."""
    transform = TTAHandler(SMALL)
    loader = build_loader(manifest, transform, batch_size=batch_size, num_workers=num_workers, seed=3)
    found = torch.cat([batch.images for batch in loader])
    for i in range(9):
        with seeded(3, 0, i):
            assert torch.equal(found[i], transform(load_rgb(manifest.path_of(i))))


def test_view_mean_equals_the_average_of_separate_runs(manifest: Manifest) -> None:
    """Batches are filled up and take channels last, as with one view."""
    model, transform = Tiny(), TTAHandler(SMALL, "deterministic")
    loader = build_loader(manifest, transform, batch_size=4, num_workers=0)
    found = extract_features(ViewMean(model), loader, device="cpu")
    assert found.embeddings.shape == (9, 4) and found.embeddings.dtype == np.float32
    assert model.sizes == [((24, 3, 32, 32), True)] * 3
    separate = []
    for view in range(6):
        loader = build_loader(manifest, lambda image, view=view: transform(image)[view], batch_size=4, num_workers=0)
        separate.append(extract_features(ViewMean(model), loader, device="cpu").embeddings)
    np.testing.assert_allclose(found.embeddings, np.mean(separate, axis=0), atol=1e-6)
    assert np.ptp(separate, axis=0).min() > 1e-5, "the views differ"


def test_view_mean_in_bf16(manifest: Manifest) -> None:
    loader = build_loader(manifest, TTAHandler(SMALL, "deterministic"), batch_size=4, num_workers=0)
    exact, rough = (extract_features(ViewMean(Tiny()), loader, device="cpu", amp_dtype=dtype).embeddings
                    for dtype in ("fp32", "bf16"))
    assert 1e-6 < np.abs(exact - rough).max() < 0.1


def test_view_mean_of_one_view_is_the_model() -> None:
    """Also where the images come without a dimension for views; the width is that of the output."""
    model = Tiny()
    mean, images = ViewMean(model), torch.rand(2, 3, 32, 32)
    assert torch.equal(mean(images), model(images)) and mean.num_features == 4
    torch.testing.assert_close(mean(images[:, None]), model(images))
    backbone = create_backbone("timm:test_vit", "random", input_size=160)
    assert ViewMean(backbone).num_features == backbone.num_features
