"""run_class_finetuning.py: what a run leaves, what it says of the data, and what can be done with its model."""

import argparse
import copy
import json
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score, roc_auc_score

import linear_eval
import predict
import run_class_finetuning
from furnace import finetuning
from furnace.command_line import parse
from furnace.data.samplers import TrainSampler
from furnace.data.transforms import build_transform
from furnace.evaluation.calibration import apply_temperature
from furnace.evaluation.metrics import classification_metrics
from furnace.finetuning_arguments import finetuning_parser
from furnace.models import create_backbone, panderm
from furnace.models.classifier import create_classifier, load_classifier
from tiny_finetuning import (
    MODEL,
    drawn_set,
    finetune,
    log_of,
    no_plots,
    one_thread,
    probabilities_of,
    read_stored_weights,
    results_of,
    values_of,
)

__all__ = ["no_plots", "one_thread"]  # fixtures that act on every test here


@pytest.fixture(scope="module")
def run(tmp_path_factory, one_thread) -> tuple[Path, Path]:
    """(CSV, the folder of a finished run)."""
    folder = tmp_path_factory.mktemp("finetuning")
    csv = drawn_set(folder / "data", train=8, val=8)
    assert finetune(csv, folder / "run", epochs="6") == 0
    return csv, folder / "run"


# ------------------------------------------------------------------------------------------------ what a run leaves

def test_files_and_numbers(run) -> None:
    """results.json is of test.csv and val.csv; the epoch is the best of log.txt; val.csv is of that epoch."""
    csv, out = run
    assert {path.name for path in out.iterdir()} == {
        "args.yaml", "env.json", "log.txt", "results.json", "val.csv", "test.csv", "plots",
        *(f"checkpoint-{name}.pth" for name in ("best", "last", "previous"))}
    assert {"learning_curve.png", "confusion.png", "roc.png", "reliability.png"} <= {
        path.name for path in (out / "plots").iterdir()}
    results, log, frame = results_of(out), log_of(out), pd.read_csv(csv)
    for split in ("val", "test"):
        table, want = pd.read_csv(out / f"{split}.csv"), frame[frame["split"] == split]
        assert table["filename"].tolist() == want["image"].tolist()
        assert table["true_label"].tolist() == want["label"].tolist()
        p, found = probabilities_of(table), values_of(results["splits"][split])
        assert found == pytest.approx(classification_metrics(table["true_label"], p), abs=1e-6, nan_ok=True)
        assert found["acc"] == accuracy_score(table["true_label"], table["predicted_label"])
        assert found["bacc"] == balanced_accuracy_score(table["true_label"], p.argmax(axis=1))
        assert found["auroc_ovr"] == pytest.approx(roc_auc_score(table["true_label"], p, multi_class="ovr"))
    accuracies = [entry["val_acc"] for entry in log]
    assert len(log) == 6 and [entry["update"] for entry in log] == [4, 8, 12, 16, 20, 24]
    assert results["best_epoch"] == int(np.argmax(accuracies)) and max(accuracies) > 0.5
    assert values_of(results["splits"]["val"])["acc"] == max(accuracies)
    assert results["plan"] == {"micro": 6, "accumulation": 1, "world_size": 1, "steps_per_epoch": 4, "even": False,
                               "least": 1}
    assert (results["train_images"], results["model"], results["tune"], results["setting"]) == (
        24, MODEL, "full", {"seed": 0})
    assert results["trained_parameters"] == sum(p.numel() for p in load_classifier(
        out / "checkpoint-best.pth").model.parameters())


def test_its_arguments_are_the_same_run(run, caplog) -> None:
    """-c args.yaml: nothing is computed, nothing written; the metrics are printed."""
    out = run[1]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != "args.yaml"}
    caplog.clear()
    assert run_class_finetuning.main(["-c", str(out / "args.yaml")]) == 0
    accuracy = results_of(out)["splits"]["test"]["metrics"]["acc"]["value"]
    assert "this run is finished" in caplog.text and f"acc           {accuracy:.4f}" in caplog.text
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != "args.yaml"}


