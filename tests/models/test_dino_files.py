"""Heads in files: DermINO's layout, ours, an exported folder; what is taken over, what is left; the round trip."""

import json
import logging
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from furnace.models import create_backbone
from furnace.models.dino import DinoModel, create_dino
from furnace.models.dino_files import export_teacher, load_heads, read_heads
from furnace.models.prototypes import PrototypeHead, random_vectors

NAME = "timm:vit_tiny_patch16_224"
TINY = {"patch_size": 14, "embed_dim": 24, "depth": 2, "num_heads": 2, "init_values": 0.1}
SIZES = {"prototypes": 16, "hidden": 20, "bottleneck": 8}
PARTS = ["mask_token", "dino_head", "ibot_head"]

pytestmark = pytest.mark.usefixtures("one_thread")


def teacher_state(teacher: DinoModel) -> dict[str, torch.Tensor]:
    """The teacher's tensors by DermINO's names: mask token inside the backbone."""
    return {("backbone.mask_token" if key == "mask_token" else key): value
            for key, value in teacher.state_dict().items()}


def backbone_of(checkpoint: str | Path = "random", name: str = NAME, seed: int = 0, size: int = 28) -> torch.nn.Module:
    return create_backbone(name, checkpoint, input_size=size, options=TINY if name == NAME else None, seed=seed)


def model_of(backbone: torch.nn.Module | None = None, *, seed: int = 0, classes: int = 3, **sizes: int) -> DinoModel:
    """Every tensor of each seed its own."""
    backbone = backbone or backbone_of(seed=seed)
    head = PrototypeHead(random_vectors(classes, 24, seed=seed), trainable=True, temperature=None)
    model = create_dino(backbone, name=NAME, **{**SIZES, **sizes}, label_head=head, seed=seed)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("backbone."):
                parameter.copy_(torch.randn(parameter.shape, generator=random))
    return model


def heads_of(model: DinoModel, *parts: str) -> dict[str, torch.Tensor]:
    parts = parts or ("mask_token", "dino_head", "ibot_head", "label_head")
    return {key: value for key, value in model.state_dict().items() if key.split(".")[0] in parts}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


# ---------------------------------------------------------------------------------------------------------- checkpoints

def published(model: DinoModel, before: str = "") -> dict[str, dict[str, torch.Tensor]]:
    """teacher_checkpoint.pth of DermINO: one dictionary, the mask token inside the backbone."""
    return {"teacher": {before + key: value for key, value in teacher_state(model).items()}}


