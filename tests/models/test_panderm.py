"""PanDerm over timm's Beit against the goldens of the published code."""

import argparse
import json

import numpy as np
import pytest
import timm
import torch

from furnace.models import create_backbone, panderm
from furnace.runtime.files import CheckpointError
from helpers import GOLDEN, golden_state, make_ckpt


def golden_inputs() -> torch.Tensor:
    """(3, 3, 224, 224): two noise images and the transformed picture."""
    noise = torch.from_numpy(np.load(GOLDEN / "input_randn_2x3x224x224.npy"))
    picture = torch.from_numpy(np.load(GOLDEN / "transformed_png.npy"))
    return torch.cat([noise, picture.reshape(1, 3, 224, 224)])


def test_lp_features_equal_the_published(base_checkpoint) -> None:
    """Class token after the final norm, fp32, within 1e-4; the order of rows kept."""
    backbone = create_backbone("PanDerm_Base_LP", base_checkpoint)
    with torch.inference_mode():
        features = backbone(golden_inputs()).numpy()
    np.testing.assert_allclose(features, np.load(GOLDEN / "features_lp_base_rng.npy"), atol=1e-4, rtol=0)
    assert len(backbone.provenance.report.matched) == 186 and not backbone.provenance.report.missing


def test_ft_features_equal_the_published(base_checkpoint) -> None:
    """The pretrained file in the fine-tuning form: mean of the patch tokens, norm renamed, relative tables at zero."""
    backbone = create_backbone("PanDerm_Base_FT", base_checkpoint)
    with torch.inference_mode():
        features = backbone(golden_inputs()).numpy()
    np.testing.assert_allclose(features, np.load(GOLDEN / "features_ft_base_rng.npy"), atol=1e-4, rtol=0)


def test_fine_tuned_checkpoint_loads_and_its_head_is_left_out(tmp_path) -> None:
    """The layout of checkpoint-best.pth, with the argparse.Namespace that the published code stores in it."""
    state = golden_state("keys_ft_base.json")
    torch.save({"model": state, "epoch": "best", "args": argparse.Namespace(lr=5e-4)}, tmp_path / "best.pth")
    backbone = create_backbone("PanDerm_Base_FT", tmp_path / "best.pth")
    assert set(backbone.provenance.report.unexpected) >= {"head.weight", "head.bias"}
    key = "blocks.7.attn.relative_position_bias_table"
    assert torch.equal(backbone.state_dict()[key], state[key]) and state[key].any()


def test_ft_takes_pretrained_weights_and_renames_the_norm(base_checkpoint) -> None:
    """norm.* becomes fc_norm.*; only the relative tables stay at their start (zero)."""
    backbone = create_backbone("PanDerm_Base_FT", base_checkpoint)
    report = backbone.provenance.report
    assert len(report.missing) == 12 and all(k.endswith("relative_position_bias_table") for k in report.missing)
    want = golden_state("keys_base.json")["norm.weight"]
    assert torch.equal(backbone.fc_norm.weight, want)
    with torch.inference_mode():
        features = backbone(golden_inputs()[:1])
    assert features.shape == (1, 768) and features.std() > 0.1


def test_ft_without_norm_is_refused(tmp_path) -> None:
    """The allow-list does not reach the final norm (it was left at its start by the published code)."""
    state = golden_state("keys_base.json")
    del state["norm.weight"], state["norm.bias"]
    torch.save(state, tmp_path / "no_norm.pth")
    with pytest.raises(CheckpointError, match="fc_norm.weight"):
        create_backbone("PanDerm_Base_FT", tmp_path / "no_norm.pth")


@pytest.mark.parametrize("dim", [768, 1024])
def test_positions_are_the_published_table(dim: int) -> None:
    """Bit for bit, zero for the class token."""
    table = panderm.sincos_positions(dim, (14, 14)).numpy()
    np.testing.assert_allclose(table, make_ckpt.sincos(dim), atol=2e-6, rtol=0)
    assert not table[0, 0].any()
    row, column = 3, 5  # token 1 + 3 * 14 + 5; the first channel of each quarter has frequency 1
    token = table[0, 1 + row * 14 + column]
    expected = [np.sin(row), np.cos(row), np.sin(column), np.cos(column)]
    np.testing.assert_allclose(token[[0, dim // 4, dim // 2, 3 * dim // 4]], expected, atol=1e-6)


@pytest.mark.parametrize("name,dim,depth,heads", [("PanDerm_Base_LP", 768, 12, 12), ("PanDerm_Base_FT", 768, 12, 12),
                                                  ("PanDerm_Large_LP", 1024, 24, 16),
                                                  ("PanDerm_Large_FT", 1024, 24, 16)])
def test_registered_in_timm(name: str, dim: int, depth: int, heads: int) -> None:
    """timm.create_model, its data config, feature maps; positions frozen, the rest trainable."""
    model = timm.create_model(name)
    assert (model.num_features, len(model.blocks), model.blocks[0].attn.num_heads) == (dim, depth, heads)
    config = timm.data.resolve_model_data_config(model)
    assert config["std"] == (0.228, 0.224, 0.225) and config["crop_pct"] == 0.875
    assert config["interpolation"] == "bilinear"
    frozen = [key for key, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["pos_embed"]
    if name == "PanDerm_Large_LP":  # the released file's keys
        keys = {entry["key"] for entry in json.loads((GOLDEN / "keys_large.json").read_text())["keys"]}
        assert {"encoder." + key for key in model.state_dict()} == keys and len(keys) == 366
    relative = any("relative_position" in key for key, _ in model.named_parameters())
    assert relative == name.endswith("FT")