def test_the_command_line_wins_over_its_arguments(run, capsys) -> None:
    """--seed 5 behind -c args.yaml is another run, and is refused in this folder by that name."""
    assert run_class_finetuning.main(["-c", str(run[1] / "args.yaml"), "--seed", "5"]) == 2
    assert "seeds: [0] there, [5] now" in capsys.readouterr().err


def test_switches_of_two_flags_come_back(tmp_path) -> None:
    """``sin_pos_emb: true`` in args.yaml is --sin_pos_emb, not the flag that turns it off."""
    switches = ("rel_pos_bias", "sin_pos_emb", "pin_mem", "save_ckpt", "no_auto_resume")
    for value in (True, False):
        (tmp_path / "args.yaml").write_text(yaml.safe_dump(dict.fromkeys(switches, value)))
        args = parse(finetuning_parser(), ["-c", str(tmp_path / "args.yaml"), "--model", "demo", "--csv_path", "x.csv"])
        assert [getattr(args, name) for name in switches] == [value] * 5


# -------------------------------------------------------------------------------------------------------- the data

def test_two_classes(tmp_path) -> None:
    """binary_label, beside label; the epoch is chosen by auroc; the column ``probability`` is class 1's."""
    csv = drawn_set(tmp_path / "data", classes=4)
    table = pd.read_csv(csv)
    table.assign(binary_label=table["label"] // 2).to_csv(csv, index=False)
    assert finetune(csv, tmp_path / "run", nb_classes="2") == 0
    test, log = pd.read_csv(tmp_path / "run" / "test.csv"), log_of(tmp_path / "run")
    assert list(test) == ["filename", "true_label", "predicted_label", "probability", "probability_class_0",
                          "probability_class_1"]
    np.testing.assert_array_equal(test["probability"], test["probability_class_1"])
    assert test["true_label"].tolist() == [0] * 8 + [1] * 8
    found = values_of(results_of(tmp_path / "run")["splits"]["test"])
    assert found["auroc"] == pytest.approx(roc_auc_score(test["true_label"], test["probability"]))
    aurocs = [entry["val_auroc"] for entry in log]
    assert results_of(tmp_path / "run")["best_epoch"] == int(np.argmax(aurocs))
    val = pd.read_csv(tmp_path / "run" / "val.csv")
    assert max(aurocs) == pytest.approx(roc_auc_score(val["true_label"], val["probability"]))
    assert "resolved_monitor: auroc\n" in (tmp_path / "run" / "args.yaml").read_text()


def test_a_class_absent_from_val(tmp_path, capsys) -> None:
    """Its auroc is not defined: refused before anything is trained; accuracy chooses, and test has all classes."""
    csv = drawn_set(tmp_path / "data")
    table = pd.read_csv(csv)
    table[(table["split"] != "val") | (table["label"] != 1)].to_csv(csv, index=False)
    assert finetune(csv, tmp_path / "run", "--monitor", "auroc") == 2
    assert "no image of class 1; take --monitor bacc" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("checkpoint*"))
    assert finetune(csv, tmp_path / "run") == 0
    log, results = log_of(tmp_path / "run"), results_of(tmp_path / "run")
    assert [entry["val_auroc"] for entry in log] == [None] * 3
    assert results["best_epoch"] == int(np.argmax([entry["val_acc"] for entry in log]))
    assert values_of(results["splits"]["test"])["auroc"] > 0 and results["splits"]["val"]["n"] == 8


@pytest.mark.parametrize(("words", "images", "micro"), [([], 15, 15), (["--mixup", "0.8"], 15, 14)])
def test_fewer_images_than_a_batch(tmp_path, words: list[str], images: int, micro: int) -> None:
    """One update an epoch, of all of them (mixup takes pairs); the published loop made no update at all."""
    csv = drawn_set(tmp_path / "data", train=5)
    assert finetune(csv, tmp_path / "run", *words, batch_size="64") == 0
    plan = results_of(tmp_path / "run")["plan"]
    assert plan == {"micro": micro, "accumulation": 1, "world_size": 1, "steps_per_epoch": 1, "even": bool(words),
                    "least": 1}
    assert [entry["update"] for entry in log_of(tmp_path / "run")] == [1, 2, 3]
    start = create_classifier(MODEL, "random", nb_classes=3, input_size=32, init_scale=1)
    best = read_stored_weights(tmp_path / "run" / "checkpoint-best.pth")
    assert all(best[name] != p.detach().numpy().tobytes() for name, p in start.named_parameters())


