"""evaluate_predictions.py: the published models' rows, one table over all files, clusters, lesions, users' mistakes."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as sk

import evaluate_predictions
from furnace.evaluation.report import predictions_table
from helpers import ROOT, write_csv

PUBLISHED = ROOT.parent / "shared" / "data" / "published_predictions"
HAM_METADATA = ROOT.parent / "shared" / "data" / "metadata" / "HAM10000_metadata.csv"
PLOTS = ["confusion.png", "precision_recall.png", "reliability.png", "roc.png"]


@pytest.fixture
def no_plots(monkeypatch) -> None:
    """For tests of numbers and messages."""
    monkeypatch.setattr(evaluate_predictions, "draw_classification_plots", lambda *_: [])


def small_file(path: Path, *, skill: float = 1.5, k: int = 3, n: int = 60, seed: int = 0, prefix: str = "",
               order: np.ndarray | None = None, **columns: list) -> Path:
    """A predictions CSV; the labels depend on n and k only, so that files agree."""
    labels = np.random.default_rng(99).integers(0, k, n)
    p = np.exp(np.random.default_rng(seed).normal(size=(n, k)) + skill * np.eye(k)[labels])
    table = predictions_table([f"{prefix}{i}.jpg" for i in range(n)], labels, p / p.sum(axis=1, keepdims=True))
    table = table.assign(**columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    (table if order is None else table.iloc[order]).to_csv(path, index=False)
    return path


def run(output: Path, *words: object) -> int:
    """The script in this process, with few resamples."""
    return evaluate_predictions.main([*map(str, words), "--output_dir", str(output), "--resamples", "100"])


def results_of(output: Path) -> dict:
    """Strict JSON."""
    return json.loads((output / "results.json").read_text())


def test_two_files(tmp_path, capsys, caplog) -> None:
    """All files written; the table's numbers against scikit-learn; rows matched by name, not by position."""
    a = small_file(tmp_path / "A" / "test.csv")
    order = np.random.default_rng(1).permutation(60)
    b = small_file(tmp_path / "B" / "test.csv", skill=0.5, seed=5, prefix="/elsewhere/", order=order)
    caplog.set_level("INFO")
    assert run(tmp_path / "out", a, b) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["plots", "results.json", "table.csv", "table.md"]
    for name in "AB":
        assert sorted(p.name for p in (tmp_path / "out" / "plots" / name).iterdir()) == PLOTS
    table = pd.read_csv(tmp_path / "out" / "table.csv").set_index(["metric", "model"])
    values = {}
    for name, path in (("A", a), ("B", b)):
        frame = pd.read_csv(path)
        predicted = frame[[f"probability_class_{k}" for k in range(3)]].to_numpy().argmax(axis=1)
        values[name] = sk.balanced_accuracy_score(frame["true_label"], predicted)
        assert table.loc[("bacc", name), "value"] == pytest.approx(values[name], abs=1e-8)
        p = frame[[f"probability_class_{k}" for k in range(3)]].to_numpy()
        assert table.loc[("auroc", name), "value"] == pytest.approx(
            sk.roc_auc_score(frame["true_label"], p, multi_class="ovo"), abs=1e-8)
    assert table.loc[("bacc", "B"), "difference"] == pytest.approx(values["B"] - values["A"], abs=1e-8)
    both = pd.read_csv(a)["true_label"].to_numpy() == pd.read_csv(a)["predicted_label"].to_numpy()
    assert table.loc[("acc", "A"), "value"] == pytest.approx(both.mean())
    results = results_of(tmp_path / "out")
    assert results["task"] == "evaluate_predictions" and results["class_names"] == ["0", "1", "2"]
    assert results["files"]["A"]["n"] == 60 and results["files"]["A"]["path"] == str(a)
    assert results["files"]["A"]["resampling"] == "100 resamples of images"
    assert results["differences"]["B"]["compared_with"] == "A"
    assert results["differences"]["B"]["metrics"]["bacc"]["p_value"] == pytest.approx(
        table.loc[("bacc", "B"), "p_value"])
    assert results["settings"]["seed"] == 0 and results["settings"]["resamples"] == 100
    assert (tmp_path / "out" / "table.md").read_text().startswith("| metric | model | value |")
    assert re.search(r"^bacc +A +0\.\d{4} +\[0\.\d{4}, 0\.\d{4}\]$", caplog.text, re.M), caplog.text
    assert "differences are to A" in caplog.text


