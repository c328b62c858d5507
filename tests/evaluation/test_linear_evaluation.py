"""The evaluation on given features: who is fitted on what, what is written, and the summary over seeds."""

import json

import numpy as np
import pandas as pd
import pytest

from furnace.data.manifest import ROW, read_manifest
from furnace.data.splits import take_percent
from furnace.evaluation.calibration import fit_temperature
from furnace.evaluation.linear_evaluation import (
    LabelledFeatures,
    Protocol,
    draw_subsets,
    evaluate_once,
    needed_images,
    summarise_runs,
    summary_lines,
)
from furnace.evaluation.linear_probe import fit_linear_probe
from furnace.evaluation.metrics import classification_metrics
from furnace.evaluation.probe_sweep import sweep_linear_probe
from furnace.evaluation.saved_probe import load_probe
from furnace.models import LoadReport, Provenance
from furnace.runtime.files import UserError
from furnace.runtime.run_directory import child_runs, open_run
from helpers import small_set

ORIGIN = Provenance(name="demo", weights="random", file="seed 0", sha256="ab" * 32, report=LoadReport(matched=()),
                    data_config={"input_size": [3, 8, 8]})
PROTOCOL = Protocol(probe="published", monitor=None, stratify=False, resamples=100,
                    amp_dtype="fp32", transform="published", checkpoint=None, model_seed=0)
