"""Student and teacher: shapes, masks before positions, crops of all sizes, parameter groups; I13, I17, I23, I25."""

import copy

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import nn

from furnace.models import create_backbone
from furnace.models.dino import DinoHead, DinoModel, create_dino, parameter_groups
from furnace.models.loading import resample_abs_positions
from furnace.models.prototypes import PrototypeHead, random_vectors
from furnace.runtime.files import UserError

TINY = {"patch_size": 14, "embed_dim": 24, "depth": 2, "num_heads": 2, "init_values": 0.1}


def tiny(*, size: int = 56, label_head: PrototypeHead | None = None, drop_path: float = 0.0, seed: int = 0,
         name: str = "timm:vit_tiny_patch16_224", **options) -> DinoModel:
    backbone = create_backbone(name, "random", input_size=size, options={**TINY, **options}, seed=seed)
    return create_dino(backbone, name=name, prototypes=16, hidden=20, bottleneck=8, label_head=label_head,
                       drop_path=drop_path, seed=seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def published() -> DinoModel:
    """ViT-B/14 with small heads."""
    return create_dino(create_backbone("DermINO_Base", "random"), name="DermINO_Base", prototypes=8, hidden=8)


# ----------------------------------------------------------------------------------------------------------- the heads

def test_head_size() -> None:
    """Recipe 1.5: 23,138,560 numbers each, DINO's tensor names."""
    with torch.device("meta"):
        head = DinoHead(768)
    assert sum(p.numel() for p in head.parameters()) == 23_138_560
    assert list(head.state_dict()) == [f"mlp.{i}.{kind}" for i in (0, 2, 4) for kind in ("weight", "bias")] + [
        "last_layer.weight_g", "last_layer.weight_v"]
    assert head.last_layer.weight_g.shape == (65536, 1) and head.last_layer.weight_v.shape == (65536, 256)


def test_head_gives_cosines() -> None:
    """The published layer: a weight-normalised product with a unit vector, computed here by PyTorch's own."""
    head, x = DinoHead(6, prototypes=5, hidden=7, bottleneck=4), normal(3, 6)
    with torch.no_grad():
        head.last_layer.weight_v.mul_(3.0)
        head.last_layer.weight_g.copy_(torch.tensor([[1.0], [2.0], [1.0], [0.5], [1.0]]))
    oracle = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5, bias=False), dim=0)
    with torch.no_grad():
        oracle.parametrizations.weight.original0.copy_(head.last_layer.weight_g)
        oracle.parametrizations.weight.original1.copy_(head.last_layer.weight_v)
    inner = head.mlp(x)
    torch.testing.assert_close(head(x), oracle(inner / inner.norm(dim=1, keepdim=True)))
    assert (head(x)[:, [0, 2, 4]].abs() <= 1 + 1e-6).all()
    assert (head.mlp[0].bias == 0).all() and 0.01 < head.mlp[0].weight.std() < 0.03


# -------------------------------------------------------------------------------------------------------- the backbone

def test_dermino_has_175_tensors(published) -> None:
    """I23: 175 tensors of 85,725,696 numbers with the mask token; 98 px are 49 patches."""
    model = published
    core = {key: value for key, value in model.state_dict().items() if key.startswith(("backbone.", "mask_token"))}
    assert len(core) == 175 and sum(value.numel() for value in core.values()) == 85_725_696
    assert model.mask_token.shape == (1, 768) and (model.mask_token == 0).all()
    assert model.positions((16, 16), 1) is model.backbone.pos_embed  # identity at 224
    with torch.no_grad():
        assert model.tokens(torch.zeros(1, 3, 98, 98)).shape == (1, 1 + 49, 768)


@pytest.mark.parametrize("name, options", [
    ("timm:vit_tiny_patch16_224", {}), ("timm:vit_small_patch14_reg4_dinov2", {}), ("DermINO_Base_reg4", {}),
    ("timm:deit3_small_patch16_224", {}), ("PanDerm_Base_LP", {"patch_size": 14, "init_values": 0.1})])
def test_tokens_are_those_of_timm(name, options) -> None:
    """Without masks at the model's own size: the class token is the backbone's feature, the rest timm's tokens."""
    model = tiny(name=name, **options).eval()
    images = normal(2, 3, 56, 56)
    with torch.no_grad():
        tokens = model.tokens(images)
        torch.testing.assert_close(tokens, model.backbone.forward_features(images))
        torch.testing.assert_close(tokens[:, 0], model.backbone(images))
    assert tokens.shape == (2, model.prefix + 16, 24)


