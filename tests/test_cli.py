"""The README's commands, and a table of users' mistakes with their exit codes and messages.

Substitutions in the README's commands: its /path/to/your/PanDerm becomes a temporary folder, PanDerm_Large_LP becomes
PanDerm_Base_LP with the goldens' synthetic weights, and the data set has a few images.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import evaluate_predictions
import extract_features
import knn_eval
import linear_eval
import predict
from helpers import BLOCKS, ROOT, block_with, draw_images, golden_state, small_set, words_of, write_csv


def run(csv: Path, output: Path, *more: str, model: str = "demo", classes: int = 3) -> int:
    """linear_eval.py in this process."""
    return linear_eval.main(["--model", model, "--csv_path", str(csv), "--nb_classes", str(classes), "--output_dir",
                             str(output), "--amp_dtype", "fp32", "--num_workers", "0", *more])


def results_of(output: Path) -> dict:
    """The only results.json below a folder."""
    found = list(output.glob("*/*/results.json"))
    assert len(found) == 1
    return json.loads(found[0].read_text())


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file's bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ------------------------------------------------------------------------------------------------- README's commands

def test_readme_evaluation_command(tmp_path, base_checkpoint, monkeypatch) -> None:
    """Flag for flag, trailing blank included, from classification/; then again: answered from the stored results."""
    command = block_with("CUDA_VISIBLE_DEVICES=1 python3 linear_eval.py").split("python3 linear_eval.py", 1)[1]
    assert 'images/ "' in command, "the published command has a blank behind --root_path"
    data = tmp_path / "Evaluation_datasets" / "pad-ufes"
    small = small_set(data, classes=6, per_split={"train": 2, "val": 0, "test": 1})
    table = pd.read_csv(small)
    table["image"] = table["image"].str.removeprefix("images/")
    table.to_csv(data / "2000.csv", index=False)
    command = command.replace("\\\n", " ").replace("/path/to/your/PanDerm", str(tmp_path))
    words = shlex.split(command.replace('--model "PanDerm_Large_LP"', '--model "PanDerm_Base_LP"'))
    words[-1] = str(base_checkpoint)
    monkeypatch.chdir(ROOT / "classification")
    assert linear_eval.main(words) == 0
    output = tmp_path / "output_dir" / "PanDerm_res"
    lines = (output / "PanDerm_Large_LP_result.csv").read_text().splitlines()
    assert lines[0] == "Dataset,W_F1,AUROC,BACC,ACC,AUPR" and lines[1].startswith("2000,") and len(lines) == 2
    (folder,) = (output / "2000").iterdir()
    assert folder.name.startswith("PanDerm_Base_LP_")
    assert sorted(p.name for p in folder.iterdir()) == ["args.yaml", "env.json", "log.txt", "plots", "probe.json",
                                                          "probe.safetensors", "results.json", "test.csv"]
    predictions = pd.read_csv(folder / "test.csv")
    assert list(predictions) == ["filename", "true_label", "predicted_label",
                                 *(f"probability_class_{k}" for k in range(6))]
    assert (predictions["filename"] == table[table["split"] == "test"]["image"].tolist()).all()
    env = json.loads((folder / "env.json").read_text())
    assert env["weights"]["tensors"]["matched"] == 186 and env["csv_sha256"]
    before = snapshot(output)
    assert linear_eval.main(words) == 0
    assert snapshot(output) == before


def test_command_works_uninstalled_from_the_root(tmp_path) -> None:
    """A process of its own with an isolated path: sys.path[0] is the script's folder."""
    csv = small_set(tmp_path / "data")
    done = subprocess.run([sys.executable, "classification/linear_eval.py", "--model", "demo", "--csv_path", csv,
                           "--nb_classes", "3", "--output_dir", tmp_path / "out", "--device", "cpu"], cwd=ROOT,
                          capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    assert "bacc" in done.stdout and "results in" in done.stdout and "image/s" in done.stderr
    help_text = subprocess.run([sys.executable, "linear_eval.py", "--help"], cwd=ROOT / "classification",
                               capture_output=True, text=True)
    assert help_text.returncode == 0 and "--percent_mode" in help_text.stdout


def test_readme_python(demo_csv, monkeypatch, capsys) -> None:
    """The Python lines, on the small demo set."""
    code = block_with("from furnace import").replace("demo_data/synthetic_lesions.csv", str(demo_csv))
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102
    assert "'auroc'" in capsys.readouterr().out


def test_readme_demo_data(tmp_path) -> None:
    """The drawing command, for a few small pictures."""
    assert "python3 -m furnace.data.synthetic demo_data" in block_with("furnace.data.synthetic")
    done = subprocess.run([sys.executable, "-m", "furnace.data.synthetic", tmp_path / "d", "--images", "24", "--size",
                           "64"], capture_output=True, text=True, env={**os.environ, "PYTHONPATH":
                                                                      str(ROOT / "classification")})
    assert done.returncode == 0 and len(pd.read_csv(tmp_path / "d" / "synthetic_lesions.csv")) == 24, done.stderr


def test_readme_commands_beside_the_first(tmp_path, monkeypatch) -> None:
    """Label efficiency, k-NN, prediction, features, comparison: with a small backbone on a small set."""
    csv = small_set(tmp_path / "data", per_split={"train": 20, "val": 2, "test": 3})
    small = {"PanDerm_Large_LP": "timm:test_vit", "DATA/HAM_clean.csv": str(csv), "DATA/images": str(csv.parent),
             "../pretrain_weight/panderm_ll_data6_checkpoint-499.pth": "random"}
    more = ["--input_size", "160", "--num_workers", "0", "--amp_dtype", "fp32"]
    monkeypatch.chdir(tmp_path)
    words = words_of("python3 linear_eval.py --model PanDerm_Large_LP --nb_classes 7", {**small, "7": "3"})
    assert linear_eval.main([*words, *more, "--percent_mode", "stratified"]) == 0
    assert len(list(tmp_path.glob("output_dir/small/*/percent_data_*/probe.json"))) == 25
    assert knn_eval.main(words_of("python3 knn_eval.py", {**small, "7": "3"}) + more) == 0
    assert len(list(tmp_path.glob("output_dir/small/*/plots/retrieval.png"))) == 1
    probe = next(tmp_path.glob("output_dir/small/*/percent_data_1.0_seed_0"))
    assert predict.main(words_of("python3 predict.py --probe output_dir", {
        "output_dir/2000/PanDerm_Large_LP_<fingerprint>": str(probe), "PHOTOS": str(csv.parent / "images")})
        + ["--num_workers", "0"]) == 0
    assert len(pd.read_csv("predictions.csv")) == 75 and Path("predictions.png").exists()
    assert extract_features.main(words_of("python3 extract_features.py", small) + more) == 0
    assert np.load("features.npz")["embeddings"].shape == (75, 64)
    assert {"features_pca.png", "features.csv", "features_attention"} <= {p.name for p in tmp_path.iterdir()}
    names = [shutil.copy(probe / "test.csv", tmp_path / f"{name}.csv") for name in ("PanDerm", "DINOv3", "CLIP")]
    assert len(names) == 3 and evaluate_predictions.main(words_of("python3 evaluate_predictions.py", {})) == 0
    assert "DINOv3" in Path("comparison/table.md").read_text()


def test_quickstart(tmp_path) -> None:
    """The first command of the README, with the results elsewhere; its .venv must exist, as after script/test.sh."""
    assert "bash script/quickstart.sh" in BLOCKS[0]
    if not (ROOT / ".venv" / ".installed").exists():
        pytest.skip("quickstart.sh would install an environment: run the tests by script/test.sh")
    done = subprocess.run(["bash", "script/quickstart.sh", "--device", "cpu"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OUT": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "installing" not in done.stdout, "a second run must not install again"
    assert "bacc" in done.stdout and f"results in {tmp_path}/quickstart" in done.stdout
    assert results_of(tmp_path / "quickstart")["model"] == "pretrain_weight/derm_small"
    bacc = results_of(tmp_path / "quickstart")["splits"]["test"]["metrics"]["bacc"]["value"]
    assert 0.5 < bacc < 0.99


def test_lp_reproduce(tmp_path) -> None:
    """One set runs, one fails, the others are skipped by name; through the link in classification/, with options."""
    assert "bash script/lp_reproduce.sh" in block_with("cd classification\nbash script/lp_reproduce.sh")
    data = tmp_path / "data"
    small_set(data / "pad-ufes", classes=6, per_split={"train": 2, "val": 0, "test": 1})
    (data / "pad-ufes" / "small.csv").rename(data / "pad-ufes" / "2000.csv")
    table = pd.read_csv(data / "pad-ufes" / "2000.csv")
    table.assign(image=table["image"].str.removeprefix("images/")).to_csv(data / "pad-ufes" / "2000.csv", index=False)
    (data / "ddi" / "images").mkdir(parents=True)
    (data / "ddi" / "ddi_clean.csv").write_text("image,split\n")
    done = subprocess.run(["bash", "classification/script/lp_reproduce.sh", "--percent_data", "0.9", "--device", "cpu"],
                          cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "DATA_ROOT": str(data), "OUT": str(tmp_path / "out"), "MODELS": "demo",
                               "PYTHON": sys.executable, "WEIGHTS": str(tmp_path)})
    assert done.returncode == 1, done.stdout + done.stderr
    summary = done.stdout.split("\nran: ")[1]
    assert summary.startswith("1\n  demo on PAD-UFES\nskipped: 7\n") and summary.endswith("failed: 1\n  demo on DDI\n")
    for name in ("HAM10000", "BCN20000", "Derm7pt", "Dermnet", "HIBA", "MSKCC", "PATCH16"):
        assert f"  demo on {name} (no " in summary
    assert (tmp_path / "out" / "demo_result.csv").read_text().count("\n2000,") == 1
    assert "percent_data:\n- 0.9\n" in next((tmp_path / "out").glob("2000/*/args.yaml")).read_text()
    assert "amp_dtype: fp32" in next((tmp_path / "out").glob("2000/*/args.yaml")).read_text()


# --------------------------------------------------------------------------------------------------- what may be odd

def wrapped(state: dict) -> dict:
    """As a training script saves it."""
    return {"model": state, "epoch": 3}


def under_encoder(state: dict) -> dict:
    """As the Large file has its keys; the published Base loader ignored all of them."""
    return {f"encoder.{key}": value for key, value in state.items()}


@pytest.mark.parametrize("form", [wrapped, under_encoder])
def test_wrapped_and_prefixed_base_files_give_the_flat_files_numbers(tmp_path, base_checkpoint, form) -> None:
    """The same probabilities to the last bit."""
    csv = small_set(tmp_path / "data", classes=2, per_split={"train": 2, "val": 0, "test": 2})
    torch.save(form(golden_state("keys_base.json")), tmp_path / "other.pth")
    for name, path in (("flat", base_checkpoint), ("other", tmp_path / "other.pth")):
        assert run(csv, tmp_path / name, "--pretrained_checkpoint", str(path), model="PanDerm_Base_LP", classes=2) == 0
    one, two = (pd.read_csv(next((tmp_path / name).glob("*/*/test.csv"))) for name in ("flat", "other"))
    pd.testing.assert_frame_equal(one, two)


def test_byte_order_mark_and_decimal_labels(tmp_path) -> None:
    """A spreadsheet's CSV: BOM, CRLF, labels as 1.0."""
    csv = small_set(tmp_path / "data")
    want = run(csv, tmp_path / "plain") or results_of(tmp_path / "plain")
    text = re.sub(r"(\.png,)(\d),", r"\1\2.0,", csv.read_text()).replace("\n", "\r\n")
    assert ",1.0," in text
    csv.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert run(csv, tmp_path / "odd") == 0
    assert results_of(tmp_path / "odd")["splits"] == want["splits"]


def test_binary_set(tmp_path) -> None:
    """binary_label, with label beside it; probability is class 1's."""
    csv = small_set(tmp_path / "data", classes=4)
    table = pd.read_csv(csv)
    table.assign(binary_label=table["label"] // 2).to_csv(csv, index=False)
    assert run(csv, tmp_path / "out", classes=2) == 0
    predictions = pd.read_csv(next((tmp_path / "out").glob("*/*/test.csv")))
    assert list(predictions)[3:] == ["probability", "probability_class_0", "probability_class_1"]
    np.testing.assert_array_equal(predictions["probability"], predictions["probability_class_1"])
    assert set(predictions["true_label"]) == {0, 1}


def test_class_lost_by_percent_keeps_its_column(tmp_path, caplog) -> None:
    """A warning, probability 0, full width; and a class absent from test is no 0 but a reason."""
    csv = small_set(tmp_path / "data", classes=5, per_split={"train": 2, "val": 0, "test": 2})
    table = pd.read_csv(csv)
    table[~((table["split"] == "test") & (table["label"] == 4))].to_csv(csv, index=False)
    assert run(csv, tmp_path / "out", "--percent_data", "0.4", classes=5) == 0
    assert "leaves no train image of class" in caplog.text
    predictions = pd.read_csv(next((tmp_path / "out").glob("*/*/test.csv")))
    columns = predictions[[f"probability_class_{k}" for k in range(5)]]
    assert (columns.sum() == 0).any() and np.allclose(columns.sum(axis=1), 1, atol=1e-5)
    auroc = results_of(tmp_path / "out")["splits"]["test"]["metrics"]["auroc"]
    assert auroc["value"] is None and "class 4 is absent" in auroc["reason"]
    assert ",nan," in (tmp_path / "out" / "results.csv").read_text()


def test_output_folder_equal_to_the_data_folder(tmp_path) -> None:
    """Runs, and no byte of the data changes."""
    csv = small_set(tmp_path)
    before = snapshot(tmp_path)
    assert run(csv, tmp_path) == 0
    after = snapshot(tmp_path)
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[0] for name in set(after) - set(before)} == {"results.csv", "small"}
    assert run(csv, tmp_path, "--csv_filename", "small.csv", "--seed", "1") == 2
    assert {name: snapshot(tmp_path)[name] for name in before} == before


def test_overwrite_runs_again(tmp_path) -> None:
    """The same folder, a fresh file."""
    csv = small_set(tmp_path / "data")
    assert run(csv, tmp_path / "out") == 0
    path = next((tmp_path / "out").glob("*/*/test.csv"))
    first, inode = path.read_text(), path.stat().st_ino
    assert run(csv, tmp_path / "out", "--overwrite") == 0
    assert path.read_text() == first and path.stat().st_ino != inode
    assert (path.parent / "previous" / "test.csv").read_text() == first


def test_overwrite_that_fails_loses_nothing(tmp_path) -> None:
    """The former results lie in previous/ when the new run ends in a broken image."""
    csv = small_set(tmp_path / "data")
    assert run(csv, tmp_path / "out") == 0
    folder = next((tmp_path / "out").glob("*/*"))
    before = snapshot(folder)
    assert run(csv, tmp_path / "out", "--overwrite", "--device", "cuda:77") == 2 and snapshot(folder) == before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("furnace.data.datasets.load_rgb", lambda path: (_ for _ in ()).throw(OSError("cut")))
        assert run(csv, tmp_path / "out", "--overwrite", "--no_cache") == 2
    assert {name: (folder / "previous" / name).read_bytes() for name in before} == before


def test_deleted_predictions_are_made_again(tmp_path) -> None:
    """A finished run without its test.csv is not finished."""
    csv = small_set(tmp_path / "data")
    assert run(csv, tmp_path / "out") == 0
    path = next((tmp_path / "out").glob("*/*/test.csv"))
    first = path.read_text()
    path.unlink()
    assert run(csv, tmp_path / "out") == 0 and path.read_text() == first


def test_other_pictures_are_another_run(tmp_path) -> None:
    """Same CSV, other images under --root_path: not answered from the stored results."""
    csv = small_set(tmp_path / "data")
    assert run(csv, tmp_path / "out") == 0
    draw_images(tmp_path / "other", pd.read_csv(csv)["image"].tolist(), seed=5)
    assert run(csv, tmp_path / "out", "--root_path", str(tmp_path / "other")) == 0
    assert len(list((tmp_path / "out").glob("*/*/results.json"))) == 2
    path = tmp_path / "data" / "images" / "test_0_0.png"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # one bit, same size
    path.write_bytes(content)
    assert run(csv, tmp_path / "out") == 0
    assert len(list((tmp_path / "out").glob("*/*/results.json"))) == 3


def test_args_yaml_reproduces_the_run(tmp_path) -> None:
    """-c args.yaml is the run again, so it is answered from it."""
    csv = small_set(tmp_path / "data")
    more = ["--percent_data", "0.5", "--percent_mode", "stratified", "--overwrite", "--amp_dtype", "auto"]
    assert run(csv, tmp_path / "out", *more) == 0
    before = snapshot(tmp_path / "out")
    config = next((tmp_path / "out").glob("*/*/args.yaml"))
    shutil.copy(config, tmp_path / "again.yaml")
    assert linear_eval.main(["-c", str(tmp_path / "again.yaml")]) == 0
    assert snapshot(tmp_path / "out") == before


def extracted(output: Path) -> list[int]:
    """Of every finished command in an output folder, how many images it decoded."""
    logs = sorted(output.glob("*/*/log.txt"), key=lambda path: path.stat().st_mtime_ns)
    return [json.loads(log.read_text().splitlines()[-1])["images_extracted"] for log in logs]


def test_label_efficiency_extracts_once(tmp_path, caplog) -> None:
    """Every fraction and seed from one extraction; another seed, another fraction, a second run from none."""
    csv = small_set(tmp_path / "data", per_split={"train": 8, "val": 2, "test": 3})
    out, table = tmp_path / "out", tmp_path / "out" / "results.csv"
    more = ["--percent_mode", "stratified", "--seeds", "0", "1", "--percent_data"]
    assert run(csv, out, *more, "1.0", "0.25", "0.5") == 0
    (folder,) = (out / "small").iterdir()
    children = [f"percent_data_{p}_seed_{s}" for p in (0.25, 0.5, 1.0) for s in (0, 1)]
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["args.yaml", "env.json", "log.txt", *children, "plots", "results.json", "summary.csv", "table.csv"])
    assert sorted(p.name for p in (folder / children[0]).iterdir()) == [
        "env.json", "probe.json", "probe.safetensors", "results.json", "test.csv", "val.csv"]
    lines = pd.read_csv(folder / "table.csv")
    assert lines["percent_data"].tolist() == [0.25, 0.25, 0.5, 0.5, 1, 1] and lines["train_images"].tolist()[::2] == [
        6, 12, 24]
    assert [line.split(",")[0] for line in table.read_text().splitlines()[1:]] == [
        f"small@percent_{p:g}_seed_{s}" for p in (0.25, 0.5, 1.0) for s in (0, 1)]
    assert extracted(out) == [39] and "mean (SD) over seeds" in caplog.text
    before = snapshot(out)
    assert run(csv, out, *more, "0.25", "0.5", "1.0") == 0, "the same fractions in another order are the same run"
    assert snapshot(out) == before
    assert run(csv, out, "--seeds", "7", "--percent_data", "0.75") == 0
    assert run(csv, out) == 0
    assert extracted(out) == [39, 0, 0]
    alone = next(path for path in (out / "small").iterdir() if (path / "test.csv").exists()
                 and "percent_data:\n- 1.0" in (path / "args.yaml").read_text())
    whole = pd.read_csv(alone / "test.csv").filter(like="probability_")
    of_list = pd.read_csv(folder / "percent_data_1.0_seed_0" / "test.csv").filter(like="probability_")
    np.testing.assert_allclose(whole, of_list, atol=2e-4)  # stratified draws the same images in another order


def test_only_the_needed_images_are_decoded(tmp_path) -> None:
    csv = small_set(tmp_path / "data", per_split={"train": 8, "val": 0, "test": 2})
    assert run(csv, tmp_path / "out", "--percent_data", "0.25", "--no_cache") == 0
    assert extracted(tmp_path / "out") == [6 + 6]


def test_interrupted_overwrite_keeps_no_old_child(tmp_path, monkeypatch) -> None:
    """All children of the former run are put away before the first is made again."""
    csv = small_set(tmp_path / "data", per_split={"train": 6, "val": 0, "test": 2})
    more = ["--percent_data", "0.5", "1.0", "--percent_mode", "stratified"]
    assert run(csv, tmp_path / "out", *more) == 0
    fit = linear_eval.evaluate_once
    monkeypatch.setattr(linear_eval, "evaluate_once", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(csv, tmp_path / "out", *more, "--overwrite") == 130
    made = []
    monkeypatch.setattr(linear_eval, "evaluate_once", lambda child, *args, **kwargs: (
        made.append(child.path.name), fit(child, *args, **kwargs))[1])
    assert run(csv, tmp_path / "out", *more) == 0
    assert made == ["percent_data_0.5_seed_0", "percent_data_1.0_seed_0"]


def test_interrupted_list_goes_on(tmp_path, monkeypatch) -> None:
    """Ctrl-C between two probes: the finished children are kept."""
    csv = small_set(tmp_path / "data", per_split={"train": 6, "val": 1, "test": 2})
    more = ["--percent_data", "0.5", "1.0", "--percent_mode", "stratified", "--seeds", "0", "1"]
    calls, fit = [], linear_eval.evaluate_once

    def counted(child, *args, **kwargs):
        calls.append(child.path.name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fit(child, *args, **kwargs)

    monkeypatch.setattr(linear_eval, "evaluate_once", counted)
    assert run(csv, tmp_path / "out", *more) == 130
    assert run(csv, tmp_path / "out", *more) == 0
    assert calls == [*calls[:3], *calls[2:3], calls[4]] and len(set(calls)) == 4
    assert extracted(tmp_path / "out") == [0]


def test_sweep(tmp_path) -> None:
    """A strength of the grid, chosen on val, told in results.json; another monitor is another run."""
    csv = small_set(tmp_path / "data", per_split={"train": 6, "val": 4, "test": 3})
    for monitor in ([], ["--monitor", "auroc"]):
        assert run(csv, tmp_path / "out", "--probe", "sweep", *monitor) == 0
    told = [json.loads(path.read_text())["probe"] for path in (tmp_path / "out").glob("*/*/results.json")]
    assert sorted(probe["monitor"] for probe in told) == ["auroc", "bacc"]
    for probe in told:
        values = {entry["C"]: entry[f"val_{probe['monitor']}"] for entry in probe["sweep"]}
        assert len(values) == 20 and values[probe["cost"]] == max(values.values())


def named_set(folder: Path, names: list[str], **more) -> Path:
    """A small set whose classes have these names, label k being names[k]."""
    csv = small_set(folder, classes=len(names), **more)
    table = pd.read_csv(csv)
    table.assign(class_name=[names[k] for k in table["label"]]).to_csv(csv, index=False)
    return csv


def test_external_test_set(tmp_path) -> None:
    """Its classes are found by name, although it numbers them otherwise; it is told beside the own test set."""
    csv = named_set(tmp_path / "data", ["akiec", "mel", "nv"], per_split={"train": 5, "val": 2, "test": 2})
    outer = named_set(tmp_path / "outer", ["nv", "MEL "], per_split={"train": 0, "val": 0, "test": 4})
    table = pd.read_csv(outer).rename(columns={"split": "part"})
    draw_images(outer.parent, table["image"].tolist(), seed=4)
    table.to_csv(outer.with_name("ddi.csv"), index=False)
    assert run(csv, tmp_path / "out", "--test_csv", str(outer.with_name("ddi.csv")), "--test_root",
               f"{outer.parent}/ ") == 0
    results = results_of(tmp_path / "out")
    assert results["splits"]["external"]["n"] == 8 and results["splits"]["test"]["n"] == 6
    stored = pd.read_csv(next((tmp_path / "out").glob("*/*/external.csv")))
    assert stored["true_label"].tolist() == [2] * 4 + [1] * 4 and stored.columns[-1] == "probability_class_2"
    reason = results["splits"]["external"]["metrics"]["auroc"]["reason"]
    assert "class 0 is absent" in reason
    assert [line.split(",")[0] for line in (tmp_path / "out" / "results.csv").read_text().splitlines()[1:]] == [
        "small", "small->ddi"]
    draw_images(outer.parent, table["image"].tolist(), seed=5)
    assert run(csv, tmp_path / "out", "--test_csv", str(outer.with_name("ddi.csv"))) == 0
    assert len(list((tmp_path / "out").glob("*/*/results.json"))) == 2, "other external pictures are another run"


def test_external_mistakes(tmp_path, capsys, caplog) -> None:
    csv = named_set(tmp_path / "data", ["akiec", "mel", "nv"])
    outer = named_set(tmp_path / "outer", ["nv", "scc"])
    assert run(csv, tmp_path / "out", "--test_csv", str(outer)) == 2
    error = capsys.readouterr().err
    assert "'scc'" in error and "akiec, mel, nv" in error and "unknown class" in error
    assert run(csv, tmp_path / "out", "--test_root", str(tmp_path)) == 2
    assert "--test_csv, which is missing" in capsys.readouterr().err
    assert run(csv, tmp_path / "out", "--monitor", "acc") == 2
    assert "the published probe has nothing to choose" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    train_again = pd.read_csv(csv).query("split == 'train'").assign(split="test")
    train_again.to_csv(csv.with_name("again.csv"), index=False)
    assert run(csv, tmp_path / "out", "--test_csv", str(csv.with_name("again.csv"))) == 0
    assert "12 x image also in train" in caplog.text
    val_again = pd.read_csv(csv).query("split == 'val'").assign(split="test")
    val_again.to_csv(csv.with_name("again.csv"), index=False)
    for probe, code in (("published", 0), ("sweep", 2)):  # the sweep is refitted on train and val
        assert run(csv, tmp_path / "out", "--test_csv", str(csv.with_name("again.csv")), "--probe", probe,
                   "--strict_split") == code
    assert "3 x image also in train" in capsys.readouterr().err


def test_two_processes_give_one_processs_numbers(tmp_path) -> None:
    """torchrun with two gloo ranks: nothing twice, nothing lost, one set of files."""
    csv = small_set(tmp_path / "data", per_split={"train": 5, "val": 0, "test": 3})
    assert run(csv, tmp_path / "one", "--no_cache") == 0
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0",
                           "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0",
                           ROOT / "classification" / "linear_eval.py", "--model", "demo", "--csv_path", csv,
                           "--nb_classes", "3", "--output_dir", tmp_path / "two", "--amp_dtype", "fp32", "--device",
                           "cpu", "--cache_dir", tmp_path / "cache"],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (pd.read_csv(next((tmp_path / n).glob("*/*/test.csv"))) for n in ("one", "two"))
    pd.testing.assert_frame_equal(one, two, atol=1e-3)  # other batches, other last bits; the fit magnifies them
    assert (tmp_path / "two" / "results.csv").read_text().count("\n") == 2
    assert run(csv, tmp_path / "three", "--cache_dir", str(tmp_path / "cache")) == 0
    assert extracted(tmp_path / "three") == [0], "both processes kept their features"
    three = pd.read_csv(next((tmp_path / "three").glob("*/*/test.csv")))
    pd.testing.assert_frame_equal(two, three)


# ------------------------------------------------------------------------------------------------- users' mistakes

def break_image(content: bytes):
    """Replace one train image of the set."""
    def act(csv: Path) -> list[str]:
        (csv.parent / "images" / "train_1_2.png").write_bytes(content)
        return []
    return act


def truncate_jpeg(csv: Path) -> list[str]:
    """Two cut JPEGs: both must be named."""
    from PIL import Image
    for name in ("train_0_1.png", "test_2_1.png"):
        path = csv.parent / "images" / name
        image = Image.open(path).resize((300, 300))
        image.save(path.with_suffix(".jpg"), quality=95)
        content = path.with_suffix(".jpg").read_bytes()
        path.with_suffix(".jpg").write_bytes(content[:len(content) // 2])
        csv.write_text(csv.read_text().replace(f"images/{name}", f"images/{path.with_suffix('.jpg').name}"))
    return []


def edit(old: str, new: str):
    """Change the CSV's text."""
    def act(csv: Path) -> list[str]:
        text = csv.read_text()
        assert old in text
        csv.write_text(text.replace(old, new, 1))
        return []
    return act


def base_without_norm(csv: Path) -> list[str]:
    """A Base file without its final norm."""
    state = golden_state("keys_base.json")
    del state["norm.weight"], state["norm.bias"]
    torch.save(state, csv.parent / "no_norm.pth")
    return ["--model", "PanDerm_Base_LP", "--pretrained_checkpoint", str(csv.parent / "no_norm.pth")]


def large_for_base(csv: Path) -> list[str]:
    """The Large layout, 1.2 GB, given to Base."""
    torch.save(golden_state("keys_large.json"), csv.parent / "large.pth")
    return ["--model", "PanDerm_Base_LP", "--pretrained_checkpoint", str(csv.parent / "large.pth")]


class Code:
    """Not plain data."""

    def __reduce__(self):
        return os.system, ("true",)


def pickle_with_code(csv: Path) -> list[str]:
    """Refused without running it."""
    torch.save({"model": Code()}, csv.parent / "code.pth")
    return ["--pretrained_checkpoint", str(csv.parent / "code.pth")]


MISTAKES = {
    "truncated JPEGs": (truncate_jpeg, r"2 images cannot be decoded:\n.*train_0_1\.jpg.*\n.*test_2_1\.jpg"),
    "text file named as an image": (break_image(b"not an image at all"), r"not an image .*train_1_2\.png.*header"),
    "0-byte file": (break_image(b""), r"empty file .*train_1_2\.png.*0 bytes"),
    "label mel": (edit("train_0_0.png,0,", "train_0_0.png,mel,"), r"row 2, column label.*'mel' is not an integer"),
    "image with two labels": (edit("test_0_0.png,0,test,", "test_0_0.png,0,test,\nimages/test_0_0.png,1,test,"),
                              r"two labels.*test_0_0\.png.*labels 0 and 1"),
    "a Large checkpoint for Base": (large_for_base, "this looks like PanDerm_Large; you asked for PanDerm_Base_LP"),
    "a Base file without its final norm": (base_without_norm, r"does not fit.*missing: 2 \(norm\.weight; norm\.bias\)"),
    "a pickle with code": (pickle_with_code, "could run code"),
    "wrong checkpoint path": (lambda csv: ["--pretrained_checkpoint", "nowhere/x.pth"],
                              r"nowhere/x\.pth does not exist"),
    "wrong csv path": (lambda csv: ["--csv_path", str(csv.parent / "smal.csv")],
                       r"smal\.csv does not exist; .* has: small\.csv"),
    "wrong root path": (lambda csv: ["--root_path", str(csv.parent / "images")], "not one of the 21 images lies under"),
    "root path that is not there": (lambda csv: ["--root_path", "nowhere"], "--root_path nowhere is not a folder"),
    "forgotten nb_classes": (lambda csv: ["--nb_classes", "2"], r"2 is not in 0\.\.1.*pass --nb_classes 3"),
    "too many nb_classes": (lambda csv: ["--nb_classes", "5"], "no train image has class 3 and 4"),
    "leak with --strict_split": (lambda csv: edit(",P3\n", ",P20\n")(csv) + ["--strict_split"],
                                 "patient in two splits.*P20 has images in train and test"),
    "percent that leaves nothing": (lambda csv: ["--percent_data", "0.01"], "is no image: take a larger fraction"),
    "output dir that is a file": (lambda csv: ["--output_dir", str(csv)], "is a file, not a folder"),
    "device that is not there": (lambda csv: ["--device", "cuda:77"], "--device cuda:77"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_end_with_2_and_a_message(tmp_path, capsys, case: str) -> None:
    """No traceback, nothing written but problem lists, inputs untouched."""
    act, words = MISTAKES[case]
    csv = small_set(tmp_path / "data")
    more = act(csv)
    before = snapshot(tmp_path / "data")
    assert run(csv, tmp_path / "out", *more) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and "Traceback" not in error
    assert re.search(words, error, re.S), error
    assert snapshot(tmp_path / "data") == before
    assert not list((tmp_path).glob("out/*/*/results.json")) and not list(tmp_path.glob("out/*.csv"))


def test_leak_only_warns_by_default(tmp_path, caplog) -> None:
    """And the run goes on."""
    csv = small_set(tmp_path / "data")
    edit(",P3\n", ",P20\n")(csv)
    assert run(csv, tmp_path / "out") == 0
    assert "1 warning in" in caplog.text and "P20 has images in train and test" in caplog.text


def test_ten_faults_one_report(tmp_path, capsys) -> None:
    """All ten are named at once, with their rows."""
    draw_images(tmp_path, [f"{i}.png" for i in range(12)])
    (tmp_path / "9.png").write_bytes(b"")
    (tmp_path / "10.png").write_text("text")
    csv = write_csv(tmp_path / "ten.csv",
                    image=["0.png", "1.png", "2.png", "3.png", "4.png", "5.png", "gone.png", "9.png", "10.png", "",
                           "6.png", "6.png", "7.png", "7.png", "8.png", "8.png"],
                    label=["0", "mel", "1", "", "-1", "9", "0", "1", "0", "1", "0", "1", "0", "0", "1", "1"],
                    split=["train", "train", "trian", "train", "train", "test", "train", "test", "train", "test",
                           "test", "test", "train", "test", "train", "train"])
    assert run(csv, tmp_path / "out", "--strict_split") == 2
    error = capsys.readouterr().err
    for words in (r"row 3, .*'mel' is not an integer", r"row 4, .*'trian' is none of", r"row 5, .*is empty",
                  r"row 6, .*-1 is not in 0\.\.2", r"row 7, .*9 is not in 0\.\.2", r"row 8, .*gone\.png does not exist",
                  r"row 9, .*0 bytes", r"row 10, .*no image format", r"row 11, .*cell is empty",
                  r"row 13, .*labels 0 and 1", r"row 15, .*is in train and test", r"row 17, .*stands in rows 16, 17",
                  r"no train image has class 2"):
        assert re.search(words, error), (words, error)
    assert error.count("problems in") == 1


def full_disk(tmp_path: Path):
    """A tmpfs of 1 MB (as root), else None."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True)
    return folder if done.returncode == 0 else None


def test_full_disk(tmp_path, capsys, monkeypatch) -> None:
    """Told before the work when it can be seen, and without half-written files when it fills up later."""
    csv = small_set(tmp_path / "data")
    disk = full_disk(tmp_path)
    if disk is None:  # no right to mount: a limit on file sizes makes the same writes fail (EFBIG)
        command = [sys.executable, ROOT / "classification" / "linear_eval.py", "--model", "demo", "--csv_path", csv,
                   "--nb_classes", "3", "--output_dir", tmp_path / "out"]
        done = subprocess.run(["bash", "-c", f"ulimit -f 1; exec {shlex.join(map(str, command))}"],
                              capture_output=True, text=True)
        assert done.returncode == 2 and "disk is full" in done.stderr
        return
    try:
        assert run(csv, disk) == 2
        assert "the disk is full" in capsys.readouterr().err and not snapshot(disk)
        monkeypatch.setattr("furnace.runtime.files.check_space", lambda *_: None)
        (disk / "ballast").write_bytes(b"0" * 1016 * 1024)  # two pages are left: env.json fits, the rest does not
        assert run(csv, disk) == 2
        assert "the disk is full" in capsys.readouterr().err
        assert not list(disk.rglob("results.json")) and not list(disk.rglob("*.tmp"))
        (disk / "ballast").unlink()
        assert run(csv, disk) == 0, "the same command goes on once there is space"
    finally:
        subprocess.run(["umount", disk], check=True)
