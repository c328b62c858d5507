"""knn_eval.py through main(argv): files, numbers computed a second time, answers from stored results, mistakes.

Most tests share one small set and its feature cache, so that its 21 images are encoded once.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

import knn_eval
from furnace.data.datasets import build_loader
from furnace.data.manifest import read_manifest
from furnace.data.transforms import build_transform
from furnace.evaluation.features import extract_features
from furnace.evaluation.metrics import NAMES, classification_metrics
from furnace.evaluation.retrieval import NAMES as RETRIEVAL_NAMES
from furnace.models import create_backbone
from helpers import ROOT, small_set


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A set with 12 train, 3 val and 6 test images of three classes; no test changes it."""
    return small_set(tmp_path_factory.mktemp("knn") / "data")


def with_columns(csv: Path, **columns) -> Path:
    """The same images under another CSV."""
    path = csv.with_name("other.csv")
    pd.read_csv(csv).assign(**columns).to_csv(path, index=False)
    return path


def run(csv: Path, output: Path, *more: str, classes: int = 3) -> int:
    """knn_eval.py in this process, few resamples and draws."""
    return knn_eval.main(["--model", "demo", "--csv_path", str(csv), "--nb_classes", str(classes), "--output_dir",
                          str(output), "--amp_dtype", "fp32", "--num_workers", "0", "--batch_size", "7", "--resamples",
                          "100", "--episodes", "5", "--cache_dir", str(csv.parent.parent / "features"), *more])


def folder_of(output: Path) -> Path:
    """The only run's folder."""
    (found,) = output.glob("*/*/results.json")
    return found.parent


def split_of(output: Path) -> dict:
    """What its results say of the test split."""
    return json.loads((folder_of(output) / "results.json").read_text())["splits"]["test"]


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file's bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def features_of(csv: Path) -> dict:
    """(features, labels) of each split, extracted once more."""
    manifest, backbone = read_manifest(csv, nb_classes=3), create_backbone("demo")
    found = {}
    for name in ("train", "val", "test"):
        loader = build_loader(manifest.split(name), build_transform(backbone), batch_size=8, num_workers=0)
        features = extract_features(backbone, loader, device="cpu")
        found[name] = (features.embeddings, features.labels)
    return found


def test_files_and_numbers(tmp_path, data, caplog) -> None:
    """The whole run; k-NN of scikit-learn on features extracted here; then again, answered."""
    caplog.set_level("INFO")
    csv, out = data, tmp_path / "out"
    assert run(csv, out, "--k", "5", "2", "5", "100", "--shots", "1", "4", "16") == 0
    folder = folder_of(out)
    assert folder.parent.name == "small" and folder.name.startswith("demo_")
    assert sorted(p.name for p in folder.iterdir()) == ["args.yaml", "env.json", "log.txt", "plots", "results.json",
                                                        "table.csv", "test.csv"]
    results = json.loads((folder / "results.json").read_text())
    split = results["splits"]["test"]
    assert (results["task"], results["data_set"], results["model"], results["train_images"]) == ("knn", "small", "demo",
                                                                                                 12)
    assert list(split["knn"]) == ["5", "2", "100"] and split["k"] == 5 and split["n"] == 6
    assert split["knn"]["100"]["neighbours"] == 12
    features = features_of(csv)
    (train, y), (test, truth) = features["train"], features["test"]
    for k in ("5", "2", "100"):
        near = KNeighborsClassifier(min(int(k), 12), metric="cosine", algorithm="brute",
                                    weights=lambda d: np.exp((1 - d) / 0.07)).fit(train, y)
        want = classification_metrics(truth, near.predict_proba(test))
        got = split["knn"][k]["metrics"]
        assert set(got) == set(NAMES)
        for name in ("bacc", "acc", "auroc", "weighted_f1", "brier"):
            assert got[name]["value"] == pytest.approx(want[name], abs=1e-3), (k, name)
            if name in ("acc", "brier"):  # always defined in the resamples
                assert got[name]["low"] <= got[name]["value"] <= got[name]["high"]
        if k == "5":
            predictions = pd.read_csv(folder / "test.csv")
            np.testing.assert_allclose(predictions.filter(like="probability_class_"), near.predict_proba(test),
                                       atol=1e-3)
            assert split["metrics"] == got and predictions["true_label"].tolist() == truth.tolist()
    assert [(e["shots"], e["episodes"], e["short_classes"]) for e in split["k_shot"]] == [(1, 5, []), (4, 5, []),
                                                                                          (16, 5, [0, 1, 2])]
    four, simple = split["k_shot"][1]["metrics"], split["simpleshot"]["metrics"]
    assert four["bacc"]["value"] == pytest.approx(simple["bacc"]["value"]) and four["bacc"]["sd"] == 0
    ranking = split["retrieval"]
    assert (ranking["gallery"], ranking["gallery_images"], ranking["queries"]) == ("train", 12, 6)
    assert set(ranking["metrics"]) == set(RETRIEVAL_NAMES)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test)]
    nearest = (unit[1] @ unit[0].T).argmax(axis=1)
    assert ranking["metrics"]["recall_at_1"]["value"] == pytest.approx((y[nearest] == truth).mean())
    table = pd.read_csv(folder / "table.csv")
    assert table["method"].unique().tolist() == ["knn_5", "knn_2", "knn_100", "simpleshot", "1_shot", "4_shot",
                                                 "16_shot", "retrieval"]
    row = table[(table["method"] == "knn_5") & (table["metric"] == "bacc")].iloc[0]
    assert row["value"] == pytest.approx(split["metrics"]["bacc"]["value"])
    with Image.open(folder / "plots" / "retrieval.png") as image:
        assert image.width > 6 * 160 and image.height > 6 * 160, "six queries, each with five neighbours"
    assert "16_shot: 0, 1, 2: fewer than 16 train images" in caplog.text and "6 queries in 12 images" in caplog.text
    before, told = snapshot(out), [r.message for r in caplog.records if r.name == "furnace.command_line"]
    caplog.clear()
    assert run(csv, out, "--k", "5", "2", "100", "--shots", "1", "4", "16", "--batch_size", "3") == 0
    assert snapshot(out) == before and [r.message for r in caplog.records if r.name == "furnace.command_line"] == told


