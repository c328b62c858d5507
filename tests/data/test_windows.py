"""Sliding windows: everything covered, blended without seams, in little memory."""

import math

import numpy as np
import pytest
import torch

from furnace.data.windows import Box, blend, predict_in_windows, sliding_windows


def test_windows_by_hand() -> None:
    assert sliding_windows((10, 4), (4, 4), 0.5) == [Box(top, 0, top + 4, 4) for top in (0, 2, 4, 6)]
    assert sliding_windows((4, 9), (4, 4), 0.0) == [Box(0, 0, 4, 4), Box(0, 2, 4, 6), Box(0, 5, 4, 9)]
    assert sliding_windows((3, 5), (4, 8), 0.5) == [Box(0, 0, 3, 5)], "one window, cut to the picture"


@pytest.mark.parametrize("size", [(1, 1), (224, 224), (225, 224), (600, 450), (333, 1000)])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
def test_windows_cover_and_overlap(size: tuple[int, int], overlap: float) -> None:
    boxes = sliding_windows(size, (224, 160), overlap)
    covered = np.zeros(size, np.int32)
    for box in boxes:
        assert (box.bottom - box.top, box.right - box.left) == (min(size[0], 224), min(size[1], 160))
        covered[box.top:box.bottom, box.left:box.right] += 1
    assert covered.min() >= 1 and len(set(boxes)) == len(boxes)
    for axis, side in ((0, 224), (1, 160)):
        starts = sorted({box[axis] for box in boxes})
        assert all(side - (b - a) >= math.floor(side * overlap) for a, b in zip(starts, starts[1:], strict=False))
        step = side - math.floor(side * overlap)
        assert len(starts) <= math.ceil(max(0, size[axis] - side) / max(1, step - 1)) + 1, "no more than needed"


@pytest.mark.parametrize("overlap", [-0.1, 1.0])
def test_impossible_overlaps(overlap: float) -> None:
    with pytest.raises(ValueError, match="overlap"):
        sliding_windows((9, 9), (3, 3), overlap)


SIZE = (61, 87)
BOXES = sliding_windows(SIZE, (20, 32), 0.4)


def test_constant_and_ramp_come_back() -> None:
    """What the windows agree on is the map: no seam."""
    rows, columns = torch.arange(61.0)[:, None], torch.arange(87.0)
    ramp = 3 * rows - 2 * columns + 1
    for whole in (torch.full(SIZE, 0.7), ramp):
        pieces = (whole[b.top:b.bottom, b.left:b.right] for b in BOXES)
        torch.testing.assert_close(blend(BOXES, pieces, SIZE), whole, rtol=1e-6, atol=1e-4)


def test_several_channels() -> None:
    whole = torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(0))
    found = blend(BOXES, (whole[:, b.top:b.bottom, b.left:b.right].half() for b in BOXES), SIZE)
    assert found.shape == (3, *SIZE) and found.dtype == torch.float32
    torch.testing.assert_close(found, whole, atol=1e-3, rtol=0)


def test_weights_by_hand() -> None:
    """Two windows of four pixels, two in common: Hann at 1/8, 3/8, 5/8, 7/8 is 0.1464, 0.8536, 0.8536, 0.1464."""
    boxes = [Box(0, 0, 1, 4), Box(0, 2, 1, 6)]
    found = blend(boxes, [torch.zeros(1, 4), torch.ones(1, 4)], (1, 6))
    low = math.sin(math.pi / 8) ** 2
    torch.testing.assert_close(found, torch.tensor([[0, 0, low, 1 - low, 1, 1]]))


def test_windows_that_disagree_are_joined_smoothly() -> None:
    """Windows of 0 and 1 side by side: a step of at most 3 % per pixel where a hard cut has 100 %."""
    boxes = sliding_windows((8, 192), (8, 128), 0.5)
    found = blend(boxes, [torch.full((8, 128), float(i % 2)) for i in range(len(boxes))], (8, 192))
    assert len(boxes) == 2 and found[0, 0] == 0 and found[0, -1] == 1
    steps = found.diff(dim=1)
    assert steps.max() < 0.03 and steps.min() >= -1e-6


def test_one_window_is_the_plain_pass() -> None:
    """Bit for bit."""
    value = torch.randn(5, 40, 30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(blend(sliding_windows((40, 30), (64, 64)), [value], (40, 30)), value)


def test_boxes_that_are_no_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="no grid"):
        blend([Box(0, 0, 4, 4), Box(2, 2, 6, 6)], [torch.ones(4, 4)] * 2, (6, 6))
    with pytest.raises(ValueError, match="do not cover"):
        blend([Box(0, 0, 4, 4)], [torch.ones(4, 4)], (4, 6))
    with pytest.raises(ValueError):
        blend(BOXES, [torch.ones(20, 32)], SIZE)


def test_a_picture_is_predicted_in_batches() -> None:
    image = torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(0))
    batches = []

    def forward(parts: list[torch.Tensor]) -> torch.Tensor:
        batches.append(torch.stack(parts).shape)
        return torch.stack(parts).mean(dim=1)

    found = predict_in_windows(lambda b: image[:, b.top:b.bottom, b.left:b.right], forward, SIZE, window=(20, 32),
                               overlap=0.4, batch_size=5)
    torch.testing.assert_close(found, image.mean(dim=0))
    count = len(BOXES)
    assert [shape[0] for shape in batches] == [5] * (count // 5) + ([count % 5] if count % 5 else [])
    assert all(shape[1:] == (3, 20, 32) for shape in batches)


def test_an_input_can_be_anything() -> None:
    """What ``crop`` makes of a box reaches ``forward`` as it is: here the picture in two sizes, and the box."""
    image = torch.rand(3, *SIZE, generator=torch.Generator().manual_seed(0))

    def crop(box: Box) -> tuple[torch.Tensor, torch.Tensor, Box]:
        part = image[:, box.top:box.bottom, box.left:box.right]
        return part, part[:, ::2, ::2], box

    def forward(inputs: list[tuple[torch.Tensor, torch.Tensor, Box]]) -> torch.Tensor:
        assert all(half.shape == (3, 10, 16) and part.shape == (3, 20, 32) for part, half, _ in inputs)
        return torch.stack([part[0] + box.top - box.top for part, _, box in inputs])

    found = predict_in_windows(crop, forward, SIZE, window=(20, 32), overlap=0.4, batch_size=4)
    torch.testing.assert_close(found, image[0])


def test_windows_are_not_collected() -> None:
    """At most one batch of the windows' predictions is alive at a time."""
    alive = most = 0

    class Counted(torch.Tensor):
        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def values():
        nonlocal alive, most
        for box in boxes:
            alive += 1
            most = max(most, alive)
            yield torch.zeros(box.bottom - box.top, box.right - box.left).as_subclass(Counted)

    boxes = sliding_windows((200, 300), (20, 20))
    blend(boxes, values(), (200, 300))
    assert len(boxes) > 100 and most <= 4