def test_order_of_rows_does_not_matter(tmp_path, no_plots) -> None:
    """The same file shuffled is the same model: no difference at all."""
    a = small_file(tmp_path / "a.csv")
    b = small_file(tmp_path / "b.csv", order=np.random.default_rng(1).permutation(60))
    assert run(tmp_path / "out", a, b) == 0
    found = results_of(tmp_path / "out")["differences"]["b"]["metrics"]
    for metric in ("acc", "bacc", "auroc", "brier"):
        assert found[metric]["difference"] == pytest.approx(0, abs=1e-12), metric
        assert found[metric]["p_value"] in (None, 1.0)


def test_seed_and_bootstrap_count(tmp_path, no_plots) -> None:
    """Same seed, same intervals; another seed or another bootstrap, others."""
    a = small_file(tmp_path / "a.csv")
    intervals = {}
    for name, more in {"one": [], "again": [], "seed": ["--seed", 1], "stratified": ["--bootstrap", "stratified"]
                       }.items():
        assert run(tmp_path / name, a, *more) == 0
        entry = results_of(tmp_path / name)["files"]["a"]["metrics"]["acc"]
        intervals[name] = (entry["low"], entry["high"])
    assert intervals["one"] == intervals["again"]
    assert len(set(intervals.values())) == 3
    assert "stratified by class" in results_of(tmp_path / "stratified")["files"]["a"]["resampling"]


def test_names_and_class_names(tmp_path) -> None:
    """--names in tables, in results.json and as folders; --class_names in results.json."""
    a, b = small_file(tmp_path / "a.csv"), small_file(tmp_path / "b.csv", seed=3)
    names = tmp_path / "classes.txt"
    names.write_text("nevus\nmelanoma\nBCC\n")
    assert run(tmp_path / "out", a, b, "--names", "Model A", "B/2", "--class_names", names) == 0
    assert results_of(tmp_path / "out")["class_names"] == ["nevus", "melanoma", "BCC"]
    assert list(results_of(tmp_path / "out")["files"]) == ["Model A", "B/2"]
    assert sorted(p.name for p in (tmp_path / "out" / "plots").iterdir()) == ["B-2", "Model-A"]


def test_metadata_clusters_the_intervals(tmp_path, no_plots) -> None:
    """Ten lesions of six images each: joined by image_id, wider than images alone; the choice of column counts."""
    n = 60
    lesions, patients = [f"L{i // 6}" for i in range(n)], [f"P{i // 30}" for i in range(n)]
    a = small_file(tmp_path / "a.csv", prefix="images/")
    meta = write_csv(tmp_path / "meta.csv", image_id=[str(i) for i in range(n)][::-1], lesion_id=lesions[::-1],
                     patient_id=patients[::-1])
    said = {}
    for name, more in {"plain": [], "both": ["--csv_path", meta],
                       "lesion": ["--csv_path", meta, "--group_column", "lesion_id"]}.items():
        assert run(tmp_path / name, a, *more) == 0
        said[name] = results_of(tmp_path / name)["files"]["a"]["resampling"]
    assert "images" in said["plain"] and "patient_id" in said["both"] and "lesion_id" in said["lesion"]
    own = small_file(tmp_path / "own.csv", lesion_id=lesions)
    assert run(tmp_path / "own", own) == 0
    assert results_of(tmp_path / "own")["files"]["own"]["resampling"] == said["lesion"]


def test_aggregate(tmp_path, no_plots) -> None:
    """Lesion level by hand: the mean of the probabilities of its images, for both files."""
    n = 60
    a = small_file(tmp_path / "a.csv", lesion_id=[f"L{i}" for i in range(n)])
    frame = pd.read_csv(a)
    twice = pd.concat([frame, frame.assign(filename="x" + frame["filename"])])
    swapped = twice.copy()
    columns = [f"probability_class_{k}" for k in range(3)]
    swapped.iloc[:n, swapped.columns.get_indexer(columns)] = 1 / 3  # the mean of this and the original
    twice.to_csv(tmp_path / "twice.csv", index=False)
    swapped.drop(columns="predicted_label").to_csv(tmp_path / "swapped.csv", index=False)
    assert run(tmp_path / "out", tmp_path / "twice.csv", tmp_path / "swapped.csv", "--aggregate", "lesion_id") == 0
    files = results_of(tmp_path / "out")["files"]
    assert files["twice"]["n"] == files["swapped"]["n"] == n
    labels, p = frame["true_label"].to_numpy(), frame[columns].to_numpy()
    brier = ((p - np.eye(3)[labels]) ** 2).sum(axis=1).mean()
    assert files["twice"]["metrics"]["brier"]["value"] == pytest.approx(brier, abs=1e-8)
    brier = ((p / 2 + 1 / 6 - np.eye(3)[labels]) ** 2).sum(axis=1).mean()
    assert files["swapped"]["metrics"]["brier"]["value"] == pytest.approx(brier, abs=1e-8)
    assert files["swapped"]["metrics"]["acc"]["value"] == pytest.approx((p.argmax(axis=1) == labels).mean())
    assert "lesion" in files["twice"]["resampling"] and "image" not in files["twice"]["resampling"]