LAYOUTS = {"DermINO": published, "DermINO, DDP": lambda model: published(model, "module."),
           "compiled": lambda model: published(model, "_orig_mod."),
           "checkpoint-best": lambda model: {"model": model.state_dict(), "epoch": 3, "meta": {"method": "x"}},
           "flat": lambda model: model.state_dict(),
           "bare heads": lambda model: {**model.backbone.state_dict(), **heads_of(model)}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_backbone_and_heads_come_from_one_file(tmp_path, layout: str, caplog) -> None:
    """Whatever stands before the names; the label head stays, its classes are the ontology's."""
    source = model_of(seed=3)
    torch.save(LAYOUTS[layout](source), tmp_path / "start.pth")
    backbone = backbone_of(tmp_path / "start.pth")
    assert same(backbone.state_dict(), source.backbone.state_dict())
    state = read_heads(backbone.provenance)
    assert same(state, heads_of(source))
    model = model_of(backbone)
    label = {key: value.clone() for key, value in heads_of(model, "label_head").items()}
    with caplog.at_level(logging.INFO):
        assert load_heads(model, state, source="start.pth") == PARTS
    assert same(heads_of(model, *PARTS), heads_of(source, *PARTS))
    assert same(heads_of(model, "label_head"), label) and not same(label, heads_of(source, "label_head"))
    assert "heads from start.pth: mask_token, dino_head, ibot_head" in caplog.text
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        torch.testing.assert_close(model.eval().targets(images.expand(2, 2, 3, 28, 28), torch.ones(2, 2, 4).bool()),
                                   source.eval().targets(images.expand(2, 2, 3, 28, 28), torch.ones(2, 2, 4).bool()))


def test_names_of_the_published_file() -> None:
    """backbone.mask_token beside backbone.*, dino_head.*, ibot_head.*, all tensors, none twice."""
    model = model_of()
    state = teacher_state(model)
    assert len(state) == len(model.state_dict()) and "mask_token" not in state
    assert torch.equal(state["backbone.mask_token"], model.mask_token)
    assert {key.split(".")[0] for key in state} == {"backbone", "dino_head", "ibot_head", "label_head"}


def test_files_without_heads(tmp_path, caplog) -> None:
    """A plain backbone, another network's decoder, random weights: nothing is taken, and nothing is said."""
    source = model_of(seed=3)
    torch.save(source.backbone.state_dict(), tmp_path / "plain.pth")
    torch.save({**source.backbone.state_dict(), "decoder.weight": torch.ones(3), "head.weight": torch.ones(2, 24)},
               tmp_path / "other.pth")
    for checkpoint in ("random", tmp_path / "plain.pth", tmp_path / "other.pth"):
        provenance = backbone_of(checkpoint).provenance
        model = model_of()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        caplog.clear()
        assert read_heads(provenance) == {} and load_heads(model, {}, source="x") == []
        assert same(model.state_dict(), before) and "heads" not in caplog.text


def test_heads_of_something_else_are_not_taken(tmp_path) -> None:
    """A student's, or an optimiser's, tensors in the same file have the same ends of names."""
    source = model_of(seed=3)
    torch.save({**source.backbone.state_dict(), **{f"student.{key}": value for key, value in heads_of(source).items()}},
               tmp_path / "x.pth")
    assert read_heads(backbone_of(tmp_path / "x.pth").provenance) == {}


# ---------------------------------------------------------------------------------------------------- what does not fit

@pytest.mark.parametrize("sizes", [{"prototypes": 15}, {"hidden": 21}, {"bottleneck": 9}])
def test_heads_of_other_sizes(sizes: dict, caplog) -> None:
    """Both start at random as a whole, with a warning that names the options; the mask token is taken."""
    source, model = model_of(seed=3, **sizes), model_of()
    before = {key: value.clone() for key, value in heads_of(model, "dino_head", "ibot_head").items()}
    assert load_heads(model, heads_of(source), source="there.pth") == ["mask_token"]
    assert same(heads_of(model, "dino_head", "ibot_head"), before) and torch.equal(model.mask_token, source.mask_token)
    assert "dino_head and ibot_head in there.pth: of other sizes than asked for (--head_n_prototypes, " in caplog.text
    assert "--head_hidden_dim, --head_bottleneck_dim), incomplete, or not finite; they start afresh" in caplog.text


def test_half_a_head(caplog) -> None:
    """A tensor is missing, or holds NaN: that head is left as a whole, the other is taken."""
    source, model = model_of(seed=3), model_of()
    before = {key: value.clone() for key, value in heads_of(model, "ibot_head").items()}
    state = heads_of(source)
    for damage in ("missing", "nan"):
        state = dict(heads_of(source))
        if damage == "missing":
            del state["ibot_head.mlp.2.bias"]
        else:
            state["ibot_head.mlp.2.bias"] = torch.full((20,), torch.nan)
        caplog.clear()
        assert load_heads(model, state, source="there.pth") == ["mask_token", "dino_head"]
        assert same(heads_of(model, "ibot_head"), before)
        assert same(heads_of(model, "dino_head"), heads_of(source, "dino_head"))
        assert caplog.text.count("ibot_head in there.pth") == 1 and "dino_head and" not in caplog.text


def test_a_file_with_one_head(caplog) -> None:
    """Of what is not there nothing is said."""
    source, model = model_of(seed=3), model_of()
    assert load_heads(model, heads_of(source, "dino_head"), source="x") == ["dino_head"]
    assert not any(record.levelno >= logging.WARNING for record in caplog.records)


# --------------------------------------------------------------------------------------------------------------- export

def test_exported_folder(tmp_path) -> None:
    """Ours and timm's loader give the backbone's features; the heads lie beside, bit for bit; about is kept."""
    model = model_of(seed=3).eval()
    export_teacher(tmp_path / "teacher", model, input_size=28, about={"updates": 7, "finished": False})
    assert sorted(path.name for path in (tmp_path / "teacher").iterdir()) == [
        "config.json", "heads.safetensors", "model.safetensors"]
    assert same(load_file(tmp_path / "teacher" / "heads.safetensors"), heads_of(model))
    assert same(load_file(tmp_path / "teacher" / "model.safetensors"), model.backbone.state_dict())
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    assert config["furnace"] == {"updates": 7, "finished": False}
    assert config["pretrained_cfg"]["mean"] == list(model.backbone.provenance.data_config["mean"])
    images = torch.randn(2, 3, 28, 28)
    with torch.inference_mode():
        wanted = model.backbone(images)
        assert torch.equal(create_backbone(str(tmp_path / "teacher"), input_size=28).eval()(images), wanted)
        theirs = timm.create_model(f"local-dir:{tmp_path / 'teacher'}", pretrained=True, num_classes=0).eval()
        assert torch.equal(theirs(images), wanted)


@pytest.mark.parametrize("how", ["folder", "file", "local-dir"])
def test_a_run_goes_on_from_the_folder(tmp_path, how: str) -> None:
    """As --model in each of its forms: backbone and heads; also at another size of crops."""
    source = model_of(seed=3)
    folder = tmp_path / "teacher"
    export_teacher(folder, source, input_size=28, about={})
    name = {"folder": str(folder), "file": str(folder / "model.safetensors"), "local-dir": f"local-dir:{folder}"}[how]
    for size in (28, 56):
        backbone = backbone_of(None, name=name, size=size)
        assert same(read_heads(backbone.provenance), heads_of(source))
        assert torch.equal(backbone.cls_token, source.backbone.cls_token)
    fresh = backbone_of("random", name=name)
    assert read_heads(fresh.provenance) == {}, "--pretrained_checkpoint random is random as a whole"


def test_heads_beside_another_file_are_not_taken(tmp_path) -> None:
    """A .pth in the folder has its own heads or none; heads.safetensors belongs to model.safetensors."""
    source, other = model_of(seed=3), model_of(seed=4)
    export_teacher(tmp_path / "teacher", source, input_size=28, about={})
    torch.save(other.backbone.state_dict(), tmp_path / "teacher" / "other.pth")
    assert read_heads(backbone_of(tmp_path / "teacher" / "other.pth").provenance) == {}
    torch.save(published(other), tmp_path / "teacher" / "both.pth")
    assert same(read_heads(backbone_of(tmp_path / "teacher" / "both.pth").provenance), heads_of(other))


def test_export_replaces_an_older_one(tmp_path) -> None:
    """Of a paused run: all three files are the later teacher's; a folder from elsewhere without heads has none."""
    for seed in (3, 4):
        export_teacher(tmp_path / "teacher", model_of(seed=seed), input_size=28, about={"updates": seed})
    backbone = backbone_of(None, name=str(tmp_path / "teacher"))
    later = model_of(seed=4)
    assert same(backbone.state_dict(), later.backbone.state_dict())
    assert same(read_heads(backbone.provenance), heads_of(later))
    (tmp_path / "teacher" / "heads.safetensors").unlink()
    assert read_heads(backbone_of(None, name=str(tmp_path / "teacher")).provenance) == {}
    save_file({"weight": torch.ones(2)}, tmp_path / "teacher" / "heads.safetensors")
    assert read_heads(backbone_of(None, name=str(tmp_path / "teacher")).provenance) == {}


def test_export_without_labels_and_on_another_layout(tmp_path) -> None:
    """No label head, no key of one; tensors that are not contiguous are written as they are read."""
    model = create_dino(backbone_of(seed=3), name=NAME, **SIZES, seed=3)
    weight = model.dino_head.mlp[0].weight
    weight.data = torch.randn(24, 20).T  # (20, 24), not contiguous
    export_teacher(tmp_path / "t", model, input_size=28, about={})
    heads = load_file(tmp_path / "t" / "heads.safetensors")
    assert not any(key.startswith("label_head") for key in heads)
    assert torch.equal(heads["dino_head.mlp.0.weight"], weight)
