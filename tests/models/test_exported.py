"""Folders of exported backbones: written, read here and by timm, refused."""

import json
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from furnace import create_backbone
from furnace.models import OptionError
from furnace.models.exported import architecture_arguments, export_backbone, find_exported, read_exported
from furnace.models.loading import resample_abs_positions
from furnace.runtime.files import OutputError, UserError, sha256_file

TRANSFORM = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "crop_pct": 0.8, "crop_mode": "center",
             "interpolation": "bilinear"}


def backbone_of(name: str = "timm:vit_tiny_patch16_224", size: int = 64, **options) -> torch.nn.Module:
    """Small, its tensors different from those of every fresh model."""
    options = {"depth": 2, "embed_dim": 48, "num_heads": 2, **options}
    model = create_backbone(name, "random", input_size=size, seed=11, options=options)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


ARGUMENTS = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 2}  # of backbone_of()'s recipe


def exported(folder: Path, model: torch.nn.Module | None = None, size: int = 64, **changes) -> Path:
    """A folder, with changes of config.json (None takes a key out)."""
    export_backbone(folder, model or backbone_of(size=size), input_size=size, data_config=TRANSFORM,
                    about={"epoch": 7})
    if changes:
        config = {**json.loads((folder / "config.json").read_text()), **changes}
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


CASES = {"plain ViT": ("timm:vit_tiny_patch16_224", {}),
         "mean of tokens": ("timm:vit_tiny_patch16_224", {"global_pool": "avg"}),
         "DINOv2 with registers, a tag": ("timm:vit_small_patch14_reg4_dinov2.lvd142m", {}),
         "DermINO": ("DermINO_Base", {}),
         "PanDerm": ("PanDerm_Base_LP", {})}


@pytest.mark.parametrize("case", CASES)
def test_both_read_what_was_written(tmp_path, case: str, one_thread) -> None:
    """create_backbone and timm give the very outputs of the backbone, with its transform."""
    name, options = CASES[case]
    size = 56 if "14" in name or "DermINO" in name else 64
    model = backbone_of(name, size, **options)
    folder = exported(tmp_path / "new" / "teacher", model, size)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    ours = create_backbone(str(folder), input_size=size)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    images = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        want = model(images)
        assert want.std() > 0.1 and torch.equal(ours(images), want) and torch.equal(theirs(images), want)
        assert timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=5).eval()(images).shape == (2, 5)
    assert ours.provenance.data_config == {"input_size": [3, size, size], **TRANSFORM}
    resolved = timm.data.resolve_model_data_config(theirs)
    assert {key: resolved[key] for key in TRANSFORM} == TRANSFORM and resolved["input_size"][1:] == (size, size)
    assert ours.provenance.weights == "file" and len(ours.provenance.report.matched) == len(model.state_dict())
    assert ours.provenance.sha256 == sha256_file(folder / "model.safetensors")
    assert ours.recipe["architecture"] == name.removeprefix("timm:").split(".")[0]
    assert ours.recipe["arguments"] == {**ARGUMENTS, "img_size": size, **options}


def test_half_precision_in_the_file(tmp_path, one_thread) -> None:
    """Half the bytes; the loaded model computes in float32 with the rounded numbers, at other sizes, too."""
    model = backbone_of()
    whole = exported(tmp_path / "whole", model)
    rounded = {key: value.half().float() for key, value in model.state_dict().items()}
    half = exported(tmp_path / "half", model.half())
    files = [(folder / "model.safetensors").stat().st_size for folder in (half, whole)]
    assert 0.45 < files[0] / files[1] < 0.55 and load_file(half / "model.safetensors")["cls_token"].dtype == torch.half
    loaded = create_backbone(str(half), input_size=64)
    assert all(value.dtype == torch.float32 and torch.equal(value, rounded[key])
               for key, value in loaded.state_dict().items())
    larger = create_backbone(str(half), input_size=96)(torch.randn(2, 3, 96, 96))
    assert larger.dtype == torch.float32 and larger.isfinite().all()


def test_config_says_what_timm_and_a_reader_need(tmp_path) -> None:
    """Every key that the format has, and ours; the tensors are the backbone's, bit for bit."""
    model = backbone_of(drop_path_rate=0.2)
    folder = exported(tmp_path, model)
    config = json.loads((folder / "config.json").read_text())
    assert config == {
        "architecture": "vit_tiny_patch16_224", "num_classes": 0, "num_features": 48, "global_pool": "token",
        "model_args": ARGUMENTS,
        "pretrained_cfg": {"custom_load": False, "input_size": [3, 64, 64], "fixed_input_size": True, **TRANSFORM,
                           "num_classes": 0, "first_conv": "patch_embed.proj", "classifier": "head"},
        "furnace": {"epoch": 7}}
    state = load_file(folder / "model.safetensors")
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())


