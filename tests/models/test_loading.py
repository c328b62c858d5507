"""Checkpoint files of every layout, on tiny models."""

import re

import numpy as np
import pytest
import timm
import torch

from furnace.models.loading import (
    LoadRules,
    asked_rules,
    best_prefix,
    describe_state,
    load_backbone,
    resample_abs_positions,
    unwrap,
)
from furnace.models.panderm import PanDerm
from furnace.runtime.files import CheckpointError, CheckpointFile

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 16, "num_classes": 0, "init_values": 0.1}


def tiny(img_size: int = 64, form: str = "token", **kwargs) -> PanDerm:
    """A PanDerm of width 32 and depth 2."""
    return PanDerm(img_size=img_size, global_pool=form, use_rel_pos_bias=form == "avg", **{**TINY, **kwargs}).eval()


def weights(img_size: int = 64, **kwargs) -> dict[str, torch.Tensor]:
    """A random state of it, all tensors different from a fresh model's."""
    torch.manual_seed(1)
    return {key: torch.randn_like(value) for key, value in tiny(img_size, **kwargs).state_dict().items()}


def load(model: torch.nn.Module, content: object, **how):
    """Through the product's function."""
    return load_backbone(model, CheckpointFile(path="file.pth", sha256="0" * 64, content=content), "PanDerm_Base_LP",
                         **how)


def prefixed(state: dict, prefix: str) -> dict:
    """Every key behind a prefix."""
    return {prefix + key: value for key, value in state.items()}


EXTRA = {"decoder.weight": torch.ones(3), "regresser.bias": torch.ones(3), "mask_token": torch.ones(1)}
LAYOUTS = {
    "flat": lambda s: s,
    "model": lambda s: {"model": s, "epoch": "best", "optimizer": {"state": {}}},
    "module": lambda s: {"module": s},
    "state_dict": lambda s: {"state_dict": s, "epoch": 7},
    "teacher": lambda s: {"teacher": s},
    "nested": lambda s: {"model": {"state_dict": s}},
    "encoder.": lambda s: prefixed(s, "encoder."),
    "encoder. beside a decoder": lambda s: {**prefixed(s, "encoder."), **EXTRA},
    "module.": lambda s: {"state_dict": prefixed(s, "module.")},
    "backbone.": lambda s: prefixed(s, "backbone."),
    "teacher.backbone.": lambda s: {**prefixed(s, "teacher.backbone."), "teacher.dino_head.mlp.0.weight": torch.ones(2),
                                    **prefixed({k: v * 0 for k, v in s.items()}, "student.backbone.")},
    "_orig_mod.": lambda s: {"model": prefixed(s, "_orig_mod.")},
    "module._orig_mod.encoder.": lambda s: prefixed(s, "module._orig_mod.encoder."),
    "half precision": lambda s: {k: v.half() for k, v in s.items()},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads(layout: str) -> None:
    """Each tensor of the model has the file's value."""
    model, state = tiny(), weights()
    report = load(model, LAYOUTS[layout](state))
    assert set(report.matched) == set(state) and not report.missing
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, state[key], atol=5e-3 if "half" in layout else 0, rtol=0)
    if "decoder" in layout:
        assert set(report.unexpected) == set(EXTRA)


@pytest.mark.parametrize("key", ["norm.weight", "cls_token", "blocks.1.attn.q_bias", "pos_embed"])
def test_one_missing_tensor_is_an_error(key: str) -> None:
    """And the model stays as it was."""
    model, state = tiny(), weights()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    del state[key]
    with pytest.raises(CheckpointError, match=key.replace(".", r"\.")):
        load(model, state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_one_misshapen_tensor_is_an_error() -> None:
    """It names both shapes."""
    state = weights()
    state["blocks.0.mlp.fc1.weight"] = torch.zeros(64, 32)
    with pytest.raises(CheckpointError, match=r"fc1.weight \(64, 32\), not \(128, 32\)"):
        load(tiny(), state)


def test_nan_is_an_error() -> None:
    """Diverged weights give features that look like numbers."""
    state = weights()
    state["norm.bias"][3] = float("nan")
    with pytest.raises(CheckpointError, match="NaN"):
        load(tiny(), state)


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1, 2], {"model": {}}, torch.ones(3)])
def test_no_tensors_is_an_error(content: object) -> None:
    """A file without a state dict."""
    with pytest.raises(CheckpointError, match="no tensors"):
        load(tiny(), content)


@pytest.mark.parametrize("old,new", [(64, 96), (96, 64)])
def test_positions_of_another_size_are_resampled(old: int, new: int) -> None:
    """Absolute and relative tables; everything else as in the file."""
    model, state = tiny(new, form="avg"), weights(old, form="avg")
    report = load(model, state)
    assert set(report.resampled) == {"pos_embed", "blocks.0.attn.relative_position_bias_table",
                                     "blocks.1.attn.relative_position_bias_table"}
    assert torch.equal(model.blocks[1].mlp.fc2.weight, state["blocks.1.mlp.fc2.weight"])
    assert torch.isfinite(model(torch.randn(1, 3, new, new))).all()


