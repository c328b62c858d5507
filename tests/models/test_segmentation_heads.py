"""UPerNet, the feature pyramid and the linear head: published numbers, closed forms, controls that must fail."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from furnace.models import panderm, segmentation_heads
from furnace.models.segmentation_heads import FeaturePyramid, LinearHead, UPerHead
from furnace.models.segmenter import SegmentationModel, create_segmenter
from furnace.runtime.files import UserError
from helpers import GOLDEN
from segmentation_golden import fill_published


@pytest.fixture(scope="module")
def published() -> SegmentationModel:
    """The published model at width 64, depth 4, 32 channels, with the goldens' weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(panderm.SIZES, "Base", {"embed_dim": 64, "depth": 4, "num_heads": 4})
        model = create_segmenter("PanDerm_Base_LP", "random", channels=32)
    model.load_state_dict(fill_published(model.state_dict()))
    return model


@pytest.fixture(scope="module")
def maps(published) -> list[torch.Tensor]:
    """The published model's pyramid on two noise images."""
    with torch.no_grad():
        return published.features(torch.from_numpy(np.load(GOLDEN / "input_randn_2x3x224x224.npy")))


def total(x: torch.Tensor) -> float:
    return float(x.double().sum())


# ------------------------------------------------------------------------------------------------ the published model

@torch.no_grad()
def test_small_model_gives_the_published_logits(published, maps) -> None:
    """Pyramid, logits at 56 and at 224 px, foreground pixels of both images."""
    assert sum(p.numel() for p in published.parameters()) == 446_658
    assert [tuple(x.shape) for x in maps] == [(2, 64, side, side) for side in (56, 28, 14, 7)]
    assert [total(x.abs()) for x in maps] == pytest.approx([8923.836, 14830.056, 19861.687, 6560.073], rel=1e-6)
    low = published.decode_head(maps)
    assert low.shape == (2, 2, 56, 56) and total(low) == pytest.approx(79.03839, abs=2e-3)
    assert float(low.double().std(correction=0)) == pytest.approx(0.01625717, abs=1e-7)
    np.testing.assert_allclose(low.flatten()[:3], [0.00873834, 0.00523921, 0.00301066], atol=2e-7)
    full = published(torch.from_numpy(np.load(GOLDEN / "input_randn_2x3x224x224.npy")))
    assert full.shape == (2, 2, 224, 224) and total(full) == pytest.approx(1264.614, abs=0.03)
    np.testing.assert_allclose(full.argmax(1).flatten(1).sum(1), [48831, 49242], atol=3)


@torch.no_grad()
@pytest.mark.parametrize("fault,expected", [("branches", 90.72), ("concatenation", -14.79), ("corners", 54.91)])
def test_goldens_tell_wrong_builds(published, maps, monkeypatch, fault: str, expected: float) -> None:
    """The sums that the spec gives for three mistakes: the golden would notice each, and our layers are those."""
    head = copy.deepcopy(published.decode_head)
    if fault == "branches":
        head.psp_modules = nn.ModuleList(reversed(head.psp_modules))
    elif fault == "concatenation":
        head.fpn_bottleneck.register_forward_pre_hook(lambda _, inputs: torch.cat(inputs[0].chunk(4, 1)[::-1], 1))
    else:
        monkeypatch.setattr(segmentation_heads, "resize", lambda x, size: F.interpolate(
            x, size=tuple(size), mode="bilinear", align_corners=True))
    assert total(head(maps)) == pytest.approx(expected, abs=0.006)


