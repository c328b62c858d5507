"""The pretraining step against a slow computation of its own, I10, I12, where gradients go, and the judge."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import expit, log_softmax, softmax
from scipy.stats import entropy
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

from furnace.data.images import load_rgb
from furnace.data.multicrop import MultiCropBatch
from furnace.data.transforms import build_transform
from furnace.data.unlabelled import read_images
from furnace.engine_for_pretraining import make_evaluate, make_step
from furnace.models import create_backbone
from furnace.models.dino import DinoModel, create_dino
from furnace.models.prototypes import PrototypeHead, random_vectors
from furnace.pretraining_results import collapse_warning
from furnace.runtime.files import ProcessError, UserError
from helpers import draw_images, write_csv

CPU = torch.device("cpu")
TINY = {"patch_size": 7, "embed_dim": 24, "depth": 2, "num_heads": 2, "init_values": 0.1}
NAME = "timm:vit_tiny_patch16_224"
IMAGES, CLASSES, LOCALS = 5, 3, 2
VALUES = {"teacher_temperature": 0.06, "dino_weight": 0.9, "ibot_weight": 0.7, "koleo_weight": 0.2,
          "label_weight": 1.3}

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(*, seed: int = 0, labels: bool = True, drop_path: float = 0.0) -> DinoModel:
    """28 px, 16 patches; weights so large that images, views and patches differ much."""
    backbone = create_backbone(NAME, "random", input_size=28, options=TINY, seed=seed)
    head = PrototypeHead(random_vectors(CLASSES, 24, seed=1), trainable=True, temperature=None) if labels else None
    model = create_dino(backbone, name=NAME, prototypes=16, hidden=20, bottleneck=8, label_head=head,
                        drop_path=drop_path, seed=seed)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not name.startswith("label_head.") and not name.endswith("weight_g"):
                parameter.normal_(0, 1 / math.sqrt(parameter[0].numel()), generator=random)
    return model


def batch_of(*, seed: int = 0, local: bool = True, labels: bool = True, images: int = IMAGES) -> MultiCropBatch:
    """Noise; a crop of each view has no mask, image 1 no label."""
    random = torch.Generator().manual_seed(seed)
    masks = torch.rand(2, images, 16, generator=random) < 0.4
    masks[0, 2] = masks[1, 0] = False
    known = torch.rand(images, CLASSES, generator=random) < 0.7
    known[:, 0], known[1] = True, False
    targets = (torch.rand(images, CLASSES, generator=random) < 0.5).float()
    return MultiCropBatch(
        globals=torch.randn(2, images, 3, 28, 28, generator=random),
        locals=torch.randn(LOCALS, images, 3, 14, 14, generator=random) if local else None, masks=masks,
        targets=targets if labels else None, known=known if labels else None, indices=list(range(images)), broken=[])


def step_of(model: DinoModel, teacher: DinoModel, batch: MultiCropBatch, **values: float
            ) -> tuple[torch.Tensor, float, dict[str, float]]:
    given = {name: value for name, value in {**VALUES, **values}.items()
             if name != "label_weight" or model.label_head is not None}
    return make_step(None, lambda: teacher, device=CPU)(model, batch, given)


# -------------------------------------------------------------------------------------------------------- another way

def assigned(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Sinkhorn-Knopp as its paper writes it, with a matrix that sums to 1; rows (samples) sum to 1 at the end."""
    q = np.exp((logits - logits.max()) / temperature)
    q /= q.sum()
    for _ in range(3):
        q /= q.sum(axis=0, keepdims=True) * q.shape[1]
        q /= q.sum(axis=1, keepdims=True) * q.shape[0]
    return q * len(q)