def test_small_crops_have_resampled_positions() -> None:
    """28 px on a 56 px model: timm's model of 28 px with positions that DINOv2's rule made."""
    model = tiny().eval()
    small = create_backbone("timm:vit_tiny_patch16_224", "random", input_size=28, options=TINY)
    state = model.backbone.state_dict()
    state["pos_embed"] = resample_abs_positions(state["pos_embed"], (2, 2), 1, (4, 4), offset=0.1)
    small.load_state_dict(state)
    images = normal(3, 3, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(model.tokens(images), small.forward_features(images))
    assert not torch.equal(state["pos_embed"], resample_abs_positions(model.backbone.pos_embed, (2, 2), 1, (4, 4)))


def test_mask_token_comes_before_positions() -> None:
    """I25: a masked patch is the mask token plus its position, whatever the picture shows there."""
    model = tiny().eval()
    with torch.no_grad():
        model.mask_token.copy_(normal(1, 24, seed=1))
    seen = []
    model.backbone.norm_pre.register_forward_hook(lambda module, inputs, output: seen.append(output))
    images, masks = normal(2, 3, 56, 56), torch.zeros(2, 16, dtype=torch.bool)
    masks[0, 3] = masks[1, 7] = True
    other = images.clone()
    other[0, :, 0:14, 42:56] += 5.0  # patch 3 of image 0
    with torch.no_grad():
        torch.testing.assert_close(model.tokens(images, masks), model.tokens(other, masks))
        assert not torch.allclose(model.tokens(images), model.tokens(other))
    torch.testing.assert_close(seen[0][0, 1 + 3], model.mask_token[0] + model.backbone.pos_embed[0, 1 + 3])
    torch.testing.assert_close(seen[0][1, 1 + 7], model.mask_token[0] + model.backbone.pos_embed[0, 1 + 7])
    torch.testing.assert_close(seen[0][:, 1], seen[2][:, 1])  # unmasked patches as without masks


def test_attention_is_softmax_attention() -> None:
    """I25: the blocks' fused attention equals the explicit one."""
    model = tiny().eval()
    attention, x = model.backbone.blocks[0].attn, normal(2, 17, 24)
    q, k, v = attention.qkv(x).reshape(2, 17, 3, 2, 12).permute(2, 0, 3, 1, 4)
    explicit = (q @ k.transpose(-2, -1) / 12 ** 0.5).softmax(dim=-1) @ v
    expected = attention.proj(explicit.transpose(1, 2).reshape(2, 17, 24))
    torch.testing.assert_close(attention(x), expected, atol=1e-5, rtol=1e-5)


def test_forward_is_view_major() -> None:
    """Each output row is that of its own view and image, computed alone."""
    model = tiny(label_head=PrototypeHead(random_vectors(5, 24, seed=0), trainable=False, temperature=None)).eval()
    large, small, masks = normal(2, 3, 3, 56, 56), normal(4, 3, 3, 28, 28, seed=1), torch.zeros(2, 3, 16).bool()
    masks[0, 1, :4] = masks[1, 2, 5:7] = True
    with torch.no_grad():
        out = model(large, masks, small)
        assert out.dino.shape == (6, 3, 16) and out.ibot.shape == (6, 16)
        for view in range(2):
            for image in range(3):
                alone = model.tokens(large[view, image][None], masks[view, image][None])[0]
                torch.testing.assert_close(out.dino[view, image], model.dino_head(alone[0]))
                torch.testing.assert_close(out.classes[view, image], alone[0])
                torch.testing.assert_close(out.labels[view, image], model.label_head(alone[0]))
        for view in range(4):
            alone = model.tokens(small[view, 1][None])[0, 0]
            torch.testing.assert_close(out.dino[2 + view, 1], model.dino_head(alone))
        first = model.tokens(large[0, 1][None], masks[0, 1][None])[0, 1:][:4]
        torch.testing.assert_close(out.ibot[:4], model.ibot_head(first))
        whole, patches = model.targets(large, masks)
        torch.testing.assert_close(whole[1, 2], model.dino_head(model.tokens(large[1, 2][None])[0, 0]))
        torch.testing.assert_close(patches[4:], model.ibot_head(model.tokens(large[1, 2][None])[0, 1 + 5:1 + 7]))
        assert model(large, masks).dino.shape == (2, 3, 16)  # without local crops


def test_every_weight_has_a_gradient() -> None:
    """DDP waits for all of them, also where nothing is masked and there is no local crop."""
    model = tiny(drop_path=0.2).train()
    out = model(normal(2, 2, 3, 56, 56), torch.zeros(2, 2, 16, dtype=torch.bool))
    (out.dino.sum() + out.ibot.sum() + out.classes.square().sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_drop_path_is_uniform_and_of_the_student() -> None:
    """The same rate in all blocks; a module in eval mode has none."""
    model = tiny(drop_path=0.4)
    rates = [part.drop_prob for block in model.backbone.blocks for part in (block.drop_path1, block.drop_path2)]
    assert rates == [0.4] * 4
    images = normal(4, 3, 56, 56)
    model.eval()
    assert torch.equal(model.tokens(images), model.tokens(images))
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(model.tokens(images), model.tokens(images))


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    model = tiny().train()
    model.tokens(normal(2, 3, 56, 56)).square().sum().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.backbone.set_grad_checkpointing(True)
    model.tokens(normal(2, 3, 56, 56)).square().sum().backward()
    for name, gradient in plain.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient)


@pytest.mark.parametrize("name, options, why", [
    ("demo", {}, "is a EfficientNet"), ("timm:vit_tiny_patch16_224", {"global_pool": "avg"}, "pools its patches"),
    ("timm:vit_small_patch16_dinov3", {"depth": 1}, "is a Eva"), ("PanDerm_Base_FT", {"depth": 1}, "positions"),
    ("timm:vit_small_patch16_224", {"class_token": False, "global_pool": "avg"}, "class token"),
    ("timm:deit_tiny_distilled_patch16_224", {"depth": 1}, "distillation token"),
    ("timm:vit_small_patch16_18x2_224", {"depth": 1}, "ParallelThingsBlock"),
    ("timm:vit_tiny_r_s16_p8_224", {"depth": 1}, "HybridEmbed")])
def test_other_networks_are_refused(name, options, why) -> None:
    checkpoint = None if name == "demo" else "random"
    backbone = create_backbone(name, checkpoint, options=options)
    with pytest.raises(UserError, match=why):
        create_dino(backbone, name=name, prototypes=4)


# ---------------------------------------------------------------------------------------------------------- the teacher

def test_ema_is_exact() -> None:
    """I13: t' = m t + (1 - m) s, heads included; m = 1 freezes; the teacher has no gradient."""
    student = tiny(label_head=PrototypeHead(random_vectors(5, 24, seed=0), trainable=False, temperature=None))
    ema = ModelEmaV3(student)
    with torch.no_grad():
        for p in ema.module.parameters():
            p.fill_(1.0)
        for p in student.parameters():
            p.zero_()
    ema.decay = 0.992
    for k in range(1, 4):
        ema.update(student)
        for name, p in ema.module.named_parameters():
            torch.testing.assert_close(p, torch.full_like(p, 0.992 ** k), msg=name)
    before = copy.deepcopy(ema.module.state_dict())
    ema.decay = 1.0
    ema.update(student)
    assert all(torch.equal(value, before[key]) for key, value in ema.module.state_dict().items())
    outputs = ema.module.targets(normal(2, 2, 3, 56, 56), torch.ones(2, 2, 16, dtype=torch.bool))
    assert not any(output.requires_grad for output in outputs)


# ------------------------------------------------------------------------------------------------------------- groups

def test_groups_of_vit_base(published) -> None:
    """I17, for the 175 tensors of the published backbone."""
    model = published
    groups = parameter_groups(model, layer_decay=0.9)
    of = {name: group for group in groups for name in group["names"]}
    core = [name for name in of if name.startswith(("backbone.", "mask_token"))]
    assert len(core) == 175 and len(of) == len(list(model.named_parameters()))
    assert sum(of[name]["weight_decay_scale"] == 0 for name in core) == 123
    assert sum(of[name]["weight_decay_scale"] == 1 for name in core) == 52
    for name, scale in {"cls_token": 0.9 ** 13, "pos_embed": 0.9 ** 13, "blocks.0.norm1.weight": 0.9 ** 12,
                        "blocks.11.mlp.fc2.weight": 0.9, "norm.weight": 1.0,
                        "patch_embed.proj.weight": 0.2 * 0.9 ** 13}.items():
        assert of[f"backbone.{name}"]["lr_scale"] == pytest.approx(scale, rel=1e-12)
    assert of["mask_token"]["lr_scale"] == pytest.approx(0.254187, abs=1e-6)
    plain = {name: group["lr_scale"] for group in parameter_groups(model) for name in group["names"]}
    assert sorted(name for name, scale in plain.items() if scale != 1) == [
        "backbone.patch_embed.proj.bias", "backbone.patch_embed.proj.weight"]
    for name in ("cls_token", "pos_embed"):
        assert of[f"backbone.{name}"]["weight_decay_scale"] == 1


def test_groups_of_the_heads() -> None:
    """Last layers and prototypes have schedules of their own; backbone and heads are clipped apart."""
    for trainable in (True, False):
        head = PrototypeHead(random_vectors(5, 24, seed=0), trainable=trainable, temperature=None)
        of = {name: group for group in parameter_groups(tiny(label_head=head)) for name in group["names"]}
        assert {group["lr_schedule"] for name, group in of.items() if ".last_layer." in name} == {"last_layer_lr"}
        assert of["dino_head.mlp.0.weight"]["lr_schedule"] == "lr"
        assert {group["clip_group"] for group in of.values()} == {
            "backbone", "dino_head", "ibot_head", *(["label_head"] if trainable else [])}
        assert ("label_head.weight" in of) is trainable
