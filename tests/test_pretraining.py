"""The parts of a pretraining that take files: images that judge the teacher, the backbone's patches, prototypes."""

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from furnace import pretraining
from furnace.command_line import parse
from furnace.data.images import load_rgb
from furnace.data.pretraining_data import PretrainingData, read_pretraining
from furnace.data.transforms import build_transform
from furnace.models.prototypes import project, random_vectors, text_vectors
from furnace.pretraining import build_backbone, build_model, keep_vectors, label_vectors, patch_size_of, read_held_out
from furnace.pretraining_arguments import pretraining_parser, settle_options
from furnace.pretraining_options import PretrainingOptions
from furnace.runtime.files import UserError
from helpers import draw_images, write_csv

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "tumour", "melanoma", "nevus", "acne"]
ONTOLOGY = ("id,name,synonyms,parent,sources", "tumour,tumour,,,ham", "mel,melanoma,,tumour,ham",
            "nv,nevus,,tumour,ham", "acne,acne,,,fitz")  # classes 0 to 3
WIDTH = 64  # of timm:test_vit
UNIT = {"rtol": 1e-5, "atol": 1e-6}

pytestmark = pytest.mark.usefixtures("one_thread")


def options_of(*words: object) -> PretrainingOptions:
    """Of a tiny model."""
    usual = ["--data_csv", "x.csv", "--model", "timm:test_vit", "--pretrained_checkpoint", "random",
             "--global_crops_size", 32, "--local_crops_size", 16, "--head_n_prototypes", 16, "--head_hidden_dim", 8,
             "--head_bottleneck_dim", 4, "--num_workers", 0, "--device", "cpu", "--batch_size", 3]
    args = parse(pretraining_parser(), [str(word) for word in (*usual, *words)])
    settle_options(args)
    return PretrainingOptions(**{field.name: getattr(args, field.name)
                                 for field in dataclasses.fields(PretrainingOptions)})


@pytest.fixture
def data(tmp_path: Path) -> PretrainingData:
    """Eight images of ham, six with labels, none of acne."""
    draw_images(tmp_path, [f"{i}.png" for i in range(8)])
    (tmp_path / "o.csv").write_text("\n".join(ONTOLOGY) + "\n")
    csv = write_csv(tmp_path / "list.csv", image=[f"{i}.png" for i in range(8)], source=["ham"] * 8,
                    labels=["mel", "nv", "", "nv", "mel", "nv", "", "tumour"])
    return read_pretraining(csv, ontology=tmp_path / "o.csv")


# ------------------------------------------------------------------------------------------------------ images to judge

def held_out(folder: Path, train: PretrainingData, **columns: list):
    names = [f"e{i}.png" for i in range(len(columns["split"]))]
    draw_images(folder, names)
    return read_held_out(write_csv(folder / "eval.csv", **{"image": names, **columns}), None, train.manifest, seed=0)


def test_gallery_and_queries(tmp_path, data, caplog) -> None:
    """Val among train; test stays out of it, and needs no labels then."""
    found = held_out(tmp_path, data, split=["train", "val", "train", "test", "val"], label=[1, 0, 4, None, 2])
    assert found.gallery.filenames == ["e0.png", "e2.png"] and found.queries.filenames == ["e1.png", "e4.png"]
    assert found.gallery.labels.tolist() == [1, 4] and found.queries.labels.tolist() == [0, 2] and found.classes == 5
    assert "judge the teacher" not in caplog.text


def test_test_where_there_is_no_val(tmp_path, data) -> None:
    found = held_out(tmp_path, data, split=["train", "test", "test"], label=[0, 3, 1])
    assert found.queries.filenames == ["e1.png", "e2.png"] and found.classes == 4


@pytest.mark.parametrize("columns, why", [
    ({"split": ["val", "test"], "label": [0, 1]}, "needs rows of the split train and rows of val"),
    ({"split": ["train", "train"], "label": [0, 1]}, "needs rows of the split train and rows of val"),
    ({"split": ["train", "val"], "label": [0, None]}, "every image of train and val needs a class number"),
    ({"split": ["train", "val"], "label": [None, 1]}, "every image of train and val needs a class number"),
    ({"split": ["train", "val"], "label": ["mel", "nv"]}, "every image of train and val needs a class number"),
    ({"split": ["train", "val"]}, "every image of train and val needs a class number")])
def test_nothing_to_judge_by(tmp_path, data, columns: dict, why: str) -> None:
    with pytest.raises(UserError, match=f"--eval_csv .*eval.csv:? {why}"):
        held_out(tmp_path, data, **columns)


