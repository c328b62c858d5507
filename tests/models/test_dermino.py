"""DermINO's ViT-B/14 through DINOv2-type files."""

import pytest
import timm
import torch

from furnace.models import create_backbone
from furnace.models.loading import resample_abs_positions
from furnace.runtime.files import CheckpointError


def published_form(model: torch.nn.Module, *, chunks: int = 0, registers: bool = False, side: int = 16) -> dict:
    """A timm DINOv2 state under the names of the published code: mask token, chunked blocks, register_tokens."""
    torch.manual_seed(0)
    state = {key: torch.randn_like(value) * 0.02 for key, value in model.state_dict().items()}
    if registers:
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.randn(1, 1 + side * side, 768) * 0.02
    elif side != 16:
        state["pos_embed"] = torch.randn(1, 1 + side * side, 768) * 0.02
    state["mask_token"] = torch.zeros(1, 768)
    if chunks:
        state = {key.replace(f"blocks.{key.split('.')[1]}.", f"blocks.{int(key.split('.')[1]) // chunks}."
                             f"{key.split('.')[1]}.") if key.startswith("blocks.") else key: value
                 for key, value in state.items()}
    return state


@pytest.fixture(scope="module")
def plain() -> torch.nn.Module:
    """timm's own model, the oracle."""
    return timm.create_model("vit_base_patch14_dinov2", num_classes=0, img_size=224).eval()


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"teacher": {"backbone." + k: v for k, v in s.items()}},
                                  lambda s: {"model": s, "epoch": 3}])
def test_equals_timms_model(plain, tmp_path, wrap) -> None:
    """Chunked blocks (as saved under FSDP), wrapped or flat: the features of timm's model with the same weights."""
    flat = published_form(plain)
    torch.save(wrap(published_form(plain, chunks=3)), tmp_path / "dermino.pth")
    backbone = create_backbone("DermINO_Base", tmp_path / "dermino.pth")
    plain.load_state_dict({k: v for k, v in flat.items() if k != "mask_token"})
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(backbone(images), plain.forward_features(images)[:, 0], atol=1e-5, rtol=1e-5)
    assert [key.rsplit(".")[-1] for key in backbone.provenance.report.unexpected] == ["mask_token"]


def test_registers_equal_timms_own_conversion(tmp_path) -> None:
    """timm's filter adds the class token's position to the class token; ours must give the same features."""
    oracle = timm.create_model("vit_base_patch14_reg4_dinov2", num_classes=0, img_size=224).eval()
    state = published_form(oracle, registers=True)
    torch.save(state, tmp_path / "reg.pth")
    oracle.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(dict(state), oracle))
    backbone = create_backbone("DermINO_Base_reg4", tmp_path / "reg.pth")
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(backbone(images), oracle(images), atol=1e-5, rtol=1e-5)


def test_positions_of_518_px_are_resampled(plain, tmp_path) -> None:
    """37 x 37 to 16 x 16, bicubic without antialiasing, the class token's position untouched."""
    state = published_form(plain, side=37)
    torch.save(state, tmp_path / "native.pth")
    backbone = create_backbone("DermINO_Base", tmp_path / "native.pth")
    assert backbone.provenance.report.resampled == ("pos_embed",)
    square = state["pos_embed"][:, 1:].reshape(1, 37, 37, 768).permute(0, 3, 1, 2)
    want = torch.nn.functional.interpolate(square, size=(16, 16), mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(backbone.pos_embed[:, 1:], want)
    assert torch.equal(backbone.pos_embed[:, 0], state["pos_embed"][:, 0])


def test_registers_and_no_registers_are_told_apart(tmp_path) -> None:
    """The plain file lacks reg_token."""
    plain = timm.create_model("DermINO_Base")
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    with pytest.raises(CheckpointError, match="reg_token"):
        create_backbone("DermINO_Base_reg4", tmp_path / "plain.pth")


def test_resampling_keeps_a_linear_ramp() -> None:
    """A table that grows linearly over the grid stays a ramp of the same centre in the middle of the grid."""
    ramp = torch.arange(8.0).repeat(8, 1).reshape(1, 64, 1)  # value = column
    table = torch.cat([torch.full((1, 1, 1), 9.0), ramp], dim=1)
    out = resample_abs_positions(table, (4, 4), prefix=1)
    assert out.shape == (1, 17, 1) and out[0, 0] == 9
    columns = out[0, 1:].reshape(4, 4)
    torch.testing.assert_close(columns[:, 1:3], torch.tensor([2.5, 4.5]).repeat(4, 1), atol=1e-5, rtol=0)