def test_a_model_of_any_size(tmp_path) -> None:
    """A convolutional network has no size of its own; a flexible ViT is not said to have one."""
    model = create_backbone("timm:resnet18", "random", input_size=96)
    folder = exported(tmp_path / "a", model, 96)
    config = json.loads((folder / "config.json").read_text())
    assert config["model_args"] == {} and not config["pretrained_cfg"]["fixed_input_size"]
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(create_backbone(str(folder), input_size=64)(images), model(images))
    flexible = backbone_of(dynamic_img_size=True)
    config = json.loads((exported(tmp_path / "b", flexible) / "config.json").read_text())
    assert not config["pretrained_cfg"]["fixed_input_size"] and config["model_args"]["dynamic_img_size"]
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(create_backbone(str(tmp_path / "b"), input_size=64)(images), flexible(images))


def test_an_export_replaces_an_older_one_and_leaves_the_rest(tmp_path) -> None:
    """The heads of a teacher lie beside, and are not taken for its weights."""
    save_file({"dino.weight": torch.ones(2)}, tmp_path / "heads.safetensors")
    exported(tmp_path)
    model = backbone_of()
    with torch.no_grad():
        model.norm.bias.fill_(3.0)
    exported(tmp_path, model)
    assert (create_backbone(str(tmp_path), input_size=64).norm.bias == 3).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "heads.safetensors",
                                                                "model.safetensors"]


def test_wrong_exports_are_refused_before_a_file_is_written(tmp_path) -> None:
    """A tensor of the training in the backbone, another size, weights that diverged."""
    extra = backbone_of()
    extra.mask_token = torch.nn.Parameter(torch.zeros(48))
    with pytest.raises(ValueError, match="1 tensors are not those of vit_tiny_patch16_224 .*mask_token"):
        exported(tmp_path / "x", extra)
    with pytest.raises(ValueError, match="built for 64 pixels, not 96"):
        exported(tmp_path / "x", backbone_of(), 96)
    other = backbone_of()
    other.recipe = {"architecture": "vit_tiny_patch16_224", "arguments": {**ARGUMENTS, "depth": 3}}
    with pytest.raises(ValueError, match=r"12 tensors .*blocks\.2\."):
        exported(tmp_path / "x", other)
    broken = backbone_of()
    with torch.no_grad():
        broken.norm.weight[0] = float("inf")
    with pytest.raises(ValueError, match=r"1 tensors hold NaN or infinity \(norm.weight"):
        exported(tmp_path / "x", broken)
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file, not a folder"):
        exported(tmp_path / "file")


def test_exporting_leaves_the_random_numbers_alone(tmp_path) -> None:
    """A training that exports goes on as one that does not."""
    model = backbone_of()
    state = torch.get_rng_state()
    exported(tmp_path, model)
    assert torch.equal(torch.get_rng_state(), state)


def test_rates_of_dropout_stay_with_the_training() -> None:
    """And nothing in a folder makes timm read other files."""
    assert architecture_arguments({"depth": 2, "drop_rate": 0.1, "drop_path_rate": 0.1, "attn_drop_rate": 0.1,
                                   "drop_block_rate": 0.1, "num_classes": 3, "checkpoint_path": "/x", "pretrained": 1,
                                   "init_values": 0.1}) == {"depth": 2, "init_values": 0.1}


# ------------------------------------------------------------------------------------------------------------ reading

def test_names_of_a_folder(tmp_path, whole, monkeypatch) -> None:
    """With timm's prefix, its files, relative, a bare word, from the home folder."""
    folder = Path(shutil.copytree(whole, tmp_path / "teacher"))
    assert find_exported(str(folder)) == find_exported(f"local-dir:{folder}") == folder
    assert find_exported(str(folder / "model.safetensors")) == folder / "model.safetensors"
    assert find_exported(str(folder / "config.json")) == folder
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_exported("teacher") == find_exported("./teacher") == Path("teacher")
    assert find_exported("~/teacher") == folder
    (tmp_path / "resnet18").mkdir()
    assert find_exported("resnet18") is None and find_exported("student") is None


def test_the_file_that_is_named_is_the_one_that_is_read(tmp_path) -> None:
    """Another file of the folder, e.g. of an earlier epoch."""
    folder = exported(tmp_path)
    state = load_file(folder / "model.safetensors")
    save_file({**state, "norm.bias": torch.full((48,), 5.0)}, folder / "epoch3.safetensors")
    assert (create_backbone(str(folder / "epoch3.safetensors"), input_size=64).norm.bias == 5).all()
    assert read_exported(folder).weights == folder / "model.safetensors"