def test_queries_among_the_training_images(tmp_path, data, caplog) -> None:
    """Counted by what the files are, not by how they are called; a gallery may well be of training images."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "link.png").symlink_to(tmp_path / "3.png")
    csv = write_csv(tmp_path / "eval.csv", image=["0.png", "1.png", "./5.png", "other/link.png", "other/own.png"],
                    label=[0, 1, 0, 1, 0], split=["train", "train", "val", "val", "val"])
    draw_images(tmp_path, ["other/own.png"], seed=4)
    read_held_out(csv, None, data.manifest, seed=0)
    assert "2 of the 3 images that judge the teacher (--eval_csv) are training images, too" in caplog.text


def test_root_of_the_images_to_judge(tmp_path, data) -> None:
    draw_images(tmp_path / "elsewhere", ["a.png", "b.png"])
    csv = write_csv(tmp_path / "eval.csv", image=["a.png", "b.png"], label=[0, 1], split=["train", "val"])
    found = read_held_out(csv, tmp_path / "elsewhere", data.manifest, seed=0)
    assert found.queries.path_of(0) == tmp_path / "elsewhere" / "b.png"
    with pytest.raises(UserError, match=r"a\.png"):
        read_held_out(csv, None, data.manifest, seed=0)


def test_without_a_list_some_training_images(data, monkeypatch) -> None:
    """All of a small set; else so many, drawn by the seed, none twice, in the set's order."""
    found = read_held_out(None, None, data.manifest, seed=0)
    assert found.gallery is None and found.queries.filenames == data.manifest.filenames
    monkeypatch.setattr(pretraining, "UNLABELLED_SAMPLE", 4)
    names = [read_held_out(None, None, data.manifest, seed=seed).queries.filenames for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2] and all(len(set(part)) == 4 and part == sorted(part) for part in names)


# ---------------------------------------------------------------------------------------------------------- the network

@pytest.mark.parametrize("flag, side, near", [("--global_crops_size", 40, 32), ("--global_crops_size", 47, 48),
                                              ("--local_crops_size", 20, 16), ("--local_crops_size", 98, 96)])
def test_crops_that_patches_do_not_divide(flag: str, side: int, near: int) -> None:
    """The nearest size is named, and taken."""
    with pytest.raises(UserError, match=f"{side}.*patch size.* 16|{side} is no multiple of the patch size 16: take"):
        build_backbone(options_of(flag, side))
    assert patch_size_of(build_backbone(options_of(flag, near))) == 16


@pytest.mark.parametrize("model, kind", [("timm:resnet18", "ResNet"), ("timm:test_convnext", "ConvNeXt")])
def test_networks_without_patches(model: str, kind: str) -> None:
    """What it is, and what would do."""
    with pytest.raises(UserError, match=f"--model {model} is a {kind}: .* e.g. timm:vit_small_patch16_224"):
        build_backbone(options_of("--model", model))


def test_arguments_of_the_backbone() -> None:
    """Patches and layer scale of an architecture that has others, or none; weights by the seed."""
    words = ("--model", "timm:vit_tiny_patch16_224", "--global_crops_size", 28, "--local_crops_size", 14)
    made = build_backbone(options_of(*words, "--patch_size", 14, "--layer_scale_init_value", 0.25))
    assert patch_size_of(made) == 14 and (made.blocks[3].ls1.gamma == 0.25).all()
    zero, again, one = (build_backbone(options_of("--seed", seed)).blocks[0].attn.qkv.weight for seed in (0, 0, 1))
    assert torch.equal(zero, again) and not torch.equal(zero, one)


def test_model() -> None:
    """Prototypes become the label head as they are; frozen unless told; none without labels."""
    vectors = random_vectors(5, WIDTH, seed=0)
    frozen = build_model(build_backbone(options_of()), vectors, options_of())
    torch.testing.assert_close(frozen.label_head.weight, vectors)
    assert not frozen.label_head.weight.requires_grad and not frozen.label_head.bias.requires_grad
    for mode in ("trainable", "warmup"):
        options = options_of("--prototype_mode", mode, "--label_temperature", 0.5)
        model = build_model(build_backbone(options), vectors, options)
        assert model.label_head.weight.requires_grad
        x = torch.randn(2, WIDTH)
        torch.testing.assert_close(model.label_head(x), 2 * torch.nn.functional.normalize(x) @ vectors.T)
    assert build_model(build_backbone(options_of()), None, options_of()).label_head is None


# ----------------------------------------------------------------------------------------------------------- prototypes

def vectors_of(folder: Path, data: PretrainingData, *words: object, run: str = "run") -> torch.Tensor | None:
    (folder / run).mkdir(exist_ok=True)
    options = options_of(*words)
    vectors = label_vectors(build_backbone(options), data, options, folder / run)
    if vectors is not None:
        keep_vectors(folder / run, vectors)
    return vectors


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A text encoder of width 12 that knows the classes' names."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "pad_token": "[PAD]"}')
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(VOCABULARY), hidden_size=12, num_hidden_layers=1, num_attention_heads=2,
                         intermediate_size=16, max_position_embeddings=40)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pooling", ["mean", "pooler"])