def test_balanced_sampling_of_a_share(tmp_path, monkeypatch) -> None:
    """--weights with --percent_data: weights N / (C x count) of the images that are left, and they were drawn so."""
    seen = []

    class Watched(TrainSampler):
        def __iter__(self):
            for draw in super().__iter__():
                seen.append(draw.index)
                yield draw

    made = []
    monkeypatch.setattr(finetuning, "TrainSampler", lambda *a, **k: made.append(Watched(*a, **k)) or made[-1])
    csv = drawn_set(tmp_path / "data", train=40)
    table = pd.read_csv(csv)
    rare = table[(table["split"] == "train") & (table["label"] > 0)].index  # 40, 5 and 5 images
    table.drop(rare[rare % 8 != 0]).to_csv(csv, index=False)
    assert finetune(csv, tmp_path / "run", "--weights", "--percent_data", "0.6", epochs="8") == 0
    frame = pd.read_csv(csv).sample(frac=1, random_state=42)  # the published order
    labels = frame.loc[frame["split"] == "train", "label"].to_numpy()
    labels = labels[:int(len(labels) * 0.6)]
    results = results_of(tmp_path / "run")
    assert results["train_images"] == len(labels) == 30
    classes, counts = np.unique(labels, return_counts=True)
    want = len(labels) / (len(classes) * counts[np.searchsorted(classes, labels)])
    np.testing.assert_allclose(made[0].weights, want, rtol=1e-6)
    drawn = np.bincount(labels[seen], minlength=3)
    n, k = len(seen), len(classes)
    assert n == 8 * 30 and (np.abs(drawn[classes] - n / k) < 4 * np.sqrt(n / k * (1 - 1 / k))).all()


def test_external_test_set(run, tmp_path) -> None:
    """Predicted and scored like test, in files of its own; test's numbers stay."""
    csv, out = run
    other = drawn_set(tmp_path / "other", train=0, val=0, test=3, seed=5)
    other.write_text(other.read_text().replace("drawn", "other"))
    assert finetune(csv, tmp_path / "run", "--test_csv_path", str(other), epochs="6") == 0
    assert (tmp_path / "run" / "test.csv").read_bytes() == (out / "test.csv").read_bytes()
    table, results = pd.read_csv(tmp_path / "run" / "external.csv"), results_of(tmp_path / "run")
    assert table["filename"].tolist() == pd.read_csv(other)["image"].tolist()
    assert values_of(results["splits"]["external"]) == pytest.approx(
        classification_metrics(table["true_label"], probabilities_of(table)), abs=1e-6, nan_ok=True)
    assert list(results["splits"]) == ["val", "test", "external"]
    assert (tmp_path / "run" / "plots" / "external").is_dir()