@pytest.mark.parametrize("safe", [True, False])
def test_a_folder_of_timm(tmp_path, safe: bool, one_thread) -> None:
    """Written by save_for_hf with a classifier, safetensors or pytorch_model.bin; its head is left out."""
    torch.manual_seed(2)
    source = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=2, img_size=64, drop_path_rate=0.3)
    timm.models.save_for_hf(source, tmp_path, safe_serialization=safe,
                            model_args={"depth": 2, "img_size": 64, "drop_path_rate": 0.3})
    images = torch.randn(2, 3, 64, 64)
    backbone = create_backbone(str(tmp_path), input_size=64)
    with torch.inference_mode():
        want = source.eval().forward_head(source.forward_features(images), pre_logits=True)
        torch.testing.assert_close(backbone(images), want, atol=1e-6, rtol=1e-6)
    assert Path(backbone.provenance.file).name == ("model.safetensors" if safe else "pytorch_model.bin")
    assert set(backbone.provenance.report.unexpected) == {"head.weight", "head.bias"}
    assert backbone.provenance.data_config["mean"] == [0.5, 0.5, 0.5]
    assert {"drop_path_rate", "num_classes"}.isdisjoint(backbone.recipe["arguments"])


def test_older_config_without_parts(tmp_path) -> None:
    """timm once kept all in one object; what is left out has timm's default, not the architecture's."""
    folder = tmp_path
    (folder / "config.json").write_text(json.dumps({
        "architecture": "vit_tiny_patch16_224", "num_classes": 0, "input_size": [3, 64, 64], "crop_pct": 0.75,
        "fixed_input_size": True, "mean": [0.5, 0.4, 0.3]}))
    found = read_exported(folder)
    assert found.size == 64 and found.arguments == {"img_size": 64}
    assert found.evaluation == {"mean": [0.5, 0.4, 0.3], "std": (0.229, 0.224, 0.225), "crop_pct": 0.75,
                                "crop_mode": "center", "interpolation": "bicubic"}


def test_size_of_the_stored_arguments_wins(tmp_path) -> None:
    """They built the tensors; input_size may be of the architecture's first weights."""
    folder = exported(tmp_path, model_args={**ARGUMENTS, "img_size": [64, 64]})
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["input_size"] = [3, 224, 224]
    (folder / "config.json").write_text(json.dumps(config))
    assert read_exported(folder).size == 64 and read_exported(folder).arguments["img_size"] == 64


def test_positions_at_another_size(tmp_path) -> None:
    """Resampled like those of any file, everything else as stored."""
    model = backbone_of()
    backbone = create_backbone(str(exported(tmp_path, model)), input_size=96)
    want = resample_abs_positions(model.pos_embed.detach(), (6, 6), 1)
    assert torch.equal(backbone.pos_embed, want) and backbone.provenance.report.resampled == ("pos_embed",)
    assert backbone.provenance.data_config["input_size"] == [3, 96, 96]
    assert backbone.recipe["arguments"] == {**ARGUMENTS, "img_size": 96}
    assert torch.equal(backbone.blocks[1].attn.qkv.weight, model.blocks[1].attn.qkv.weight)


def test_other_weights_and_none(tmp_path) -> None:
    """A checkpoint beside the name, an untrained baseline, a folder that lost its tensors."""
    folder, model = exported(tmp_path / "a"), backbone_of()
    other = tmp_path / "other.pth"
    torch.save({"teacher": {f"backbone.{key}": value + 1 for key, value in model.state_dict().items()}}, other)
    read = create_backbone(str(folder), other, input_size=64)
    assert torch.equal(read.norm.bias, model.norm.bias + 1) and read.provenance.file == str(other)
    random = create_backbone(str(folder), "random", input_size=64, seed=4)
    assert len(random.blocks) == 2 and random.provenance.weights == "random"
    assert not torch.equal(random.norm.bias, model.norm.bias)
    (folder / "model.safetensors").unlink()
    assert create_backbone(str(folder), "random", input_size=64).num_features == 48
    with pytest.raises(UserError, match="has config.json but no model.safetensors"):
        create_backbone(str(folder), input_size=64)