def slow_parts(model: DinoModel, teacher: DinoModel, batch: MultiCropBatch, temperature: float = 0.06, *,
               same_view: bool = False) -> dict[str, float]:
    """Every part, image by image and patch by patch, from the networks' tokens.

    ``same_view`` is how it must not be: a global crop of the student with the teacher's assignment of that very crop.
    """
    def numbers(x: torch.Tensor) -> np.ndarray:
        return x.detach().double().numpy()

    views, images = batch.globals.shape[:2]
    with torch.no_grad():
        seen = [teacher.tokens(batch.globals[v]) for v in range(views)]
        whole = [numbers(teacher.dino_head(tokens[:, 0])) for tokens in seen]
        mine = [model.tokens(batch.globals[v], batch.masks[v]) for v in range(views)]
        small = [] if batch.locals is None else [model.tokens(crop) for crop in batch.locals]
        student = [numbers(model.dino_head(tokens[:, 0])) for tokens in mine + small]
        patches = [[numbers(net.ibot_head(tokens[v][i, 1:])) for v in range(views) for i in range(images)]
                   for net, tokens in ((teacher, seen), (model, mine))]
    targets = assigned(np.concatenate(whole), temperature).reshape(views, images, -1)
    terms = [-(targets[t][i] * log_softmax(student[s][i] / 0.1)).sum()
             for t in range(views) for s in range(len(student))
             if s >= views or (s == t) == same_view for i in range(images)]
    flat = batch.masks.flatten(0, 1).numpy()
    places = [(crop, patch) for crop in range(views * images) for patch in range(16) if flat[crop, patch]]
    wanted = assigned(np.stack([patches[0][crop][patch] for crop, patch in places]), temperature)
    ibot = 0.0
    for (crop, patch), row in zip(places, wanted, strict=True):
        ibot -= (row * log_softmax(patches[1][crop][patch] / 0.1)).sum() / flat[crop].sum()
    koleo = 0.0
    for tokens in mine:
        x = numbers(tokens[:, 0])
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        koleo -= np.mean([math.log(min(np.linalg.norm(x[i] - x[j]) for j in range(images) if j != i))
                          for i in range(images)])
    parts = {"dino": float(np.mean(terms)), "ibot": ibot / (views * images), "koleo": koleo}
    if model.label_head is not None:
        losses = []
        for tokens in mine:
            p = expit(numbers(tokens[:, 0]) @ numbers(model.label_head.weight).T + numbers(model.label_head.bias))
            for i in range(images):
                k, y = batch.known[i].numpy(), batch.targets[i].numpy()
                if k.any():
                    losses.append(-np.mean(np.log(np.where(y == 1, p[i], 1 - p[i])[k])))
        parts["label"] = float(np.mean(losses)) if losses else 0.0
    return parts