def test_results_are_not_replaced_unless_asked(tmp_path, capsys, no_plots) -> None:
    """Exit code 2 and the same bytes; with --overwrite computed anew, never answered from."""
    a, b = small_file(tmp_path / "a.csv"), small_file(tmp_path / "b.csv", seed=3)
    assert run(tmp_path / "out", a) == 0
    before = (tmp_path / "out" / "results.json").read_bytes()
    assert run(tmp_path / "out", b) == 2
    assert "add --overwrite" in capsys.readouterr().err
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    assert run(tmp_path / "out", b, "--overwrite") == 0
    assert list(results_of(tmp_path / "out")["files"]) == ["b"]


@pytest.mark.parametrize("name,content", [("results.json", '{"task": "linear_probe"}'), ("results.json", "[]"),
                                          ("results.json", "{"), ("table.csv", "mine"), ("plots", "mine")])
def test_other_peoples_files_are_never_replaced(tmp_path, capsys, name: str, content: str) -> None:
    """Not even with --overwrite."""
    a = small_file(tmp_path / "a.csv")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text(content)
    assert run(tmp_path / "out", a, "--overwrite") == 2
    assert f"holds {name} which this script did not write" in capsys.readouterr().err
    assert (tmp_path / "out" / name).read_text() == content and len(list((tmp_path / "out").iterdir())) == 1


def test_an_input_is_never_written_over(tmp_path, capsys, no_plots) -> None:
    """Predictions called table.csv in the output folder, beside our former results."""
    assert run(tmp_path / "out", small_file(tmp_path / "a.csv")) == 0
    table = small_file(tmp_path / "out" / "table.csv")
    before = table.read_bytes()
    assert run(tmp_path / "out", table, "--overwrite", "--names", "x") == 2
    assert table.read_bytes() == before and "table.csv" in capsys.readouterr().err


