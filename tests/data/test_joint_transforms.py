"""Geometry shared by image and mask, the published recipes' numbers, and nothing but 0, 1 and 255 in a mask."""

import numpy as np
import pytest
import torch
from PIL import Image

from furnace.data.joint_transforms import (
    HALF,
    IGNORED,
    RECIPES,
    build_image_transform,
    build_joint_transform,
    recipe_normalisation,
)
from furnace.runtime.seeding import seed_all

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (45, 60, 3), dtype=np.uint8)
SOME = RNG.random((45, 60)) < 0.5

pytestmark = pytest.mark.usefixtures("one_thread")


def blob(height: int = 300, width: int = 400) -> np.ndarray:
    """A smooth shape without symmetry, far enough from square."""
    y, x = np.mgrid[:height, :width]
    disc = ((y - 0.4 * height) / (0.3 * height)) ** 2 + ((x - 0.35 * width) / (0.2 * width)) ** 2 < 1
    return disc | ((abs(y - 0.6 * height) < 0.1 * height) & (x > 0.3 * width) & (x < 0.9 * width))


def picture_of(mask: np.ndarray) -> Image.Image:
    """The mask itself as the image."""
    return Image.fromarray(mask.astype(np.uint8) * 255).convert("RGB")


# ------------------------------------------------------------------------------------------------------------ resizing

def cubic_matrix(source: int, target: int) -> np.ndarray:
    """(target, source): the cubic with a = -0.75 at pixel centres, edges repeated, no antialiasing, as OpenCV does."""
    matrix, a = np.zeros((target, source)), -0.75
    for i in range(target):
        position = (i + 0.5) * source / target - 0.5
        for k in range(int(np.floor(position)) - 1, int(np.floor(position)) + 3):
            d = abs(position - k)
            weight = (a + 2) * d**3 - (a + 3) * d**2 + 1 if d <= 1 else a * (d**3 - 5 * d**2 + 8 * d - 4)
            matrix[i, min(max(k, 0), source - 1)] += weight
    return matrix


def levels(tensor: torch.Tensor) -> np.ndarray:
    """(3, h, w) in [0, 1] to (h, w, 3) levels."""
    return (tensor * 255).round().numpy().transpose(1, 2, 0).astype(int)


@pytest.mark.parametrize("size", [(28, 28), (20, 33), (64, 90)])
def test_panderm_squashes_bicubic_without_antialias(size: tuple[int, int]) -> None:
    found = levels(build_image_transform("panderm", size=size, **PLAIN)(Image.fromarray(NOISE)))
    down, across = cubic_matrix(45, size[0]), cubic_matrix(60, size[1])
    wanted = np.einsum("hy,yxc,wx->hwc", down, NOISE.astype(float), across).round().clip(0, 255).astype(int)
    assert abs(found - wanted).max() <= 1 and (found != wanted).mean() < 0.01


@pytest.mark.parametrize("recipe", ["default", "dermino"])
def test_others_squash_bilinear_with_antialias(recipe: str) -> None:
    found = levels(build_image_transform(recipe, size=(20, 33), **PLAIN)(Image.fromarray(NOISE)))
    wanted = np.asarray(Image.fromarray(NOISE).resize((33, 20), Image.Resampling.BILINEAR)).astype(int)
    assert abs(found - wanted).max() <= 1


@pytest.mark.parametrize(("recipe", "columns"), [("panderm", [0, 2, 5, 7]), ("dermino", [1, 3, 6, 8])])
def test_which_pixels_a_mask_keeps(recipe: str, columns: list[int]) -> None:
    """10 to 4 pixels, as measured of OpenCV's and of Pillow's nearest."""
    transform = build_joint_transform(recipe, size=(1, 4), **PLAIN)
    for column in range(10):
        mask = np.zeros((3, 10), bool)
        mask[:, column] = True
        _, found = transform(picture_of(mask), mask)
        assert found.tolist() == [[int(column == kept) for kept in columns]]


def test_masks_of_dermino_are_pillows_nearest() -> None:
    _, found = build_joint_transform("dermino", size=(22, 31), **PLAIN)(Image.fromarray(NOISE), SOME)
    wanted = np.asarray(Image.fromarray(SOME.astype(np.uint8)).resize((31, 22), Image.Resampling.NEAREST))
    assert np.array_equal(found.numpy(), wanted)