def test_fine_tuned_form_may_lack_relative_tables() -> None:
    """They start at zero, the final norm is renamed."""
    model, state = tiny(form="avg"), weights()
    report = load(model, state)
    assert torch.equal(model.fc_norm.bias, state["norm.bias"])
    assert all(key.endswith("relative_position_bias_table") for key in report.missing) and len(report.missing) == 2


def test_lp_form_refuses_a_fine_tuned_file() -> None:
    """Its norm was trained behind a mean, not behind the class token."""
    with pytest.raises(CheckpointError, match="norm.weight"):
        load(tiny(), weights(form="avg"))


def test_unwrap_prefers_the_model() -> None:
    """Not its optimiser, not its EMA."""
    state = {"a": torch.ones(1)}
    assert unwrap({"model_ema": {"b": torch.ones(1)}, "model": state, "optimizer": {}}) == state


def test_prefix_needs_matches() -> None:
    """A decoder called encoder.* does not win over the backbone."""
    target = {"norm.weight": torch.ones(1), "norm.bias": torch.ones(1)}
    state = {"norm.weight": torch.ones(1), "norm.bias": torch.ones(1), "encoder.norm.weight": torch.ones(1)}
    assert best_prefix(state, target, LoadRules()) == ""


@pytest.mark.parametrize("name,words", [("beit_base_patch16_224", "PanDerm_Base_FT"), ("vit_small_patch16_224",
                         "ViT-S/16"), ("resnet50", "ResNet-50"), ("resnet18", "a ResNet"),
                         ("vit_base_patch14_reg4_dinov2", "ViT-B/14 .DINOv2-type, as DermINO. with register")])
def test_describe_state(name: str, words: str) -> None:
    """What a file seems to be."""
    state = timm.create_model(name, num_classes=0).state_dict()
    assert re.search(words, describe_state(state))


@pytest.mark.parametrize("wanted,given,words", [("resnet18", "resnet34", r"a ResNet.*96 tensors of layers"),
                                                ("resnet50", "resnet101", "deeper network"),
                                                ("convnext_atto", "convnext_pico", "does not fit")])
def test_a_deeper_network_is_refused(wanted: str, given: str, words: str) -> None:
    """Every tensor of the smaller one is there, and it would run as a truncated network."""
    with pytest.raises(CheckpointError, match=words):
        load(timm.create_model(wanted, num_classes=0), timm.create_model(given).state_dict())


def test_a_deeper_vit_is_refused_and_a_decoder_is_not() -> None:
    """blocks.2 beside two blocks; decoder.blocks.2 is another family."""
    state = weights(depth=3)
    with pytest.raises(CheckpointError, match=r"looks like a BEiT of width 32 and depth 3.*blocks\.2\."):
        load(tiny(), state)
    extra = {key.replace("blocks.2", "decoder.blocks.2"): value for key, value in state.items() if "blocks.2" in key}
    report = load(tiny(), {**weights(), **extra, "head.0.weight": torch.ones(2), "classifier.1.bias": torch.ones(2)})
    assert len(report.unexpected) == len(extra) + 2


def test_a_counter_beside_the_wrapper() -> None:
    """{'model': ..., 'epoch': tensor(3)} is a wrapped file."""
    assert load(tiny(), {"model": weights(), "epoch": torch.tensor(3)}).matched


def test_wrappers_are_tried_in_the_order_given() -> None:
    """Two states in one file: the asked one is loaded; keys that are not asked for are not looked under."""
    first, second = weights(), {key: value + 1 for key, value in weights().items()}
    content = {"model": first, "ema": {"state_dict": second}}
    for wrappers, want in ((("model", "ema"), first), (("ema", "state_dict", "model"), second)):
        model = tiny()
        load(model, content, wrappers=wrappers)
        assert torch.equal(model.norm.weight, want["norm.weight"])
    with pytest.raises(CheckpointError, match="no tensors under module"):
        load(tiny(), content, wrappers=("module",))


def test_prefix_may_be_forced() -> None:
    """Student and teacher lie in one file; the votes are even, the asked one is loaded."""
    student, teacher = weights(), {key: value + 1 for key, value in weights().items()}
    state = {**prefixed(student, "student."), **prefixed(teacher, "teacher.")}
    for prefix, want in (("student.", student), ("teacher.", teacher)):
        model = tiny()
        report = load(model, state, prefix=prefix)
        assert torch.equal(model.norm.weight, want["norm.weight"]) and report.prefix == prefix
    with pytest.raises(CheckpointError, match="no key that begins with 'net.'"):
        load(tiny(), state, prefix="net.")


def test_a_norm_moves_only_where_another_pooling_was_asked_for() -> None:
    """A ViT pooled by mean needs fc_norm, the file has norm, and the other way round."""
    shape = {"img_size": 64, "num_classes": 0, "depth": 1}
    mean, token = (timm.create_model("vit_tiny_patch16_224", global_pool=pool, **shape) for pool in ("avg", "token"))
    for model, other, old, new in ((mean, token, "norm", "fc_norm"), (token, mean, "fc_norm", "norm")):
        state = {key: torch.randn_like(value) for key, value in other.state_dict().items()}
        with pytest.raises(CheckpointError, match=f"missing: 2 .{new}.weight"):
            load(model, state)
        load(model, state, asked=asked_rules({"global_pool": model.global_pool}))
        assert torch.equal(model.state_dict()[f"{new}.weight"], state[f"{old}.weight"])


