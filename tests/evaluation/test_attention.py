"""Attention maps against softmax(Q K^T) from the weights, and the pictures drawn of them."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import eva
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from furnace.data.transforms import build_transform
from furnace.data.unlabelled import read_images
from furnace.evaluation.attention import (
    COLOURS,
    OPACITY,
    attention_maps,
    attention_overlay,
    draw_attention,
    seen_view,
)
from furnace.evaluation.features import Extraction
from furnace.models import create_backbone
from furnace.models.panderm import PanDerm
from furnace.runtime.files import UserError
from helpers import draw_images

SMALL = {"img_size": (32, 24), "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 0}
GRID, HEADS, WIDTH = (4, 3), 3, 8


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Every weight another, large enough that the attention is far from even."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def images(seed: int = 1) -> torch.Tensor:
    """(2, 3, 32, 24)."""
    return torch.randn(2, 3, 32, 24, generator=torch.Generator().manual_seed(seed))


def by_hand(model: torch.nn.Module, q_bias: torch.Tensor, k_bias: torch.Tensor,
            bias: torch.Tensor | float = 0.0) -> torch.Tensor:
    """(2, heads, N, N) softmax(Q K^T / sqrt(8) + bias), a head and an image at a time."""
    seen = []
    handle = model.blocks[-1].norm1.register_forward_hook(lambda *args: seen.append(args[2]))
    with torch.no_grad():
        model(images())
    handle.remove()
    w_q, w_k, _ = model.blocks[-1].attn.qkv.weight.detach().chunk(3)
    rows = []
    for tokens in seen[0]:
        q, k = tokens @ w_q.T + q_bias, tokens @ w_k.T + k_bias
        for head in range(HEADS):
            mine = slice(head * WIDTH, (head + 1) * WIDTH)
            scores = q[:, mine] @ k[:, mine].T / WIDTH**0.5 + (bias[head] if torch.is_tensor(bias) else bias)
            rows.append(scores.exp() / scores.exp().sum(dim=1, keepdim=True))
    return torch.stack(rows).unflatten(0, (2, HEADS))


@pytest.mark.parametrize("form", [{"use_rel_pos_bias": False, "global_pool": "token"},
                                  {"use_rel_pos_bias": True, "global_pool": "avg"}], ids=["LP", "FT"])
def test_panderm(form: dict) -> None:
    """Beit: biases for Q and V alone; the FT form adds one learned number per head from class token to patches."""
    model = randomised(PanDerm(**SMALL, qkv_bias=True, init_values=0.1, use_abs_pos_emb=True, **form))
    layer, bias = model.blocks[-1].attn, 0.0
    if form["use_rel_pos_bias"]:
        bias = torch.zeros(HEADS, 13, 13)
        table = layer.relative_position_bias_table.detach()  # last rows: class to patch, patch to class, class to class
        bias[:, 0, 1:], bias[:, 0, 0] = table[-3][:, None], table[-1]
    want = by_hand(model, layer.q_bias.detach(), torch.zeros(24), bias)[:, :, 0, 1:]
    got = attention_maps(model, images())
    assert got.shape == (2, HEADS, *GRID) and got.dtype == torch.float32
    torch.testing.assert_close(got, want.reshape(2, HEADS, *GRID), atol=1e-6, rtol=1e-4)
    assert (got.sum(dim=(2, 3)) < 1).all(), "the class token's own share is cut off"
    assert got.std() > 0.01, "far from even, or the test would show nothing"


@pytest.mark.parametrize("form", [{}, {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5},
                                  {"class_token": False, "global_pool": "avg"},
                                  {"class_token": False, "reg_tokens": 2, "global_pool": "avg"}],
                         ids=["ViT", "DINOv2 with registers", "no class token", "registers without class token"])
def test_vision_transformer(form: dict) -> None:
    """Class token first, then registers; without a class token the mean over the patches' rows."""
    model = randomised(VisionTransformer(**{**SMALL, **form}))
    prefix = form.get("class_token", True) + form.get("reg_tokens", 0)
    assert model.num_prefix_tokens == prefix
    q_bias, k_bias, _ = model.blocks[-1].attn.qkv.bias.detach().chunk(3)
    whole = by_hand(model, q_bias, k_bias)
    assert whole.shape[-1] == prefix + 12
    want = whole[:, :, 0] if form.get("class_token", True) else whole[:, :, prefix:].mean(dim=2)
    torch.testing.assert_close(attention_maps(model, images()), want[..., prefix:].reshape(2, HEADS, *GRID), atol=1e-6,
                               rtol=1e-4)


def test_eva_with_rotary_positions(monkeypatch) -> None:
    """DINOv3's architecture: Q and K as they arrive at the fused kernel, after rotation."""
    model = randomised(Eva(**SMALL, use_rot_pos_emb=True, num_reg_tokens=2, qkv_fused=False, use_abs_pos_emb=False))
    got, arrived = attention_maps(model, images()), []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(eva.F, "scaled_dot_product_attention",
                        lambda q, k, v, **more: arrived.append((q, k)) or fused(q, k, v, **more))
    with torch.no_grad():
        model(images())
    q, k = arrived[-1]
    want = (q[:, :, :1] @ k.mT / WIDTH**0.5).softmax(dim=-1)[:, :, 0, 3:]
    torch.testing.assert_close(got, want.reshape(2, HEADS, *GRID), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_stays_as_it_was(fails: bool) -> None:
    """Flags, hooks, train modes and outputs, also when the forward pass fails."""
    model = randomised(VisionTransformer(**SMALL))
    with torch.no_grad():
        before = model(images())
    model.train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    flags = [block.attn.fused_attn for block in model.blocks]
    if fails:
        with pytest.raises(AssertionError):
            attention_maps(model, torch.zeros(1, 3, 8, 8))
    else:
        attention_maps(model, images())
    assert [module.training for module in model.modules()] == modes
    assert [block.attn.fused_attn for block in model.blocks] == flags == [True, True]
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images()), before, atol=0, rtol=0)