@pytest.mark.parametrize("recipe", RECIPES)
def test_normalisation_and_shapes(recipe: str) -> None:
    transform = build_joint_transform(recipe, size=(16, 24), mean=MEAN, std=STD)
    image, mask = transform(Image.fromarray(NOISE), SOME)
    assert image.shape == (3, 16, 24) and image.dtype == torch.float32 and type(image) is torch.Tensor
    assert mask.shape == (16, 24) and mask.dtype == torch.int64 and type(mask) is torch.Tensor
    grey = Image.new("RGB", (60, 45), (51, 51, 51))
    found = build_image_transform(recipe, size=8, mean=MEAN, std=STD)(grey)
    wanted = (torch.tensor(0.2) - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(found, wanted[:, None, None].expand(3, 8, 8), atol=1e-6, rtol=0)


def test_recipe_normalisation() -> None:
    config = {"mean": MEAN, "std": STD}
    assert recipe_normalisation("panderm", config) == (HALF, HALF)
    assert recipe_normalisation("default", config) == recipe_normalisation("dermino", config) == (MEAN, STD)


def test_dermino_is_its_evaluation_transform() -> None:
    image = build_joint_transform("dermino", size=28, mean=MEAN, std=STD)(Image.fromarray(NOISE), SOME)[0]
    assert torch.equal(image, build_image_transform("dermino", size=28, mean=MEAN, std=STD)(Image.fromarray(NOISE)))


@pytest.mark.parametrize("recipe", RECIPES)
def test_pixels_serve_as_well_as_a_picture(recipe: str) -> None:
    """A window is cut out of (3, H, W) uint8: the same numbers, to the bit, also of a part that is not contiguous."""
    transform = build_image_transform(recipe, size=(20, 33), mean=MEAN, std=STD)
    pixels = torch.from_numpy(NOISE).permute(2, 0, 1)
    assert torch.equal(transform(pixels), transform(Image.fromarray(NOISE)))
    assert torch.equal(transform(pixels[:, 7:40, 11:49]), transform(Image.fromarray(NOISE[7:40, 11:49])))
    assert pixels.equal(torch.from_numpy(NOISE).permute(2, 0, 1)), "the picture itself is left alone"


# -------------------------------------------------------------------------------------------------------- augmentation

def views(recipe: str, mask: np.ndarray, count: int, image: Image.Image | None = None, size: int = 96) -> list[tuple]:
    transform = build_joint_transform(recipe, size=size, **PLAIN)
    made = []
    for i in range(count):
        seed_all(7, i)
        made.append(transform(image or picture_of(mask), mask))
    return made


def test_image_and_mask_move_together() -> None:
    """The image is the mask: after any geometry they agree, but for the outline; the corners are IGNORED and black."""
    corners = 0
    for image, mask in views("default", blob(), 40):
        assert set(mask.unique().tolist()) <= {0, 1, IGNORED}
        known = mask != IGNORED
        differ = (image[0] > 0.4) != (mask == 1)
        assert (differ & known).float().mean() < 0.02
        assert (image[:, ~known] < 0.6).all(), "at most blended at the edge of the corner"
        corners += int((~known).any())
    assert corners >= 38, "nearly every picture is rotated"


def test_corners_grow_with_the_rotation() -> None:
    """At most (45 degrees of a square) 3 - 2 sqrt(2) = 17.2 %."""
    shares = [(mask == IGNORED).float().mean().item() for _, mask in views("default", blob(), 60)]
    assert 0.12 < max(shares) < 0.18 and min(shares) < 0.05


def test_views_differ_in_geometry_and_colour() -> None:
    """All four flips come; crops keep half of the area or more."""
    y, x = np.mgrid[:200, :200]
    quadrant = (y < 100) & (x < 100)
    places = set()
    for _, mask in views("default", quadrant, 40):
        rows, columns = torch.nonzero(mask == 1, as_tuple=True)
        places.add((bool(rows.float().mean() > 48), bool(columns.float().mean() > 48)))
    assert len(places) == 4
    grey = Image.new("RGB", (200, 200), (128, 100, 90))
    middles = torch.stack([image[:, 48, 48] for image, _ in views("default", quadrant, 40, image=grey)])
    assert (middles.std(dim=0) > 0.01).all() and (middles.mean(dim=0) - torch.tensor([128, 100, 90]) / 255
                                                  ).abs().max() < 0.05


def test_crop_keeps_at_least_half() -> None:
    """A mask of the left half: 0 % to 100 % of a crop of less than half; here every view has some of both."""
    y, x = np.mgrid[:100, :100]
    shares = []
    for _, mask in views("default", x < 50, 60):
        known = mask != IGNORED
        shares.append((mask[known] == 1).float().mean().item())
    assert 0.1 < min(shares) < 0.45 and 0.55 < max(shares) < 0.9


def test_panderm_moves_nothing() -> None:
    """Its mask is the squashed one; its colours vary, a fifth each is grey or inverted."""
    colour = Image.new("RGB", (50, 40), (200, 120, 60))
    mask = np.zeros((40, 50), bool)
    mask[:20] = True
    made = views("panderm", mask, 200, image=colour, size=10)
    for _, found in made:
        assert found[:5].all() and not found[5:].any()
    middles = torch.stack([image[:, 5, 5] for image, _ in made])
    grey = ((middles[:, 0] - middles[:, 1]).abs() < 1e-6) & ((middles[:, 1] - middles[:, 2]).abs() < 1e-6)
    assert 0.1 < grey.float().mean() < 0.4
    inverted = middles[~grey][:, 0] < middles[~grey][:, 2] - 0.2
    assert 0.08 < inverted.float().mean() < 0.35
    assert len(middles.unique(dim=0)) > 150


def test_same_seed_same_view() -> None:
    first, second = views("default", blob(), 1), views("default", blob(), 1)
    assert torch.equal(first[0][0], second[0][0]) and torch.equal(first[0][1], second[0][1])
    assert not torch.equal(first[0][1], views("default", blob(), 2)[1][1])


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="none of default, panderm, dermino"):
        build_joint_transform("ours", size=8, **PLAIN)
    with pytest.raises(ValueError, match="none of"):
        build_image_transform("x", size=8, **PLAIN)
    with pytest.raises(ValueError, match="a mask of"):
        build_joint_transform(size=8, **PLAIN)(Image.fromarray(NOISE), SOME.T)