def test_options_of_the_user_win(tmp_path) -> None:
    """Over those of the folder; the pretrained norm moves with the pooling."""
    model = backbone_of(global_pool="avg")
    backbone = create_backbone(str(exported(tmp_path, model)), input_size=64,
                               options={"global_pool": "token", "drop_path_rate": 0.3})
    assert torch.equal(backbone.norm.bias, model.fc_norm.bias)
    assert backbone.recipe["arguments"] == {**ARGUMENTS, "global_pool": "token", "drop_path_rate": 0.3}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An exported folder, to be copied."""
    return exported(tmp_path_factory.mktemp("whole"))


def change(**cfg):
    """A change of pretrained_cfg."""
    def write(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["pretrained_cfg"].update(cfg)
        (folder / "config.json").write_text(json.dumps(config))
    return write


def put(text: str | bytes | None = None, file: str = "config.json", **keys):
    """Another file, or other keys of config.json."""
    def write(folder: Path) -> None:
        if text is not None:
            (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
        if keys:
            config = {**json.loads((folder / "config.json").read_text()), **keys}
            (folder / "config.json").write_text(json.dumps(config))
    return write


DAMAGED = {
    "cut json": (put('{"architecture": "vit_ti'), "config.json is damaged or not JSON"),
    "binary": (put(b"\xff\xfe\x00"), "config.json is damaged"),
    "a list": (put("[1]"), "is not timm's .no 'architecture'.*--pretrained_checkpoint FILE"),
    "of transformers": (put('{"architectures": ["Dinov2Model"]}'), "is not timm's"),
    "unknown architecture": (put(architecture="vit_of_tomorrow"), "has no model 'vit_of_tomorrow': update timm"),
    "parts are no objects": (put(model_args=[1]), "model_args and pretrained_cfg must be objects"),
    "grey images": (change(input_size=[1, 64, 64]), "takes 1 channels"),
    "grey arguments": (put(model_args={"in_chans": 1, "img_size": 64}), "takes 1 channels"),
    "not square": (put(model_args={**ARGUMENTS, "img_size": [32, 128]}), "images of 32 x 128 pixels"),
    "no size": (put(model_args={**ARGUMENTS, "img_size": "big"}), "are not the size of an image"),
    "size zero": (put(model_args={**ARGUMENTS, "img_size": 0}), "are not the size of an image"),
    "mean of one": (change(mean=[0.5]), r"mean of pretrained_cfg is \[0.5\]"),
    "mean of words": (change(mean=["a", 0, 0]), "mean of pretrained_cfg"),
    "std zero": (change(std=[0.2, 0, 0.2]), "std of pretrained_cfg"),
    "crop_pct": (change(crop_pct=1.5), "crop_pct of pretrained_cfg is 1.5"),
    "crop_mode": (change(crop_mode="corner"), "crop_mode of pretrained_cfg is 'corner'"),
    "interpolation": (change(interpolation=3), "interpolation of pretrained_cfg is 3"),
    "argument of no model": (put(model_args={**ARGUMENTS, "colour": 1}), "config.json: timm .* cannot build vit_tiny.*"
                             "does not take colour"),
    "argument of another kind": (put(model_args={**ARGUMENTS, "depth": "two"}), "config.json: timm .* cannot build "
                                 "vit_tiny"),
    "argument of other models": (put(architecture="resnet18", model_args={"init_values": 0.1}), "config.json: timm .* "
                                 "does not take init_values"),
    "other tensors": (put(model_args={**ARGUMENTS, "depth": 3}), "does not fit: this looks like.*missing: 12"),
    "fewer blocks": (put(model_args={**ARGUMENTS, "depth": 1}), "a deeper network of the same widths"),
    "cut tensors": (put(b"12345678", file="model.safetensors"), "damaged or not a safetensors file"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_folders(tmp_path, whole, case: str) -> None:
    """A message that says what is wrong with which file; no option of the user's is asked back for it."""
    write, words = DAMAGED[case]
    write(Path(shutil.copytree(whole, tmp_path / "a")))
    with pytest.raises(UserError) as error:
        create_backbone(str(tmp_path / "a"), input_size=64)
    assert not isinstance(error.value, OptionError)
    assert re.search(words, str(error.value), re.S), str(error.value)


def test_an_argument_that_the_user_asked_for_is_the_users(tmp_path) -> None:
    """--attn_drop_rate is not blamed on the folder."""
    model = create_backbone("timm:resnet18", "random", input_size=64)
    with pytest.raises(UserError, match="--model resnet18 does not take attn_drop_rate"):
        create_backbone(str(exported(tmp_path, model)), input_size=64, options={"attn_drop_rate": 0.1})


def test_paths_without_a_model(tmp_path, whole) -> None:
    """What is there, and what to type."""
    shutil.copytree(whole, tmp_path / "run" / "teacher")
    save_file({"a": torch.ones(1)}, tmp_path / "run" / "alone.safetensors")
    cases = {"run": "that folder has no config.json.*did you mean .*run/teacher", "no/such": "there is no such folder",
             "run/alone.safetensors": "is a file without config.json beside it.*--pretrained_checkpoint FILE"}
    for path, words in cases.items():
        with pytest.raises(UserError, match=words):
            create_backbone(str(tmp_path / path))
    for name in ("local-dir:teacher", "owner/name", "model.safetensors"):
        with pytest.raises(UserError, match=f"--model {name}.*hf-hub:OWNER/NAME"):
            create_backbone(name)
