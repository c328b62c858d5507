"""Largest component, boundary and distances against slow, plain computations."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from furnace.evaluation.masks import boundary, boundary_distances, checked_mask, largest_component

MASKS = arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12)))


def drawn(*rows: str) -> np.ndarray:
    """``#`` is the lesion."""
    return np.array([[letter == "#" for letter in row] for row in rows])


def with_pixels(*places: tuple[int, int], size: int = 8) -> np.ndarray:
    """An empty mask but for these (row, column)."""
    mask = np.zeros((size, size), dtype=bool)
    for place in places:
        mask[place] = True
    return mask


def flooded(mask: np.ndarray, start: tuple[int, int], steps: list[tuple[int, int]]) -> set[tuple[int, int]]:
    """What can be reached from a pixel of the mask by these steps."""
    seen, waiting = {start}, [start]
    while waiting:
        y, x = waiting.pop()
        for place in ((y + dy, x + dx) for dy, dx in steps):
            if place not in seen and all(0 <= p < n for p, n in zip(place, mask.shape, strict=True)) and mask[place]:
                seen.add(place)
                waiting.append(place)
    return seen


CROSS = [(0, 1), (0, -1), (1, 0), (-1, 0)]
SQUARE = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx]


def slow_largest(mask: np.ndarray) -> np.ndarray:
    """Flood fills, pixel by pixel in reading order."""
    best: set = set()
    seen: set = set()
    for place in map(tuple, np.argwhere(mask)):
        if place not in seen:
            found = flooded(mask, place, SQUARE)
            seen |= found
            best = found if len(found) > len(best) else best
    kept = np.zeros((mask.shape[0] + 2, mask.shape[1] + 2), dtype=bool)
    for y, x in best:
        kept[y + 1, x + 1] = True
    for place in flooded(~kept, (0, 0), CROSS):
        kept[place] = True
    filled = ~kept[1:-1, 1:-1]
    for y, x in best:
        filled[y, x] = True
    return filled


def test_the_published_examples_of_post_processing() -> None:
    """A ring is filled; a diamond of corners is one component with a hole; a diagonal of three beats a pair."""
    ring = np.zeros((8, 8), dtype=bool)
    ring[1:6, 1:6] = True
    ring[2:5, 2:5] = False
    filled = np.zeros((8, 8), dtype=bool)
    filled[1:6, 1:6] = True
    np.testing.assert_array_equal(largest_component(ring), filled)
    diamond = with_pixels((1, 2), (2, 1), (2, 3), (3, 2))
    np.testing.assert_array_equal(largest_component(diamond), diamond | with_pixels((2, 2)))
    diagonal = with_pixels((0, 0), (1, 1), (2, 2))
    np.testing.assert_array_equal(largest_component(diagonal | with_pixels((5, 5), (5, 6))), diagonal)


def test_an_empty_prediction_stays_empty() -> None:
    """Published code gave back the whole picture."""
    empty = np.zeros((8, 8), dtype=bool)
    result = largest_component(empty)
    assert not result.any() and result.shape == (8, 8) and result is not empty


def test_of_equal_components_the_first_in_reading_order_is_kept() -> None:
    """Also where it begins further to the right."""
    mask = drawn("....##",
                 "......",
                 "##....")
    np.testing.assert_array_equal(largest_component(mask), drawn("....##", "......", "......"))


def test_a_bay_at_the_picture_s_side_is_no_hole() -> None:
    """The outside reaches it over the picture's edge."""
    mask = drawn("#.##",
                 "#.##",
                 "####")
    np.testing.assert_array_equal(largest_component(mask), mask)


def test_another_lesion_inside_the_hole_becomes_part_of_it() -> None:
    """Filled with the hole, and the input is left alone."""
    mask = np.zeros((9, 9), dtype=bool)
    mask[1:8, 1:8] = True
    mask[2:7, 2:7] = False
    mask[4, 4] = True
    before = mask.copy()
    assert largest_component(mask).sum() == 49
    np.testing.assert_array_equal(mask, before)


@settings(max_examples=150, deadline=None)
@given(MASKS)
def test_largest_component_equals_flood_fills(mask: np.ndarray) -> None:
    """Any mask."""
    np.testing.assert_array_equal(largest_component(mask), slow_largest(mask))


@settings(max_examples=100, deadline=None)
@given(MASKS)
def test_boundary_equals_its_definition(mask: np.ndarray) -> None:
    """A neighbour by an edge outside of the mask or the picture."""
    padded = np.pad(mask, 1)
    expected = [[mask[y, x] and not all(padded[y + 1 + dy, x + 1 + dx] for dy, dx in CROSS)
                 for x in range(mask.shape[1])] for y in range(mask.shape[0])]
    np.testing.assert_array_equal(boundary(mask), np.array(expected))


@pytest.mark.parametrize("seed", range(5))
def test_distances_equal_those_of_distance_transforms(seed: int) -> None:
    """Pixel for pixel, on masks of noise and of smooth blobs."""
    rng = np.random.default_rng(seed)
    noise = rng.random((2, 40, 55))
    for masks in (noise > 0.7, ndimage.gaussian_filter(noise, (0, 4, 4)) > 0.5):
        ours, theirs = boundary_distances(*masks)
        edges = [boundary(mask) for mask in masks]
        np.testing.assert_allclose(ours, ndimage.distance_transform_edt(~edges[1])[edges[0]], rtol=0, atol=1e-12)
        np.testing.assert_allclose(theirs, ndimage.distance_transform_edt(~edges[0])[edges[1]], rtol=0, atol=1e-12)


def test_what_is_no_mask_is_refused() -> None:
    """0/255 and probabilities would be counted wrongly."""
    for wrong in (np.zeros((4, 4), dtype=np.uint8), np.zeros((4, 4)), np.zeros((1, 4, 4), dtype=bool),
                  np.zeros((0, 4), dtype=bool)):
        for function in (checked_mask, largest_component, boundary):
            with pytest.raises(ValueError, match="bool array"):
                function(wrong)
    with pytest.raises(ValueError, match="no boundary"):
        boundary_distances(np.zeros((4, 4), dtype=bool), np.ones((4, 4), dtype=bool))
    with pytest.raises(ValueError, match="5 x 4 pixels and the true one 4 x 4"):
        boundary_distances(np.ones((4, 5), dtype=bool), np.ones((4, 4), dtype=bool))