def test_text(tmp_path, data, bert, pooling: str) -> None:
    """The names' embeddings, brought to the backbone's width with all cosines kept."""
    found = vectors_of(tmp_path, data, "--prototypes", "text", "--text_encoder", bert, "--text_pooling", pooling)
    names = text_vectors(["tumour", "melanoma", "nevus", "acne"], encoder=str(bert), pooling=pooling)
    assert found.shape == (4, WIDTH)
    torch.testing.assert_close(found, project(names, WIDTH, seed=0), **UNIT)
    torch.testing.assert_close(found @ found.T, names @ names.T, **UNIT)


def test_orthogonal_and_random(tmp_path, data) -> None:
    """By the seed; more classes than dimensions cannot be orthogonal."""
    orthogonal = vectors_of(tmp_path, data, "--prototypes", "orthogonal")
    torch.testing.assert_close(orthogonal @ orthogonal.T, torch.eye(4), **UNIT)
    made = [vectors_of(tmp_path, data, "--prototypes", "random", "--seed", seed, run=f"r{i}")
            for i, seed in enumerate((0, 0, 1))]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    torch.testing.assert_close(made[0].norm(dim=1), torch.ones(4), **UNIT)


def test_file(tmp_path, data) -> None:
    """A row per class, of the backbone's width or another."""
    rows = np.random.default_rng(0).normal(size=(4, WIDTH)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    np.save(tmp_path / "rows.npy", rows)
    np.save(tmp_path / "wide.npy", np.pad(rows, ((0, 0), (0, 9))))
    found = vectors_of(tmp_path, data, "--prototypes", tmp_path / "rows.npy")
    torch.testing.assert_close(found, torch.from_numpy(rows), **UNIT)
    found = vectors_of(tmp_path, data, "--prototypes", tmp_path / "wide.npy", run="wide")
    torch.testing.assert_close(found @ found.T, torch.from_numpy(rows @ rows.T), **UNIT)
    np.save(tmp_path / "few.npy", rows[:3])
    with pytest.raises(UserError, match="few.npy"):
        vectors_of(tmp_path, data, "--prototypes", tmp_path / "few.npy", run="few")
    assert not list((tmp_path / "few").iterdir())


def test_class_mean(tmp_path, data, caplog) -> None:
    """Mean feature of the images that show the class or one below it, centred; a class of none is random."""
    with caplog.at_level(logging.WARNING):
        found = vectors_of(tmp_path, data, "--prototypes", "class_mean")
    backbone = build_backbone(options_of())
    transform = build_transform(backbone)
    with torch.inference_mode():
        features = backbone(torch.stack([transform(load_rgb(data.manifest.path_of(i))) for i in range(8)]))
    means = torch.stack([features[members].mean(0) for members in ([0, 1, 3, 4, 5, 7], [0, 4], [1, 3, 5])])
    wanted = torch.nn.functional.normalize(means - means.mean(0))  # ham has no acne: that is unknown, and no class here
    torch.testing.assert_close(found[:3], wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[3], random_vectors(4, WIDTH, seed=0)[3], **UNIT)
    assert "1 of 4 classes have no image of their own: their prototypes are random" in caplog.text


def test_class_mean_of_nothing(tmp_path, data) -> None:
    csv = write_csv(tmp_path / "bare.csv", image=["0.png", "1.png"], labels=["", ""], source=["ham", "ham"])
    bare = read_pretraining(csv, ontology=tmp_path / "o.csv")
    with pytest.raises(UserError, match="--prototypes class_mean needs labelled images: take --prototypes text"):
        vectors_of(tmp_path, bare, "--prototypes", "class_mean")


def test_kept_in_the_run(tmp_path, data, bert, monkeypatch) -> None:
    """Made once: a run that goes on reads its file, whatever has become of the encoder since."""
    words = ("--prototypes", "text", "--text_encoder", bert)
    first = vectors_of(tmp_path, data, *words)
    stored = load_file(tmp_path / "run" / "prototypes.safetensors")
    assert list(stored) == ["prototypes"] and torch.equal(stored["prototypes"], first)
    monkeypatch.setattr(pretraining, "text_vectors", lambda *given, **named: pytest.fail("computed again"))
    torch.testing.assert_close(vectors_of(tmp_path, data, *words), first, **UNIT)


def test_without_an_ontology(tmp_path, data) -> None:
    plain = PretrainingData(data.manifest, None, None)
    assert vectors_of(tmp_path, plain) is None and not list((tmp_path / "run").iterdir())