def test_several_labels(tmp_path) -> None:
    """results.json is scikit-learn's of test.csv; sigmoids; predict.py gives the same text."""
    csv = drawn_set(tmp_path / "data", classes=4, train=8, val=6, test=6)
    table = pd.read_csv(csv)
    names = {0: None, 1: "scale", 2: "erythema; scale", 3: "ulcer;erythema"}
    table["labels"] = table["label"].map(names)
    table.drop(columns="label").to_csv(csv, index=False)
    assert finetune(csv, tmp_path / "run", "--task", "multilabel", nb_classes="0") == 0
    results, test = results_of(tmp_path / "run"), pd.read_csv(tmp_path / "run" / "test.csv")
    kinds = ["erythema", "scale", "ulcer"]
    assert results["class_names"] == kinds and list(test)[3:] == [f"probability_{name}" for name in kinds]
    targets = np.array([[name in str(cell) for name in kinds] for cell in table.loc[table["split"] == "test",
                                                                                   "labels"]], int)
    p = probabilities_of(test)
    assert np.abs(p.sum(axis=1) - 1).max() > 0.05  # no softmax
    found = values_of(results["splits"]["test"])
    assert found["auroc"] == pytest.approx(roc_auc_score(targets, p, average="macro"))
    assert found["macro_f1"] == pytest.approx(f1_score(targets, p > 0.5, average="macro", zero_division=0))
    assert found["exact_match"] == pytest.approx(accuracy_score(targets, p > 0.5))
    aurocs = [entry["val_auroc"] for entry in log_of(tmp_path / "run")]
    assert results["best_epoch"] == int(np.argmax(aurocs))
    assert predict.main([str(csv), "--checkpoint", str(tmp_path / "run" / "checkpoint-best.pth"), "--num_workers", "0",
                         "--device", "cpu", "--output", str(tmp_path / "p.csv"), "--sheet", "0"]) == 0
    same_predictions(tmp_path / "p.csv", tmp_path / "run" / "test.csv")