def test_a_norm_does_not_take_the_place_of_another() -> None:
    """A file with both: each goes where it belongs."""
    state = {**weights(form="avg"), "norm.weight": torch.zeros(32), "norm.bias": torch.zeros(32)}
    model = tiny(form="avg")
    load(model, state)
    assert torch.equal(model.fc_norm.weight, state["fc_norm.weight"])


def test_asked_tensors_may_be_missing_and_no_others() -> None:
    """LayerScale and relative tables that the file lacks start where the model starts them."""
    state = {key: value for key, value in weights().items() if "gamma" not in key}
    with pytest.raises(CheckpointError, match="gamma_1"):
        load(tiny(), state)
    model = tiny()
    assert len(load(model, state, asked=asked_rules({"init_values": 0.1})).missing) == 4
    assert (model.blocks[1].gamma_2 == 0.1).all()
    del state["blocks.0.norm1.weight"]
    with pytest.raises(CheckpointError, match=r"missing: 1 \(blocks.0.norm1.weight"):
        load(tiny(), state, asked=asked_rules({"init_values": 0.1, "use_rel_pos_bias": True}))


def test_learned_relative_tables_need_a_place() -> None:
    """Zero tables change nothing; others are refused unless they were asked to go."""
    state = {**weights(), "blocks.1.attn.relative_position_bias_table": torch.zeros(52, 2)}
    load(tiny(), state)
    state["blocks.1.attn.relative_position_bias_table"][3] = 1.0
    with pytest.raises(CheckpointError, match="learned relative positions in 1 blocks"):
        load(tiny(), state)
    assert len(load(tiny(), state, asked=asked_rules({"use_rel_pos_bias": False})).unexpected) == 1


def cubic(x: float) -> float:
    """Keys' kernel with a = -0.75, the one of PyTorch's bicubic resizing."""
    a, x = -0.75, abs(x)
    if x <= 1:
        return (a + 2) * x ** 3 - (a + 3) * x ** 2 + 1
    return a * x ** 3 - 5 * a * x ** 2 + 8 * a * x - 4 * a if x < 2 else 0.0


def bicubic(old: int, new: int, offset: float) -> np.ndarray:
    """(new, old): the weights of one axis; places beyond the border are the border's."""
    weights = np.zeros((new, old))
    for i in range(new):
        place = (i + 0.5) * old / (new + offset) - 0.5
        for j in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            weights[i, min(max(j, 0), old - 1)] += cubic(place - j)
    return weights


@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize("old,new", [((16, 16), (7, 7)), ((37, 37), (16, 16)), ((7, 7), (16, 16)), ((4, 6), (5, 3))])
def test_resampled_positions_are_bicubic(old: tuple, new: tuple, offset: float) -> None:
    """Against a kernel written here: DINOv2's local crops (16 to 7) and its 518-pixel file (37 to 16), both offsets."""
    rng = np.random.default_rng(5)
    table = rng.normal(size=(1, 2 + old[0] * old[1], 3)).astype(np.float32)
    out = resample_abs_positions(torch.from_numpy(table), new, 2, old, offset=offset).numpy()
    rows, columns = (bicubic(o, n, offset) for o, n in zip(old, new, strict=True))
    want = np.einsum("ir,jc,rcd->ijd", rows, columns, table[0, 2:].reshape(*old, 3).astype(float))
    np.testing.assert_allclose(out[0, 2:].reshape(*new, 3), want, atol=2e-5)
    assert (out[:, :2] == table[:, :2]).all()
    if offset:
        plain = resample_abs_positions(torch.from_numpy(table), new, 2, old).numpy()
        assert np.abs(plain - out).max() > 0.01, "the offset matters"


@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_positions_of_the_wanted_grid_stay(offset: float, dtype: torch.dtype) -> None:
    """Bit for bit, whatever the offset; the gradient passes."""
    table = torch.randn(1, 1 + 12, 8).to(dtype).requires_grad_()
    out = resample_abs_positions(table, (3, 4), 1, (3, 4), offset=offset)
    assert torch.equal(out, table) and out.dtype == dtype
    moved = resample_abs_positions(table, (2, 2), 1, (3, 4), offset=offset)
    assert moved.shape == (1, 5, 8) and moved.dtype == dtype
    moved.sum().backward()
    assert table.grad.abs().sum() > 0


def test_an_offset_that_makes_another_grid() -> None:
    """It is a part of a place, not whole places."""
    with pytest.raises(ValueError, match=r"an offset of 1.5 makes a grid of \(8, 8\), not \(7, 7\)"):
        resample_abs_positions(torch.randn(1, 1 + 256, 4), (7, 7), 1, offset=1.5)