@pytest.mark.parametrize("local", [True, False], ids=["local crops", "none"])
@pytest.mark.parametrize("labels", [True, False], ids=["labels", "without"])
def test_step(local: bool, labels: bool) -> None:
    """I12: each part is its weight times the slow computation, the loss their sum times the images."""
    model, teacher, batch = tiny(labels=labels), tiny(seed=5, labels=labels), batch_of(local=local, labels=labels)
    loss, images, logs = step_of(model, teacher, batch)
    wanted = {name: VALUES[f"{name}_weight"] * part
              for name, part in slow_parts(model, teacher, batch, VALUES["teacher_temperature"]).items()}
    assert images == IMAGES and len(wanted) == 3 + labels and all(abs(value) > 1e-3 for value in wanted.values())
    assert {name: logs[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)
    assert float(loss.detach()) / images == pytest.approx(sum(wanted.values()), rel=1e-4)
    assert sum(logs[name] for name in wanted) == pytest.approx(float(loss.detach()) / images, rel=1e-6)


def test_views_are_swapped() -> None:
    """The student's view 1 learns the teacher's view 2: another number than with its own."""
    model, teacher, batch = tiny(), tiny(seed=5), batch_of(local=False)
    swapped, same = (0.9 * slow_parts(model, teacher, batch, same_view=same)["dino"] for same in (False, True))
    found = step_of(model, teacher, batch)[2]["dino"]
    assert abs(swapped / same - 1) > 0.01 and found == pytest.approx(swapped, rel=1e-4)


def test_temperature_and_entropies_are_the_teachers() -> None:
    """Those of the softmax of its logits for the whole global crops, in units of ln K."""
    model, teacher, batch = tiny(), tiny(seed=5), batch_of()
    found = []
    for temperature in (0.04, 0.5):
        logs = step_of(model, teacher, batch, teacher_temperature=temperature)[2]
        with torch.no_grad():
            logits = teacher.dino_head(teacher.tokens(batch.globals.flatten(0, 1))[:, 0]).double().numpy()
        p = softmax(logits / temperature, axis=1)
        wanted = {"assignment": entropy(p, base=16, axis=1).mean(), "marginal": entropy(p.mean(0), base=16)}
        assert {name: logs[f"teacher_{name}_entropy"] for name in wanted} == pytest.approx(wanted, rel=1e-5)
        assert logs["dino"] == pytest.approx(0.9 * slow_parts(model, teacher, batch, temperature)["dino"], rel=1e-4)
        found.append(logs["dino"])
    assert abs(found[0] - found[1]) > 1e-3


# --------------------------------------------------------------------------------------------------------------- labels

def test_batch_without_labels() -> None:
    """I10: label loss 0, no gradient of the label head, the other parts and their gradients bit for bit as before."""
    model, teacher, batch = tiny(), tiny(seed=5), batch_of()
    unlabelled = batch_of()
    unlabelled.known = torch.zeros_like(unlabelled.known)
    unlabelled.targets[:] = math.nan
    loss, _, logs = step_of(model, teacher, unlabelled)
    loss.backward()
    assert logs["label"] == 0 and math.isfinite(float(loss.detach()))
    assert not model.label_head.weight.grad.any() and not model.label_head.bias.grad.any()
    gradient = model.backbone.blocks[0].attn.qkv.weight.grad.clone()
    labelled = step_of(model, teacher, batch)[2]
    assert labelled["label"] > 0.1
    assert all(labelled[name] == value for name, value in logs.items() if name != "label")
    plain = tiny(labels=False)
    step_of(plain, teacher, batch_of(labels=False))[0].backward()
    torch.testing.assert_close(plain.backbone.blocks[0].attn.qkv.weight.grad, gradient)


def test_only_labelled_images_count() -> None:
    """I10: what stands in an unlabelled image's targets, and how many such images there are, is nothing to the loss."""
    model, teacher, batch = tiny(), tiny(seed=5), batch_of()
    before = step_of(model, teacher, batch)[2]["label"]
    batch.targets[1] = 1 - batch.targets[1]
    assert step_of(model, teacher, batch)[2]["label"] == before
    more = batch_of()
    extra = batch_of(seed=9, images=3)
    for name in ("globals", "locals", "masks"):
        setattr(more, name, torch.cat([getattr(more, name), getattr(extra, name)], dim=1))
    more.targets = torch.cat([more.targets, extra.targets])
    more.known = torch.cat([more.known, torch.zeros_like(extra.known)])
    more.indices = list(range(8))
    assert step_of(model, teacher, more)[2]["label"] == pytest.approx(before, rel=1e-5)
    batch.targets[0] = 1 - batch.targets[0]
    assert abs(step_of(model, teacher, batch)[2]["label"] - before) > 1e-4


# ------------------------------------------------------------------------------------------------------------ gradients

def gradients(model: DinoModel) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_everything_of_the_student_learns_and_nothing_of_the_teacher() -> None:
    model, teacher = tiny(), tiny(seed=5)
    step_of(model, teacher, batch_of())[0].backward()
    assert all(gradient is not None and gradient.any() for gradient in gradients(model).values())
    assert all(gradient is None for gradient in gradients(teacher).values())


@pytest.mark.parametrize("masked", ["none", "one", "all"])
def test_mask_token_learns_where_something_is_masked(masked: str) -> None:
    """And the iBOT head with it; the patch embedding of a crop that is masked as a whole has no part in the loss."""
    model, batch = tiny(), batch_of(local=False)
    batch.masks[:] = masked == "all"
    if masked == "one":
        batch.masks[1, 3, 7] = True
    loss, _, logs = step_of(model, tiny(seed=5), batch)
    loss.backward()
    found = gradients(model)
    assert math.isfinite(float(loss.detach())) and (logs["ibot"] > 0) == (masked != "none")
    assert bool(found["mask_token"].any()) == (masked != "none")
    assert bool(found["ibot_head.mlp.0.weight"].any()) == (masked != "none")
    assert bool(found["backbone.patch_embed.proj.weight"].any()) == (masked != "all")


@pytest.mark.parametrize("part, heads", [("dino", {"dino_head"}), ("ibot", {"ibot_head"}), ("koleo", set()),
                                         ("label", {"label_head"})])
def test_each_loss_moves_its_own_head(part: str, heads: set[str]) -> None:
    model, batch = tiny(), batch_of()
    weights = {f"{name}_weight": float(name == part) for name in ("dino", "ibot", "koleo", "label")}
    loss, images, logs = step_of(model, tiny(seed=5), batch, **weights)
    loss.backward()
    moved = {name.split(".")[0] for name, gradient in gradients(model).items() if gradient.any()}
    assert moved - {"mask_token"} == {"backbone"} | heads
    assert float(loss.detach()) / images == pytest.approx(logs[part], rel=1e-6)


def test_teacher_of_the_moment() -> None:
    """The step asks for the teacher each time: the trainer's average may be another object later."""
    model, batch, current = tiny(), batch_of(), SimpleNamespace(module=tiny(seed=5))
    step = make_step(None, lambda: current.module, device=CPU)
    first = step(model, batch, VALUES)[2]["dino"]
    current.module = tiny(seed=6)
    assert step(model, batch, VALUES)[2]["dino"] != first


def test_broken_image_ends_the_step(tmp_path: Path) -> None:
    """Named with its reason and row; the model is not called."""
    draw_images(tmp_path, ["a.png", "b.png"])
    manifest = read_images(write_csv(tmp_path / "list.csv", image=["a.png", "b.png"]))
    batch = batch_of()
    batch.broken = [(1, "cut off")]

    def never(*given: torch.Tensor) -> None:
        raise AssertionError("called")

    with pytest.raises(ProcessError, match=r"(?s)1 image cannot be decoded.*row 3, .*b\.png: cut off"):
        make_step(manifest, never, device=CPU)(never, batch, VALUES)


# ------------------------------------------------------------------------------------------------------------ the judge

@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """30 labelled train images and 14 of val, of two classes that differ a little in brightness."""
    folder = tmp_path_factory.mktemp("judged")
    rng = np.random.default_rng(0)
    rows = [(f"{split}_{i}.png", int(rng.random() < 0.4), split) for split, n in (("train", 30), ("val", 14))
            for i in range(n)]
    for name, label, _ in rows:
        pixels = np.clip(rng.normal(110 + 25 * label, 30) + rng.normal(0, 40, (28, 28, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
    images = read_images(write_csv(folder / "eval.csv", image=[r[0] for r in rows], label=[r[1] for r in rows],
                                   split=[r[2] for r in rows]))
    return images.split("train"), images.split("val")


def judge(gallery, queries, *, due: bool = True, classes: int = 2, batch_size: int = 8, model: nn.Module | None = None):
    evaluate = make_evaluate(gallery, queries, classes=classes, device=CPU, amp_dtype="fp32", num_workers=0,
                             due=lambda: due, batch_size=batch_size)
    return evaluate((model or tiny()).eval())


def features_of(model: DinoModel, manifest) -> np.ndarray:
    """The backbone's class tokens by its own evaluation transform."""
    transform = build_transform(model.backbone)
    with torch.inference_mode():
        return model.backbone(torch.stack([transform(load_rgb(manifest.path_of(i)))
                                           for i in range(len(manifest))])).double().numpy()


def test_knn_is_the_weighted_vote_of_sklearn(judged) -> None:
    """20 neighbours by cosine, each with the weight exp(s / 0.07)."""
    gallery, queries = judged
    model = tiny().eval()
    train, asked = features_of(model, gallery), features_of(model, queries)
    oracle = KNeighborsClassifier(20, weights=lambda distance: np.exp((1 - distance) / 0.07), metric="cosine",
                                  algorithm="brute").fit(train, gallery.labels)
    predicted = oracle.predict(asked)
    found = judge(gallery, queries)
    assert found["knn_acc"] == pytest.approx((predicted == queries.labels).mean())
    assert found["knn_bacc"] == pytest.approx(balanced_accuracy_score(queries.labels, predicted))
    assert found["knn_acc"] != found["knn_bacc"] and 0.3 < found["knn_acc"] < 1, "the data can tell them apart"
    values = np.linalg.svd(asked, compute_uv=False)
    p = values / values.sum()
    assert found["feature_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)
    assert judge(gallery, queries, batch_size=64) == pytest.approx(found, rel=1e-4)


def test_small_gallery_and_absent_class(judged) -> None:
    """Fewer than 20 images: all of them vote; a class of which no query is there takes no part in the mean."""
    gallery, queries = judged
    ones = queries.take(np.flatnonzero(queries.labels == 1))
    found = judge(gallery.take(np.arange(5)), ones)
    assert found["knn_acc"] == found["knn_bacc"]
    both = judge(gallery.take(np.flatnonzero(gallery.labels == 1)[:1]), queries)
    assert both["knn_acc"] == pytest.approx((queries.labels == 1).mean()) and both["knn_bacc"] == 0.5


def test_without_a_gallery(judged) -> None:
    """The rank alone."""
    found = judge(None, judged[1])
    assert found == {"feature_rank": pytest.approx(judge(*judged)["feature_rank"], rel=1e-4)}


def test_epoch_that_is_not_due(judged) -> None:
    """NaN under the same names, and no image is read."""
    model = tiny()
    model.backbone.forward = None  # must not be called
    for gallery in (judged[0], None):
        found = judge(gallery, judged[1], due=False, model=model)
        assert all(map(math.isnan, found.values())) and found.keys() == judge(gallery, judged[1]).keys()


def test_diverged_training(judged) -> None:
    """Features that are no numbers: what to change, in this script's words."""
    model = tiny()
    with torch.no_grad():
        model.backbone.norm.bias[0] = math.inf
    with pytest.raises(UserError, match="the training has diverged: .*Take a lower --base_lr, --clip_grad 1.0") as told:
        judge(*judged, model=model)
    assert "--lr " not in str(told.value)


# ------------------------------------------------------------------------------------------------------------- collapse

def history(*entropies: tuple[float, float] | None) -> list[dict[str, float]]:
    return [{} if pair is None else {"train_teacher_marginal_entropy": pair[0],
                                     "train_teacher_assignment_entropy": pair[1]} for pair in entropies]


@pytest.mark.parametrize("last, told", [
    ((0.9, 0.5), None), ((0.60, 0.57), None), ((0.98, 0.97), "all prototypes evenly"), ((0.01, 0.0), "one prototype"),
    ((0.5, 0.47), None), ((1.0, 1.0), "all prototypes evenly"), ((0.3, 0.29), "one prototype"),
    ((math.nan, math.nan), None), (None, None)])
def test_collapse_warning(last: tuple[float, float] | None, told: str | None) -> None:
    """All images alike to the teacher; only of the last epoch, and never of the first."""
    warning = collapse_warning(history((0.9, 0.5), last))
    assert (warning is None) == (told is None)
    if told:
        assert told in warning and "--warmup_teacher_temp" in warning and f"{last[0]:.3f}" in warning
    assert collapse_warning(history(last)) is None
    assert collapse_warning(history(last, (0.9, 0.5))) is None and collapse_warning([]) is None


def test_collapsed_teacher_is_noticed() -> None:
    """A teacher that gives all images the same logits; one that tells them apart is left alone."""
    model, teacher, batch = tiny(), tiny(seed=5), batch_of()
    apart = {f"train_{name}": value for name, value in step_of(model, teacher, batch)[2].items()}
    assert collapse_warning([apart, apart]) is None
    with torch.no_grad():
        teacher.dino_head.mlp[4].weight.zero_()
        teacher.dino_head.mlp[4].bias.fill_(1.0)
    alike = {f"train_{name}": value for name, value in step_of(model, teacher, batch)[2].items()}
    assert "all images" in collapse_warning([apart, alike])