def same_predictions(predicted: Path, wanted: Path) -> None:
    """Every column of a run's CSV but the true labels, for its images; a batch of another size rounds otherwise."""
    want = pd.read_csv(wanted).set_index("filename")
    found = pd.read_csv(predicted).set_index("filename").loc[want.index]
    columns = [name for name in want.columns if not name.startswith("true_")]
    pd.testing.assert_frame_equal(found[columns], want[columns], rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------- several seeds and folds

def test_seeds_and_folds(tmp_path) -> None:
    """Every patient is in one part; the parts are the pool; the summary is of the children; test is the same."""
    csv = drawn_set(tmp_path / "data", train=6, val=3, test=2, copies=3)
    assert finetune(csv, tmp_path / "run", "--seeds", "0", "1", "--folds", "3", epochs="1") == 0
    frame = pd.read_csv(csv).set_index("image")
    pool, exam = (frame[(frame["split"] == "test") == which] for which in (False, True))
    outcomes = []
    for seed in (0, 1):
        children = [tmp_path / "run" / f"seed_{seed}_fold_{fold}" for fold in range(3)]
        parts = [pd.read_csv(child / "val.csv")["filename"].tolist() for child in children]
        assert sorted(sum(parts, [])) == sorted(pool.index)
        patients = [set(frame.loc[part, "patient_id"]) for part in parts]
        assert not patients[0] & patients[1] and not patients[0] & patients[2] and not patients[1] & patients[2]
        for child, part in zip(children, parts, strict=True):
            outcomes.append(results_of(child))
            assert outcomes[-1]["train_images"] == len(pool) - len(part)
            assert pd.read_csv(child / "test.csv")["filename"].tolist() == exam.index.tolist()
    results, table = results_of(tmp_path / "run"), pd.read_csv(tmp_path / "run" / "table.csv")
    assert results["runs"] == [{"seed": seed, "fold": fold} for seed in (0, 1) for fold in range(3)]
    accuracy = [values_of(outcome["splits"]["test"])["acc"] for outcome in outcomes]
    assert table.loc[table["split"] == "test", "acc"].tolist() == pytest.approx(accuracy)
    (entry,) = [e for e in results["summary"] if (e["split"], e["metric"]) == ("test", "acc")]
    assert entry["runs"] == 6 and (entry["mean"], entry["sd"]) == pytest.approx(
        (np.mean(accuracy), np.std(accuracy, ddof=1)))


def test_a_seed_of_several_is_the_run_with_it(run, tmp_path, caplog) -> None:
    """And a run that stopped between the two makes the second only."""
    csv, out = run
    words = ["--seeds", "4", "0"]
    assert finetune(csv, tmp_path / "run", *words, epochs="6") == 0
    for name in ("test.csv", "val.csv", "log.txt"):
        one, two = (folder / name for folder in (out, tmp_path / "run" / "seed_0"))
        assert log_of(one.parent) == log_of(two.parent) if name == "log.txt" else one.read_bytes() == two.read_bytes()
    assert (tmp_path / "run" / "seed_4" / "test.csv").read_bytes() != (out / "test.csv").read_bytes()
    for path in (tmp_path / "run" / "results.json", tmp_path / "run" / "seed_0" / "results.json"):
        path.unlink()
    made = (tmp_path / "run" / "seed_4" / "results.json").stat().st_mtime_ns
    assert finetune(csv, tmp_path / "run", *words, epochs="6") == 0
    assert (tmp_path / "run" / "seed_4" / "results.json").stat().st_mtime_ns == made
    assert results_of(tmp_path / "run" / "seed_0")["splits"] == results_of(out)["splits"]


# ------------------------------------------------------------------------------------------------- what is trained

@pytest.mark.parametrize("model", [MODEL, "timm:test_efficientnet"])
def test_head_alone(tmp_path, model: str) -> None:
    """All else, batch statistics too, is as it was, bit for bit."""
    csv = drawn_set(tmp_path / "data", train=4, val=1, test=1)
    assert finetune(csv, tmp_path / "run", "--tune", "head", "--drop_path", "0.5", model=model) == 0
    start = create_classifier(model, "random", nb_classes=3, input_size=32, init_scale=1)
    best = read_stored_weights(tmp_path / "run" / "checkpoint-best.pth")
    assert best.keys() == start.state_dict().keys()
    changed = {name for name, value in start.state_dict().items() if value.numpy().tobytes() != best[name]}
    assert changed == set(start.classifier_names)
    width = start.get_parameter(start.classifier_names[0]).shape[1]
    assert results_of(tmp_path / "run")["trained_parameters"] == 3 * width + 3


def test_lora_leaves_a_plain_model(tmp_path, monkeypatch) -> None:
    """Loaded without peft; only the matrices in the blocks and the head have changed; rank (in + out) numbers each."""
    csv = drawn_set(tmp_path / "data", train=4, val=2, test=2)
    assert finetune(csv, tmp_path / "run", "--tune", "lora", "--lora_rank", "2", init_scale="0.1") == 0
    monkeypatch.setitem(sys.modules, "peft", None)  # importing it fails
    loaded = load_classifier(tmp_path / "run" / "checkpoint-best.pth")
    start = create_classifier(MODEL, "random", nb_classes=3, input_size=32, init_scale=0.1)
    state, before = loaded.model.state_dict(), start.state_dict()
    assert state.keys() == before.keys() and type(loaded.model) is type(start)
    ends = ("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")
    matrices = {name for name in before if name.startswith("blocks.") and name.endswith(ends)}
    assert len(matrices) == 4 * len(start.blocks)
    changed = {name for name in before if not torch.equal(state[name], before[name])}
    assert changed == matrices | set(start.classifier_names)
    assert all(torch.linalg.matrix_rank(state[name] - before[name], rtol=1e-4) <= 2 for name in matrices)
    trained = sum(2 * sum(before[name].shape) for name in matrices) + sum(before[n].numel() for n in
                                                                          start.classifier_names)
    assert results_of(tmp_path / "run")["trained_parameters"] == trained
    assert predict.main([str(csv), "--checkpoint", str(loaded.path), "--num_workers", "0", "--device", "cpu",
                         "--output", str(tmp_path / "p.csv"), "--sheet", "0"]) == 0
    same_predictions(tmp_path / "p.csv", tmp_path / "run" / "test.csv")


# ---------------------------------------------------------------------------------------------- what becomes of it

def test_predict(run, tmp_path) -> None:
    """The probabilities of test.csv; --calibrated divides by the temperature that the run fitted."""
    csv, out = run
    best, temperature = out / "checkpoint-best.pth", results_of(out)["temperature"]
    for name, words in (("p.csv", ["--batch_size", "5"]), ("c.csv", ["--calibrated"])):
        assert predict.main([str(csv), "--checkpoint", str(best), "--num_workers", "0", "--device", "cpu", "--output",
                             str(tmp_path / name), "--sheet", "0", *words]) == 0
    same_predictions(tmp_path / "p.csv", out / "test.csv")
    same_predictions(tmp_path / "p.csv", out / "val.csv")
    plain, calibrated = (probabilities_of(tmp_path / name) for name in ("p.csv", "c.csv"))
    assert temperature is not None and load_classifier(best).temperature == temperature != 1
    np.testing.assert_allclose(calibrated, apply_temperature(plain, temperature), atol=1e-6)


def evaluated(out: Path, csv: Path, best: Path, *words: str, **options: str) -> Path:
    """--eval --resume; the folder of the test."""
    assert finetune(csv, out, "--eval", "--resume", str(best), *words, **options) == 0
    (folder,) = out.glob("eval_*")
    return folder


def test_eval_gives_the_runs_numbers(run, tmp_path, caplog) -> None:
    """val.csv and test.csv to the byte; asked again it answers from the file; in the run's folder, too."""
    csv, out = run
    folder = evaluated(tmp_path, csv, out / "checkpoint-best.pth", batch_size="4")
    for name in ("val.csv", "test.csv"):
        assert (folder / name).read_bytes() == (out / name).read_bytes()
    assert results_of(folder)["splits"] == results_of(out)["splits"]
    assert results_of(folder)["temperature"] == results_of(out)["temperature"]
    made = (folder / "results.json").stat().st_mtime_ns
    assert evaluated(tmp_path, csv, out / "checkpoint-best.pth", batch_size="4") == folder
    assert (folder / "results.json").stat().st_mtime_ns == made


def test_deterministic_views(run, tmp_path) -> None:
    """The mean of the logits of identity, two mirrorings and three quarter turns, by hand."""
    csv, out = run
    best = out / "checkpoint-best.pth"
    folder = evaluated(tmp_path, csv, best, "--TTA", "--tta_views", "deterministic")
    loaded, table = load_classifier(best), pd.read_csv(folder / "test.csv")
    transform = build_transform(loaded.data_config)
    pictures = torch.stack([transform(Image.open(csv.parent / name)) for name in table["filename"]])
    views = [pictures, pictures.flip(-1), pictures.flip(-2), *(pictures.rot90(k, (-2, -1)) for k in (1, 2, 3))]
    with torch.no_grad():
        logits = torch.stack([loaded.model(view) for view in views]).mean(dim=0)
    np.testing.assert_allclose(probabilities_of(table), logits.softmax(dim=1), atol=1e-5)
    assert (folder / "val.csv").read_bytes() == (out / "val.csv").read_bytes()  # val without views
    assert results_of(folder)["tta"] == "deterministic"


def test_published_views(run, tmp_path) -> None:
    """Random, but of the seed alone: batches and workers make no difference; another seed does."""
    csv, out = run
    best = out / "checkpoint-best.pth"
    one = evaluated(tmp_path / "one", csv, best, "--TTA")
    two = evaluated(tmp_path / "two", csv, best, "--TTA", batch_size="50", num_workers="2")
    other = evaluated(tmp_path / "other", csv, best, "--TTA", "--seed", "1")
    texts = [(folder / "test.csv").read_bytes() for folder in (one, other, out)]
    np.testing.assert_allclose(probabilities_of(one / "test.csv"), probabilities_of(two / "test.csv"), atol=1e-6)
    assert len(set(texts)) == 3
    assert np.abs(probabilities_of(one / "test.csv") - probabilities_of(out / "test.csv")).max() < 0.5


def test_a_published_file(tmp_path, monkeypatch, capsys) -> None:
    """checkpoint-best.pth as the published code writes it (here of a narrow PanDerm): tested without more words."""
    monkeypatch.setitem(panderm.SIZES, "Base", {"embed_dim": 32, "depth": 2, "num_heads": 2})
    torch.manual_seed(0)
    model = create_classifier("PanDerm_Base_FT", "random", nb_classes=3)
    state = {key: value + 0.2 * torch.randn_like(value) for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    index = torch.zeros(197, 197, dtype=torch.long)
    state |= {f"blocks.{i}.attn.relative_position_index": index for i in range(2)}
    args = argparse.Namespace(model="PanDerm_Base_FT", nb_classes=3, input_size=224, use_cls=False, weights=True)
    torch.save({"model": state, "args": args, "epoch": "best", "optimizer": {}, "scaler": {}}, tmp_path / "theirs.pth")
    csv = drawn_set(tmp_path / "data", train=1, val=2, test=2)
    options = {"model": "PanDerm_Base_FT", "input_size": "224"}
    table = pd.read_csv(evaluated(tmp_path / "run", csv, tmp_path / "theirs.pth", **options) / "test.csv")
    transform = build_transform(load_classifier(tmp_path / "theirs.pth").data_config)
    with torch.no_grad():
        want = torch.cat([model(transform(Image.open(csv.parent / name))[None]) for name in table["filename"]])
    np.testing.assert_allclose(probabilities_of(table), want.softmax(dim=1), atol=1e-5)
    assert predict.main([str(csv), "--checkpoint", str(tmp_path / "theirs.pth"), "--output", str(tmp_path / "p.csv"),
                         "--device", "cpu", "--num_workers", "0", "--sheet", "0", "--calibrated"]) == 2
    assert "has no temperature" in capsys.readouterr().err


def test_its_backbone_under_linear_eval(run, tmp_path) -> None:
    """checkpoint-best.pth is a --pretrained_checkpoint: the features are those under its head."""
    csv, out = run
    best = out / "checkpoint-best.pth"
    loaded = load_classifier(best).model
    backbone = create_backbone(MODEL, best, input_size=32)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        head = loaded.get_classifier()
        torch.testing.assert_close(head(backbone(x)), loaded(x), atol=1e-5, rtol=0)
    assert linear_eval.main(["--model", MODEL, "--pretrained_checkpoint", str(best), "--input_size", "32", "--csv_path",
                             str(csv), "--nb_classes", "3", "--output_dir", str(tmp_path / "out"), "--amp_dtype",
                             "fp32", "--num_workers", "0", "--device", "cpu"]) == 0
    (probe,) = (tmp_path / "out").glob("*/*/results.json")
    assert json.loads(probe.read_text())["splits"]["test"]["metrics"]["acc"]["value"] > 1 / 3


def test_wrong_checkpoints(run, tmp_path, capsys) -> None:
    """--eval: exit code 2, what the file is, and nothing written."""
    csv, out = run
    best, content = out / "checkpoint-best.pth", torch.load(out / "checkpoint-best.pth", weights_only=True)
    renamed = copy.deepcopy(content)
    renamed["meta"]["class_names"] = ["nevus", "melanoma", "other"]
    torch.save(renamed, tmp_path / "renamed.pth")
    named = tmp_path / "names.txt"
    named.write_text("melanoma\nnevus\nother\n")
    torch.save(create_backbone(MODEL, "random", input_size=32).state_dict(), tmp_path / "backbone.pth")
    (tmp_path / "text.pth").write_text("no checkpoint")
    two = drawn_set(tmp_path / "two", classes=4)
    for words, options, message in (
        ([str(best)], {"model": "timm:test_vit2"}, "holds a timm:test_vit; you asked for --model timm:test_vit2"),
        ([str(best), "--csv_path", str(two)], {"nb_classes": "4"}, "tells 3 classes (multiclass) apart and the data "
         "set has 4"),
        ([str(tmp_path / "renamed.pth"), "--class_names", str(named)], {}, "are nevus, melanoma, other; those of the "
         "data set are melanoma, nevus, other"),
        ([str(tmp_path / "backbone.pth")], {}, "is no fine-tuned classifier"),
        ([str(tmp_path / "text.pth")], {}, "text.pth"),
        ([str(tmp_path / "no.pth")], {}, "no.pth does not exist"),
    ):
        assert finetune(csv, tmp_path / "run", "--eval", "--resume", *words, **options) == 2, message
        assert message in capsys.readouterr().err
        assert not list((tmp_path / "run").glob("eval_*/*.csv"))
    assert finetune(csv, tmp_path / "run", "--eval") == 2
    assert "--eval needs --resume" in capsys.readouterr().err