def test_dropout_of_a_model_in_train_mode_does_not_count() -> None:
    """The softmax itself."""
    model = randomised(VisionTransformer(**SMALL, attn_drop_rate=0.5, proj_drop_rate=0.5))
    want = attention_maps(model, images())
    torch.testing.assert_close(attention_maps(model.train(), images()), want, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["resnet18", "test_efficientnet", "swin_tiny_patch4_window7_224"])
def test_other_architectures_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="has no attention from one token.*it works for timm's VisionTransformer"):
        attention_maps(timm.create_model(name, num_classes=0), torch.zeros(1, 3, 224, 224))


@pytest.mark.parametrize("form", [{"attn_layer": "diff"},
                                  {"block_fn": timm.models.vision_transformer.ParallelThingsBlock}])
def test_other_attention_is_refused(form: dict) -> None:
    """Differential attention has two softmaxes per head; parallel attentions are several."""
    if not set(form) <= set(inspect.signature(VisionTransformer).parameters):
        pytest.skip(f"timm {timm.__version__} has no {', '.join(form)}")
    with pytest.raises(UserError, match="has 6 softmaxes for 3 heads|have no plain attention"):
        attention_maps(randomised(VisionTransformer(**SMALL, **form)), images())


# ---------------------------------------------------------------------------------------------------------- pictures

def test_overlay_at_the_right_place() -> None:
    """Row 1, columns 2 and 3 of a 4 x 6 grid, over a grey picture of 96 x 64 pixels."""
    attention = torch.full((2, 4, 6), 0.01)
    attention[0, 0:2, 2:4], attention[1, 0:2, 2:4] = 0.2, 0.4
    image = Image.new("RGB", (96, 64), (100, 100, 100))
    pixels = np.asarray(attention_overlay(image, attention)).astype(int)
    assert pixels.shape == (64, 96, 3)
    peak = np.array([100] * 3) * (1 - OPACITY) + np.array(COLOURS(1.0)[:3]) * 255 * OPACITY
    np.testing.assert_allclose(pixels[16, 48], peak, atol=1)
    assert (pixels[60] == 100).all() and (pixels[:, :8] == 100).all() and (pixels[:, 90:] == 100).all()
    changed = np.abs(pixels - 100).sum(axis=2) > 20
    assert changed[4:28, 36:60].all() and not changed[40:].any()


def test_overlay_takes_the_mean_over_heads() -> None:
    """Two heads that cancel leave the picture alone, as does even attention."""
    one = torch.rand(1, 3, 3)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8))
    for attention in (torch.cat([one, 1 - one]), torch.full((3, 4, 4), 0.1)):
        np.testing.assert_array_equal(np.asarray(attention_overlay(image, attention)), np.asarray(image))


@pytest.mark.parametrize("mode", ["published", "fast"])
def test_seen_view_is_the_resized_crop(mode: str) -> None:
    """Shorter side to 256, centre 224, back to 8 bits."""
    config = {"input_size": (3, 224, 224), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3), "crop_pct": 0.875,
              "crop_mode": "center", "interpolation": "bilinear"}
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    view = seen_view(build_transform(config, mode)(image if mode == "published" else tensor), config)
    want = image.resize((341, 256), Image.Resampling.BILINEAR).crop((58, 16, 282, 240))
    assert np.abs(np.asarray(view).astype(int) - np.asarray(want)).max() <= 2


def test_draw_attention(tmp_path: Path) -> None:
    """A picture per image in the input's order, and the sheet."""
    backbone = create_backbone("timm:test_vit", "random", input_size=64)
    draw_images(tmp_path / "in", ["b/x.png", "a.png", "c.png"], size=(80, 70))
    manifest = read_images(tmp_path / "in")
    paths = draw_attention(tmp_path / "out", backbone, manifest, Extraction(device=torch.device("cpu"), batch_size=2))
    assert [path.name for path in paths] == ["0000_a.png", "0001_x.png", "0002_c.png", "sheet.png"]
    transform, image = build_transform(backbone), Image.open(tmp_path / "in" / "b" / "x.png")
    tensor = transform(image)
    view = seen_view(tensor, backbone.provenance.data_config)
    want = attention_overlay(view, attention_maps(backbone, tensor[None])[0])
    np.testing.assert_allclose(np.asarray(Image.open(paths[1])).astype(int), np.asarray(want), atol=1)
    assert Image.open(paths[0]).size == (64, 64) and Image.open(paths[3]).width > 6 * 160
    (tmp_path / "in" / "c.png").write_bytes((tmp_path / "in" / "c.png").read_bytes()[:100])
    with pytest.raises(UserError, match=r"c\.png cannot be decoded"):
        draw_attention(tmp_path / "out", backbone, manifest, Extraction(device=torch.device("cpu")))