def test_default_k_is_20(tmp_path, data) -> None:
    """test.csv has the published choice where it is among the ks."""
    assert run(data, tmp_path / "out", "--queries_shown", "0") == 0
    split = split_of(tmp_path / "out")
    assert list(split["knn"]) == ["10", "20", "100", "200"] and split["k"] == 20
    assert split["metrics"] == split["knn"]["20"]["metrics"] != split["knn"]["10"]["metrics"]
    assert [e["shots"] for e in split["k_shot"]] == [1, 2, 4, 8, 16]
    assert not (folder_of(tmp_path / "out") / "plots").exists()


def test_galleries(tmp_path, data) -> None:
    """Sizes; each is a run of its own; leave-one-out on pairs of one lesion has no relevant image left."""
    table, sizes = pd.read_csv(data), {}
    csv = with_columns(data, lesion_id=table["split"] + table["label"].astype(str))
    for gallery in ("train", "train_val", "test"):
        assert run(csv, tmp_path / gallery, "--gallery", gallery, "--k", "3", "--shots", "1") == 0
        ranking = split_of(tmp_path / gallery)["retrieval"]
        sizes[gallery] = ranking["gallery_images"], ranking["queries"], ranking["without_relevant"]
        assert ranking["excluded"] == "the query itself and its lesion_id"
    assert sizes == {"train": (12, 6, 0), "train_val": (15, 6, 0), "test": (6, 0, 6)}
    entry = split_of(tmp_path / "test")["retrieval"]["metrics"]["map_at_r"]
    assert entry["value"] is None and "no query has a relevant image" in entry["reason"]
    assert pd.read_csv(folder_of(tmp_path / "test") / "table.csv").set_index("method").loc["retrieval", "value"].isna(
        ).all()
    assert run(csv, tmp_path / "all", "--gallery", "test", "--exclude", "none", "--k", "3", "--shots", "1") == 0
    ranking = split_of(tmp_path / "all")["retrieval"]
    assert (ranking["queries"], ranking["excluded"]) == (6, "the query itself")
    assert split_of(tmp_path / "all")["knn"] == split_of(tmp_path / "train")["knn"], "train votes in any case"


@pytest.mark.parametrize("words", [["--temperature", "1"], ["--episodes", "6"], ["--seed", "1"], ["--k", "2"],
                                   ["--shots", "2"], ["--gallery", "test"], ["--exclude", "patient_id"],
                                   ["--queries_shown", "2"], ["--resamples", "101"]])
def test_options_make_another_run(tmp_path, data, monkeypatch, words: list[str]) -> None:
    """None is answered from the results of the others: a folder of its own (nothing is computed here)."""
    monkeypatch.setattr(knn_eval, "backbone_features", lambda *given: None)
    for more in ([], ["--batch_size", "3"], words):
        assert run(data, tmp_path / "out", "--k", "3", "--shots", "1", "--queries_shown", "1", *more) == 0
    assert len(list((tmp_path / "out").glob("*/*/env.json"))) == 2