def test_large_head_has_the_published_parameters() -> None:
    """115 D^2 + 24 D + 2 (D + 1) at D = 1024, part by part; the pyramid 8,392,704 and 4,195,328."""
    def count(module: nn.Module) -> int:
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        head, neck = UPerHead([1024] * 4, channels=1024, nb_classes=2), FeaturePyramid(1024)
    assert count(head) == 120_612_866 == 115 * 1024**2 + 24 * 1024 + 2 * 1025
    assert {name: count(module) for name, module in head.named_children()} == {
        "conv_seg": 2_050, "dropout": 0, "psp_modules": 4 * 1_050_624, "bottleneck": 47_187_968,
        "lateral_convs": 3 * 1_050_624, "fpn_convs": 3 * 9_439_232, "fpn_bottleneck": 37_750_784}
    assert (count(neck.fpn1), count(neck.fpn2)) == (8_392_704, 4_195_328)


# -------------------------------------------------------------------------------------------------------- closed forms

@torch.no_grad()
def test_pyramid_resolutions_and_values() -> None:
    """x4, x2, x1, x0.5; identity and maximum are exact; the transposed convolutions place 2x2 blocks."""
    neck = FeaturePyramid(2).eval()
    maps = [torch.randn(1, 2, 6, 4, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    out = neck(maps)
    assert [tuple(x.shape[-2:]) for x in out] == [(24, 16), (12, 8), (6, 4), (3, 2)]
    assert torch.equal(out[2], maps[2])
    assert float(out[3][0, 1, 2, 0]) == float(maps[3][0, 1, 4:6, 0:2].max())
    weight, bias = neck.fpn2[0].weight, neck.fpn2[0].bias
    block = torch.einsum("c,cokl->okl", maps[1][0, :, 3, 1], weight) + bias[:, None, None]
    torch.testing.assert_close(out[1][0, :, 6:8, 2:4], block)
    names = [type(layer).__name__ for layer in neck.fpn1]
    assert names == ["ConvTranspose2d", "BatchNorm2d", "GELU", "ConvTranspose2d"]


@torch.no_grad()
def test_pooled_bins_on_seven() -> None:
    """p = 2: [0, 4) and [3, 7); p = 3: [0, 3), [2, 5), [4, 7); p = 6: [i, i + 2), as published."""
    head = UPerHead([1], channels=1, nb_classes=2)
    x = torch.randn(1, 1, 7, 7, generator=torch.Generator().manual_seed(0))
    bins = {2: [(0, 4), (3, 7)], 3: [(0, 3), (2, 5), (4, 7)], 6: [(i, i + 2) for i in range(6)], 1: [(0, 7)]}
    for branch in head.psp_modules:
        pooled = branch[0](x)[0, 0]
        expected = [[x[0, 0, a:b, c:d].mean() for c, d in bins[len(pooled)]] for a, b in bins[len(pooled)]]
        torch.testing.assert_close(pooled, torch.tensor(expected))
    assert [len(branch[0](x)[0, 0]) for branch in head.psp_modules] == [1, 2, 3, 6]


@torch.no_grad()
@pytest.mark.parametrize("widths", [[3, 5], [3, 4, 5, 6]])
def test_constant_maps_give_constant_logits_inside(widths: list[int]) -> None:
    """Away from the zero padding of the 3x3 convolutions a constant picture has constant logits."""
    head = UPerHead(widths, channels=4, nb_classes=3).eval()
    maps = [torch.ones(1, width, 128 // 2**i, 128 // 2**i) for i, width in enumerate(widths)]
    logits = head(maps)
    assert logits.shape == (1, 3, 128, 128)
    inside = logits[..., 62:66, 62:66].flatten(2)
    if len(widths) == 2:
        torch.testing.assert_close(inside, inside[..., :1].expand_as(inside))
    assert logits.std() > 0


@torch.no_grad()
def test_linear_head_is_its_formula() -> None:
    """(x - mean) / sqrt(var + 1e-5) * gamma + beta, then a matrix product at each place; maps are concatenated."""
    head, generator = LinearHead([3, 2], nb_classes=4), torch.Generator().manual_seed(0)
    for value in (head.bn.weight, head.bn.bias, head.bn.running_mean, head.conv_seg.weight, head.conv_seg.bias):
        value.copy_(torch.randn(value.shape, generator=generator))
    head.bn.running_var.copy_(torch.rand(5, generator=generator) + 0.5)
    maps = [torch.randn(2, width, 4, 6, generator=generator) for width in (3, 2)]
    x = torch.cat(maps, 1).permute(0, 2, 3, 1)
    x = (x - head.bn.running_mean) / (head.bn.running_var + 1e-5).sqrt() * head.bn.weight + head.bn.bias
    expected = x @ head.conv_seg.weight[:, :, 0, 0].T + head.conv_seg.bias
    torch.testing.assert_close(head.eval()(maps), expected.permute(0, 3, 1, 2), atol=1e-5, rtol=1e-5)


def test_starts_as_published() -> None:
    """Convolutions of blocks N(0, sqrt(2 / (C k k))), norms 1 and 0, the last layer N(0, 0.01) with bias zero."""
    torch.manual_seed(0)
    head = UPerHead([64] * 4, channels=48, nb_classes=50)
    for conv, kernel in ((head.bottleneck.conv, 3), (head.fpn_bottleneck.conv, 3)):
        assert float(conv.weight.detach().std()) == pytest.approx(math.sqrt(2 / (48 * kernel**2)), rel=0.01)
    assert float(head.lateral_convs[0].conv.weight.detach().std()) == pytest.approx(math.sqrt(2 / 48), rel=0.05)
    assert float(head.conv_seg.weight.detach().std()) == pytest.approx(0.01, rel=0.05) and not head.conv_seg.bias.any()
    assert all((m.weight == 1).all() and not m.bias.any() and (m.eps, m.momentum) == (1e-5, 0.1)
               for m in head.modules() if isinstance(m, nn.BatchNorm2d))
    assert not any(m.bias is not None for name, m in head.named_modules() if name.endswith(".conv"))
    linear = LinearHead([300], nb_classes=20)
    assert float(linear.conv_seg.weight.detach().std()) == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize("head", [UPerHead([3], channels=4, nb_classes=2, dropout=0.5),
                                  LinearHead([4], nb_classes=2, dropout=0.5)])
def test_dropout_takes_whole_channels_before_the_last_layer(head: nn.Module) -> None:
    """In training each channel of each image is left out or doubled; in evaluation none is touched."""
    seen = {}
    head.dropout.register_forward_pre_hook(lambda _, inputs: seen.update(before=inputs[0].detach()))
    head.conv_seg.register_forward_pre_hook(lambda _, inputs: seen.update(after=inputs[0].detach()))
    torch.manual_seed(0)
    x = [torch.rand(8, 3 if isinstance(head, UPerHead) else 4, 6, 6) + 1]
    head.train()(x)
    factor = seen["after"].sum((2, 3)) / seen["before"].sum((2, 3))
    assert seen["before"].shape == (8, 4, 6, 6) and 4 < int((factor == 0).sum()) < 28
    torch.testing.assert_close(seen["after"], seen["before"] * factor.round()[:, :, None, None])
    assert set(factor.round().unique().tolist()) == {0.0, 2.0}
    head.eval()(x)
    assert torch.equal(seen["after"], seen["before"])


def test_one_image_cannot_train_upernet() -> None:
    """A 1x1 map of one image has no variance; the message says what to do. Two images, or no such map, can."""
    head, x = UPerHead([3], channels=4, nb_classes=2), torch.randn(2, 3, 6, 6)
    with pytest.raises(UserError, match="--batch_size 2 or more"):
        head.train()([x[:1]])
    assert head([x]).shape == (2, 2, 6, 6) and head.eval()([x[:1]]).shape == (1, 2, 6, 6)
    assert (head.minimum_batch, LinearHead([3], nb_classes=2).minimum_batch) == (2, 1)
    assert LinearHead([3], nb_classes=2).train()([x[:1]]).shape == (1, 2, 6, 6)
    finer = UPerHead([3], channels=4, nb_classes=2, pool_scales=(2, 3))
    assert finer.train()([x[:1]]).shape == (1, 2, 6, 6)
