"""A probe survives its files bit for bit; damage and wrong folders are told."""

import json

import numpy as np
import pytest

from furnace.evaluation.linear_probe import LinearProbe
from furnace.evaluation.saved_probe import load_probe, save_probe
from furnace.models import LoadReport, Provenance
from furnace.runtime.files import UserError

RNG = np.random.default_rng(0)
# scikit-learn's weights come in Fortran order, whose bytes safetensors would store as if they were in C order
PROBE = LinearProbe(weight=RNG.standard_normal((8, 3)).astype(np.float32).T, bias=RNG.standard_normal(3, "float32"),
                    classes=np.array([0, 1, 3]), nb_classes=4, cost=0.24, objective=1.0, iterations=17)
CONFIG = {"input_size": [3, 224, 224], "mean": [0.5, 0.5, 0.5], "std": [0.1, 0.1, 0.1], "crop_pct": 0.875,
          "crop_mode": "center", "interpolation": "bilinear"}
ORIGIN = Provenance(name="demo", weights="file", file="w.pth", sha256="ab" * 32, report=LoadReport(matched=()),
                    data_config=CONFIG)


def save(folder, **change) -> None:
    save_probe(folder, PROBE, **{**dict(class_names=("a", "b", "c", "é"), provenance=ORIGIN, checkpoint=None, seed=2,
                                        transform="published", amp_dtype="bf16", temperature=1.7,
                                        fitted_on="9 val images"), **change})


def test_round_trip(tmp_path) -> None:
    save(tmp_path)
    for location in (tmp_path, tmp_path / "probe.json", tmp_path / "probe.safetensors"):
        found = load_probe(location)
        features = RNG.standard_normal((5, 8)).astype(np.float32)
        np.testing.assert_array_equal(found.probe.predict_proba(features), PROBE.predict_proba(features))
        assert found.class_names == ("a", "b", "c", "é") and found.probe.nb_classes == 4 and found.probe.cost == 0.24
        assert (found.model, found.checkpoint, found.weights_sha256, found.seed) == ("demo", None, "ab" * 32, 2)
        assert (found.transform, found.amp_dtype, found.temperature) == ("published", "bf16", 1.7)
        assert found.data_config == CONFIG and found.fitted_on == "9 val images"


def test_a_relative_checkpoint_becomes_absolute(tmp_path, monkeypatch) -> None:
    (tmp_path / "w.pth").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    save(tmp_path, checkpoint="w.pth")
    assert load_probe(tmp_path).checkpoint == str(tmp_path / "w.pth")
    save(tmp_path, checkpoint="hf-hub:owner/name")
    assert load_probe(tmp_path).checkpoint == "hf-hub:owner/name"


def test_mistakes(tmp_path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_probe(tmp_path / "no")
    save_into = tmp_path / "runs" / "percent_data_0.1_seed_0"
    save_into.mkdir(parents=True)
    save(save_into)
    with pytest.raises(UserError, match=r"has no probe.json.*below it there are: percent_data_0.1_seed_0"):
        load_probe(tmp_path / "runs")
    told = json.loads((save_into / "probe.json").read_text())
    for text in ("{", json.dumps({**told, "format": 9}), json.dumps({k: v for k, v in told.items() if k != "model"})):
        (save_into / "probe.json").write_text(text)
        with pytest.raises(UserError, match="damaged|format 9"):
            load_probe(save_into)
    (save_into / "probe.json").write_text(json.dumps(told))
    (save_into / "probe.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match="is damaged"):
        load_probe(save_into)