def test_temperature_and_interval_options_have_effect(tmp_path, data) -> None:
    """Flatter votes; other intervals."""
    csv, found = data, {}
    changes = {"cold": [], "hot": ["--temperature", "100"], "more": ["--resamples", "150"],
               "strata": ["--bootstrap", "stratified"]}
    for name, more in changes.items():
        assert run(csv, tmp_path / name, "--k", "12", "--shots", "1", "--queries_shown", "0", *more) == 0
        found[name] = split_of(tmp_path / name), pd.read_csv(folder_of(tmp_path / name) / "test.csv")
    hot, cold = (found[name][1].filter(like="probability_class_").to_numpy() for name in ("hot", "cold"))
    assert np.abs(hot - 1 / 3).max() < 0.01 < np.abs(cold - 1 / 3).max()
    words = {name: split["resampling"] for name, (split, _) in found.items()}
    assert words == {"cold": "100 resamples of images", "hot": "100 resamples of images",
                     "more": "150 resamples of images", "strata": "100 resamples of images, stratified by class"}
    assert {name: split["retrieval"]["resampling"] for name, (split, _) in found.items()} == words
    limits = {name: split["retrieval"]["metrics"]["map_at_r"]["low"] for name, (split, _) in found.items()}
    assert limits["cold"] == limits["hot"] != limits["strata"]


def test_lost_predictions_are_made_again_and_args_yaml_repeats_the_run(tmp_path, data) -> None:
    """A run without its test.csv is not finished; -c args.yaml is the same run."""
    csv, out = data, tmp_path / "out"
    assert run(csv, out, "--k", "3", "4", "--shots", "1") == 0
    before = snapshot(out)
    assert knn_eval.main(["-c", str(folder_of(out) / "args.yaml")]) == 0 and snapshot(out) == before
    path = folder_of(out) / "test.csv"
    path.unlink()
    assert run(csv, out, "--k", "3", "4", "--shots", "1") == 0 and path.read_bytes() == before[str(
        path.relative_to(out))]


def test_as_a_process(tmp_path, data) -> None:
    """Uninstalled, from the root."""
    done = subprocess.run([sys.executable, "classification/knn_eval.py", "--model", "demo", "--csv_path", data,
                           "--nb_classes", "3", "--output_dir", tmp_path / "out", "--device", "cpu", "--episodes", "5",
                           "--resamples", "100", "--cache_dir", data.parent.parent / "features"], cwd=ROOT,
                          capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    assert re.search(r"knn_20 +bacc \d\.\d{4} \[.*retrieval +recall_at_1 \d.*results in", done.stdout, re.S)


def lose_column(csv: Path) -> list[str]:
    """Without patient_id."""
    pd.read_csv(csv).drop(columns="patient_id").to_csv(csv, index=False)
    return ["--exclude", "patient_id"]


def lose_val(csv: Path) -> list[str]:
    """Without val images."""
    table = pd.read_csv(csv)
    table[table["split"] != "val"].to_csv(csv, index=False)
    return ["--gallery", "train_val"]


def cut_image(csv: Path) -> list[str]:
    """A test image that breaks while it is decoded."""
    path = csv.parent / "images" / "test_2_1.png"
    path.write_bytes(path.read_bytes()[:-200])
    return []


MISTAKES = {
    "no lesion_id": (lambda csv: ["--exclude", "lesion_id"], "has no column lesion_id.*--exclude none"),
    "no patient_id": (lose_column, "has no column patient_id"),
    "no val": (lose_val, "has no val images; pass --gallery train"),
    "broken image": (cut_image, r"1 image cannot be decoded:\n.*test_2_1\.png"),
    "forgotten nb_classes": (lambda csv: ["--nb_classes", "2"], "pass --nb_classes 3"),
    "no csv": (lambda csv: ["--csv_path", "nowhere.csv"], r"nowhere\.csv does not exist"),
    "output dir that is a file": (lambda csv: ["--output_dir", str(csv)], "is a file, not a folder"),
    "device that is not there": (lambda csv: ["--device", "cuda:77"], "--device cuda:77"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_end_with_2_and_a_message(tmp_path, capsys, case: str) -> None:
    """No traceback, no results."""
    act, words = MISTAKES[case]
    csv = small_set(tmp_path / "data")
    more = act(csv)
    before = snapshot(tmp_path / "data")
    assert run(csv, tmp_path / "out", *more) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and "Traceback" not in error and re.search(words, error, re.S), error
    assert snapshot(tmp_path / "data") == before and not list(tmp_path.glob("out/*/*/results.json"))


@pytest.mark.parametrize("words", [["--k", "0"], ["--k", "x"], ["--temperature", "0"], ["--temperature", "-1"],
                                   ["--temperature", "nan"], ["--temperature", "inf"], ["--shots", "0"],
                                   ["--episodes", "1"], ["--gallery", "all"], ["--exclude", "image"],
                                   ["--queries_shown", "-1"], ["--k"]])
def test_bad_values_exit_with_2(tmp_path, capsys, words: list[str]) -> None:
    """argparse names the option."""
    with pytest.raises(SystemExit) as error:
        run(tmp_path / "a.csv", tmp_path / "out", *words)
    assert error.value.code == 2 and words[0] in capsys.readouterr().err