MISTAKES = {
    "absent file": (lambda d: [d / "nowhere.csv"], r"nowhere\.csv does not exist; .* has: a\.csv"),
    "two bad files": (lambda d: [small_file(d / "b.csv", true_label=["x"] * 60), small_file(d / "c.csv", k=2,
                                                                                            true_label=[7] * 60)],
                      r"60 problems in .*b\.csv.*row 2, column true_label.*60 problems.*c\.csv.*7 is not in 0\.\.1"),
    "other images": (lambda d: [d / "a.csv", small_file(d / "b.csv", prefix="x")],
                     r"b cannot be compared with a: images only in a: 60 \(0\.jpg, 1\.jpg, 2\.jpg, \.\.\.\)"),
    "a subset": (lambda d: [d / "a.csv", small_file(d / "b.csv", order=np.arange(50))],
                 r"images only in a: 10 \(50\.jpg, 51\.jpg, 52\.jpg, \.\.\.\)"),
    "other labels": (lambda d: [d / "a.csv", small_file(d / "b.csv", true_label=[0] * 60)], "true labels of .* differ"),
    "other classes": (lambda d: [d / "a.csv", small_file(d / "b.csv", k=4)], "4 classes and 3"),
    "same file twice": (lambda d: [d / "a.csv", d / "a.csv"], "given twice"),
    "names too few": (lambda d: [d / "a.csv", small_file(d / "b.csv"), "--names", "x"], "1 names for 2 predictions"),
    "names alike": (lambda d: [d / "a.csv", small_file(d / "b.csv"), "--names", "x y", "x-y"], "too alike"),
    "name empty": (lambda d: [d / "a.csv", "--names", " "], "give others by --names"),
    "class names": (lambda d: [d / "a.csv", "--class_names", write_csv(d / "c.txt", a=[1])], "2 different names for 3"),
    "no lesions": (lambda d: [d / "a.csv", "--aggregate", "lesion_id"], "needs the column lesion_id.*--csv_path"),
    "no group column": (lambda d: [d / "a.csv", "--group_column", "patient_id"], "patient_id: .*a.csv has no such"),
    "metadata of others": (lambda d: [d / "a.csv", "--csv_path", write_csv(d / "m.csv", image=["q"], lesion_id=["L"])],
                           r"lacks 60 of the 60 images of .*a\.csv, e\.g\. 0\.jpg"),
    "lesion of two labels": (lambda d: [small_file(d / "b.csv", lesion_id=["L"] * 60), "--aggregate", "lesion_id"],
                             "differ in label: L"),
    "output is a file": (lambda d: [d / "a.csv", "--output_dir", d / "a.csv"], "is a file, not a folder"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_end_with_2_and_a_message(tmp_path, capsys, case: str) -> None:
    """No traceback, no results."""
    act, words = MISTAKES[case]
    small_file(tmp_path / "data" / "a.csv")
    words_of_command = act(tmp_path / "data")
    output = [] if "--output_dir" in words_of_command else ["--output_dir", tmp_path / "out"]
    assert evaluate_predictions.main([str(word) for word in [*words_of_command, *output]]) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and "Traceback" not in error
    assert re.search(words, error, re.S), error
    assert not (tmp_path / "out" / "results.json").exists()


def test_options_from_a_yaml_file(tmp_path, no_plots, capsys) -> None:
    """-c, with the predictions on the command line and not in the file."""
    (tmp_path / "p.yaml").write_text("predictions: [a.csv]\n")
    assert evaluate_predictions.main(["-c", str(tmp_path / "p.yaml"), "x.csv"]) == 2
    assert "predictions must stand on the command line" in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text("seed: 3\nbootstrap: stratified\n")
    assert run(tmp_path / "out", small_file(tmp_path / "a.csv"), "-c", tmp_path / "c.yaml") == 0
    settings = results_of(tmp_path / "out")["settings"]
    assert (settings["seed"], settings["bootstrap"]) == (3, "stratified")


@pytest.mark.skipif(not PUBLISHED.exists(), reason="needs ../shared/data/published_predictions")
def test_published_models(tmp_path, no_plots) -> None:
    """Three models on HAM10000: the published rows to the fourth decimal, their intervals, lesions, differences."""
    folders = {"PanDerm": "PanDerm_HAM", "DINOv3": "DINOv3-L16_HAM", "CLIP": "CLIP-Large_HAM"}
    paths = [PUBLISHED / "HAM_100pct" / folder / "HAM-official-7-lp.csv" for folder in folders.values()]
    assert run(tmp_path / "out", *paths, "--names", *folders) == 0
    results = results_of(tmp_path / "out")
    columns = {"W_F1": "weighted_f1", "AUROC": "auroc", "BACC": "bacc", "ACC": "acc", "AUPR": "aupr"}
    for name, folder in folders.items():
        published = pd.read_csv(next((PUBLISHED / "HAM_100pct" / folder).glob("*_results.csv"))).iloc[0]
        metrics = results["files"][name]["metrics"]
        assert {c: f"{metrics[m]['value']:.4f}" for c, m in columns.items()} == {c: f"{published[c]:.4f}"
                                                                                  for c in columns}
        assert results["files"][name]["n"] == 1503
    reference = pd.read_csv(PUBLISHED / "reference_bootstrap_HAM.csv").set_index("Model")
    names = {"ACCURACY": "acc", "BALANCED_ACCURACY": "bacc", "WEIGHTED_F1": "weighted_f1", "AUROC": "auroc_ovr"}
    for published, ours in names.items():
        low, high = map(float, re.findall(r"[\d.]+", reference.loc["PanDerm", published])[1:3])
        entry = results["files"]["PanDerm"]["metrics"][ours]
        assert abs(entry["low"] - low) < 0.15 * (high - low) + 0.002 and abs(entry["high"] - high) < \
            0.15 * (high - low) + 0.002, (published, entry, low, high)
    worse = results["differences"]["CLIP"]["metrics"]["acc"]
    assert worse["difference"] == pytest.approx(0.8456 - 0.8822, abs=1e-4) and worse["high"] < 0
    assert run(tmp_path / "lesions", *paths, "--names", *folders, "--csv_path", HAM_METADATA) == 0
    assert results_of(tmp_path / "lesions")["files"]["CLIP"]["n"] == 1503