WHOLE = {"percent_data": 1.0, "seed": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> LabelledFeatures:
    """3 classes x (8 train, 4 val, 6 test) images, the rows of the CSV mixed, with (N, 6) made-up features."""
    path = small_set(tmp_path_factory.mktemp("set"), per_split={"train": 8, "val": 4, "test": 6})
    pd.read_csv(path).sample(frac=1, random_state=0).to_csv(path, index=False)
    manifest = read_manifest(path, nb_classes=3)
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((3, 6))
    features = 3 * (centres[manifest.labels] + 1.5 * rng.standard_normal((len(manifest), 6)))
    return LabelledFeatures(manifest, features.astype(np.float32))


def whole(data: LabelledFeatures):
    """All train images, in the order of the published draw."""
    return take_percent(data.manifest.split("train"), 1.0)


def new_run(folder, name="run"):
    return open_run(folder / name, parts={"task": name, "percent_data": 1.0, "seed": 0}, environment={})


def test_rows_follow_the_manifest(data) -> None:
    by_row = dict(zip(data.manifest.frame[ROW], data.embeddings, strict=True))
    for part in (data.split("val"), data.of(data.manifest.take([5, 2, 9])),
                 data.of(take_percent(data.manifest.split("train"), 0.5, seed=3))):
        np.testing.assert_array_equal(part.embeddings, [by_row[row] for row in part.manifest.frame[ROW]])


def test_rows_that_lie_together_are_not_copied(data) -> None:
    ordered = LabelledFeatures(data.manifest.split("train").join(data.manifest.split("test")), data.embeddings[:42])
    assert np.shares_memory(ordered.split("test").embeddings, ordered.embeddings)


def test_needed_images(data) -> None:
    settings = [{"percent_data": 0.25, "seed": seed} for seed in (0, 1)]
    needed = needed_images(data.manifest, draw_subsets(data.manifest, settings, "published"))
    train = data.manifest.split("train")
    wanted = set().union(*(take_percent(train, 0.25, seed=seed).filenames for seed in (0, 1)))
    assert set(needed.split("train").filenames) == wanted and 6 < len(wanted) < 24
    assert needed.split("test").filenames == data.manifest.split("test").filenames
    assert needed.split("val").filenames == data.manifest.split("val").filenames
    assert needed.frame[ROW].is_monotonic_increasing
    assert len(needed_images(data.manifest, [whole(data)])) == len(data.manifest)


def test_parts_without_two_classes_are_all_told(data) -> None:
    settings = [{"percent_data": p, "seed": s} for p in (0.05, 0.5) for s in (0, 1)]
    with pytest.raises(UserError) as caught:
        draw_subsets(data.manifest, settings, "published")
    assert str(caught.value).count("--percent_data 0.05, seed") == 2 and "0.5, seed" not in str(caught.value)
    drawn = draw_subsets(data.manifest, settings[2:], "stratified")
    expected = [take_percent(data.manifest.split("train"), 0.5, mode="stratified", seed=s).filenames for s in (0, 1)]
    assert [subset.filenames for subset in drawn] == expected


def test_the_fit_sees_its_subset(data, tmp_path, monkeypatch) -> None:
    """With features of the needed images only."""
    setting = {"percent_data": 0.5, "seed": 4}
    (subset,) = draw_subsets(data.manifest, [setting], "published")
    needed = data.of(needed_images(data.manifest, [subset]))
    seen = []

    def fit(features, labels, **kwargs):
        seen.append(features)
        return fit_linear_probe(features, labels, **kwargs)

    monkeypatch.setattr("furnace.evaluation.linear_evaluation.fit_linear_probe", fit)
    results = evaluate_once(new_run(tmp_path), setting, subset, needed, None, PROTOCOL, ORIGIN, plots=False)
    np.testing.assert_array_equal(seen[0], data.of(subset).embeddings)
    assert len(seen[0]) == 12 == results["setting"]["train_images"]


def test_published_probe_is_fitted_on_train_and_calibrated_on_val(data, tmp_path) -> None:
    run = new_run(tmp_path)
    results = evaluate_once(run, WHOLE, whole(data), data, None, PROTOCOL, ORIGIN)
    train = data.of(whole(data))
    probe = fit_linear_probe(train.embeddings, train.manifest.labels, nb_classes=3)
    test, val = data.split("test"), data.split("val")
    probabilities = probe.predict_proba(test.embeddings)
    stored = pd.read_csv(run.path / "test.csv")
    np.testing.assert_array_equal(stored.filter(like="probability_").to_numpy(np.float32), probabilities)
    metrics = classification_metrics(test.manifest.labels, probabilities)
    entries = results["splits"]["test"]["metrics"]
    assert entries["bacc"]["value"] == metrics["bacc"] and entries["bacc"]["low"] <= metrics["bacc"]
    temperature = fit_temperature(probe.predict_proba(val.embeddings), val.manifest.labels)
    assert results["splits"]["test"]["calibration"]["temperature"] == pytest.approx(temperature)
    saved = load_probe(run.path)
    assert saved.temperature == pytest.approx(temperature) and saved.fitted_on == "12 val images"
    np.testing.assert_array_equal(saved.probe.predict_proba(test.embeddings), probabilities)
    assert {p.name for p in (run.path / "plots").iterdir()} == {"confusion.png", "roc.png", "precision_recall.png",
                                                                "reliability.png"}
    assert len(pd.read_csv(run.path / "val.csv")) == 12
    json.dumps(results, allow_nan=False)


def test_sweep_calibrates_the_probe_that_has_not_seen_val(data, tmp_path) -> None:
    run = new_run(tmp_path)
    protocol = Protocol(**{**vars(PROTOCOL), "probe": "sweep", "monitor": "acc"})
    results = evaluate_once(run, WHOLE, whole(data), data, None, protocol, ORIGIN, plots=False)
    train, val = data.of(whole(data)), data.split("val")
    sweep = sweep_linear_probe(train.embeddings, train.manifest.labels, val.embeddings, val.manifest.labels,
                               nb_classes=3, monitor="acc")
    expected = fit_temperature(sweep.on_train.predict_proba(val.embeddings), val.manifest.labels)
    told = results["splits"]["test"]["calibration"]
    assert (told and told["temperature"]) == (expected and pytest.approx(expected))
    assert results["probe"]["cost"] == sweep.strength and len(results["probe"]["sweep"]) == 20
    np.testing.assert_array_equal(load_probe(run.path).probe.weight, sweep.probe.weight)
    assert not (run.path / "plots").exists()


def test_without_val_there_is_no_calibration(data, tmp_path) -> None:
    few = data.of(data.manifest.take(np.flatnonzero((data.manifest.frame["split"] != "val").to_numpy())))
    run = new_run(tmp_path)
    results = evaluate_once(run, WHOLE, whole(data), few, None, PROTOCOL, ORIGIN, plots=False)
    assert results["splits"]["test"]["calibration"] is None and load_probe(run.path).temperature is None
    assert not (run.path / "val.csv").exists()


def test_an_external_set_is_told_besides(data, tmp_path) -> None:
    outer = LabelledFeatures(data.manifest.split("test").take(range(7)), data.split("test").embeddings[:7])
    run = new_run(tmp_path)
    results = evaluate_once(run, WHOLE, whole(data), data, outer, PROTOCOL, ORIGIN, plots=False)
    assert results["splits"]["external"]["n"] == 7 and len(pd.read_csv(run.path / "external.csv")) == 7
    assert [row.split(",")[0] for row in results["table_rows"]] == ["small", "small->small"]


def test_summary_over_seeds(data, tmp_path) -> None:
    """Of the test split and of an external one."""
    parent = new_run(tmp_path, "parent")
    settings = [{"percent_data": p, "seed": s} for p in (0.25, 1.0) for s in (0, 1, 2)]
    subsets = draw_subsets(data.manifest, settings, "stratified")
    outer = LabelledFeatures(data.manifest.split("val"), data.split("val").embeddings)
    outcomes = child_runs(parent, settings, lambda run, setting: evaluate_once(
        run, setting, subsets[settings.index(setting)], data, outer, PROTOCOL, ORIGIN, plots=False))
    results = summarise_runs(parent, outcomes)
    table = pd.read_csv(parent.path / "table.csv")
    assert table["split"].tolist() == ["test", "external"] * 6
    table = table[table["split"] == "test"]
    assert table["percent_data"].tolist() == [0.25] * 3 + [1.0] * 3 and table["seed"].tolist() == [0, 1, 2] * 2
    assert table["train_images"].tolist() == [6] * 3 + [24] * 3
    for row, split in ((0, "test"), (2, "external")):
        values = [json.loads((parent.path / f"percent_data_0.25_seed_{s}" / "results.json").read_text())
                  ["splits"][split]["metrics"]["brier"]["value"] for s in (0, 1, 2)]
        entry = results["summary"][row]
        assert (entry["split"], entry["percent_data"], entry["runs"]) == (split, 0.25, 3)
        assert entry["brier_mean"] == pytest.approx(np.mean(values))
        assert entry["brier_sd"] == pytest.approx(np.std(values, ddof=1))
        assert len(set(values)) > 1, "each seed draws other images"
    stored = pd.read_csv(parent.path / "summary.csv")
    assert stored["brier_mean"].tolist() == pytest.approx([entry["brier_mean"] for entry in results["summary"]])
    assert {p.name for p in (parent.path / "plots").iterdir()} == {"label_efficiency.png",
                                                                   "label_efficiency_external.png"}
    assert results["table_rows"][2].startswith("small@percent_0.25_seed_1,") and len(results["table_rows"]) == 12
    first = results["summary"][0]
    assert f"{first['acc_mean']:.4f} ({first['acc_sd']:.4f})" in summary_lines(results)
