"""segmentation/run.py: what a run leaves, how its model is tested and used; processes, folds and seeds."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image, ImageColor

from furnace import segmentation_results
from furnace.evaluation.segmentation_sheets import PREDICTION, TRUTH
from furnace.models import panderm
from furnace.models.segmenter import SegmentationModel, create_segmenter
from helpers import GOLDEN, ROOT, write_csv
from segmentation_golden import fill_published
from tiny_finetuning import log_of, one_thread
from tiny_segmentation import RUN, command, disc_picture, disc_set, end_of, results_of, segment, table_of

__all__ = ["one_thread"]  # acts on every test here
LEARNS = {"epoch": "15", "lr": "3e-3", "layer_decay": "1"}  # a Jaccard index of 0.6 in two seconds
QUICK = {"epoch": "1"}
BARE = dict.fromkeys(("model", "pretrained", "size", "channels"))  # what a checkpoint says itself


@pytest.fixture(scope="module")
def trained(tmp_path_factory, one_thread) -> tuple[Path, Path]:
    """(CSV, the folder of a finished run that has learnt something)."""
    folder = tmp_path_factory.mktemp("segmentation")
    csv = disc_set(folder / "data", test=5)
    assert segment(folder / "run", "--save_results", csv=csv, **LEARNS) == 0
    return csv, folder / "run"


@pytest.fixture
def no_plots(monkeypatch) -> None:
    """A third of the time of such runs."""
    monkeypatch.setattr(RUN, "plot_learning_curve", lambda *words, **options: None)
    monkeypatch.setattr(segmentation_results, "draw_worst", lambda *words, **options: None)


def evaluate(out: Path, checkpoint: Path, csv: Path, *words: str, **options: str) -> Path:
    """``--evaluate --checkpoint``; returns the folder of its results."""
    words = ("--evaluate", "--checkpoint", str(checkpoint), *words)
    assert segment(out, *words, csv=csv, **BARE | options) == 0
    (folder,) = out.glob("eval_*")
    return folder


def masks_of(folder: Path) -> dict[str, bytes]:
    """The mask files, by name."""
    return {path.name: path.read_bytes() for path in sorted((folder / "masks").iterdir())}


def pixels_of(path: Path) -> np.ndarray:
    """(H, W) or (H, W, 3) uint8."""
    with Image.open(path) as image:
        return np.array(image)


def assert_same_test(one: Path, other: Path) -> None:
    """Tables, masks and numbers, bit for bit."""
    for name in ("val.csv", "test.csv"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    assert masks_of(one) == masks_of(other)
    assert results_of(one)["splits"] == results_of(other)["splits"]


# ------------------------------------------------------------------------------------------------ what a run leaves

def test_files_and_numbers(trained) -> None:
    """The files; results.json is of test.csv and val.csv, these are of the masks and of the best epoch of log.txt."""
    csv, out = trained
    assert {path.name for path in out.iterdir()} == {
        "args.yaml", "env.json", "log.txt", "results.json", "val.csv", "test.csv", "plots", "masks", "overlays",
        *(f"checkpoint-{name}.pth" for name in ("best", "last", "previous"))}
    assert {path.name for path in (out / "plots").iterdir()} == {"learning_curve.png", "worst_cases.png"}
    assert all(pixels_of(path).std() > 10 for path in (out / "plots").iterdir())
    results, frame = results_of(out), pd.read_csv(csv)
    log = log_of(out)
    for split in ("val", "test"):
        table, scored = table_of(out, split), results["splits"][split]
        assert table["filename"].tolist() == frame.loc[frame["split"] == split, "image"].tolist()
        assert (scored["n"], scored["empty_truth"]) == (len(table), 0)
        for name in ("dice", "jaccard", "threshold_jaccard", "pixel_acc", "hd95", "boundary_f1"):
            entry = scored["metrics"][name]
            assert entry["value"] == pytest.approx(table[name].mean(), abs=1e-6)
            assert entry["low"] <= entry["value"] <= entry["high"] and entry["reason"] is None
    jaccards = [entry["val_jaccard"] for entry in log]
    assert [entry["update"] for entry in log] == list(range(2, 32, 2))
    assert results["best_epoch"] == int(np.argmax(jaccards)) and max(jaccards) > 0.4
    assert results["splits"]["val"]["metrics"]["jaccard"]["value"] == pytest.approx(max(jaccards), abs=1e-12)
    assert (results["task"], results["head"], results["train_images"], results["input_size"]) == (
        "segmentation", "upernet", 8, [32, 32])
    assert results["plan"] == {"micro": 4, "accumulation": 1, "world_size": 1, "steps_per_epoch": 2, "even": False,
                               "least": 2}
    said, environment = yaml.safe_load((out / "args.yaml").read_text()), json.loads((out / "env.json").read_text())
    assert (said["epochs"], said["size"], said["resolved_amp_dtype"], said["save_results"]) == (15, [32], "fp32", True)
    assert environment["fingerprint"] == results["fingerprint"] and environment["versions"]["torch"]


def test_masks_and_overlays(trained) -> None:
    """Of every test image, of its own size; 0 and 255; Dice of the files is that of the table; outlines in overlays."""
    csv, out = trained
    frame, table = pd.read_csv(csv).query("split == 'test'"), table_of(out)
    assert len(masks_of(out)) == len(list((out / "overlays").iterdir())) == 5
    for row, scored in zip(frame.to_dict("records"), table.to_dict("records"), strict=True):
        stem = Path(row["image"]).stem
        mask, truth = pixels_of(out / "masks" / f"{stem}_segmentation.png"), pixels_of(csv.parent / row["mask"])
        assert mask.shape == truth.shape and mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 255}
        predicted, lesion = mask > 0, truth > 0
        assert scored["dice"] == pytest.approx(2 * (predicted & lesion).sum() / (predicted.sum() + lesion.sum()))
        assert (scored["tp"], scored["fp"], scored["fn"], scored["tn"]) == (
            (predicted & lesion).sum(), (predicted & ~lesion).sum(), (~predicted & lesion).sum(),
            (~predicted & ~lesion).sum())
        picture = pixels_of(out / "overlays" / f"{stem}.png")
        assert picture.shape == (*truth.shape, 3)
        for colour, inside in ((TRUTH, lesion), (PREDICTION, predicted)):
            drawn = (picture == ImageColor.getrgb(colour)).all(axis=2)
            assert drawn.any() and not (drawn & ~inside).any()


def test_finished_run_answers(trained, caplog) -> None:
    """The same command, and -c args.yaml: nothing is computed, nothing written; the metrics are printed."""
    csv, out = trained
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    dice = results_of(out)["splits"]["test"]["metrics"]["dice"]["value"]
    for start in (lambda: segment(out, "--save_results", csv=csv, **LEARNS),
                  lambda: RUN.main(["-c", str(out / "args.yaml")])):
        caplog.clear()
        assert start() == 0
        assert "this run is finished" in caplog.text and f"dice               {dice:.4f}" in caplog.text
        assert "5 test images; 0 without a lesion" in caplog.text
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_another_run_in_the_folder(trained, tmp_path, capsys) -> None:
    """Refused, naming what differs; with --overwrite the old one is kept in ``previous``, masks and overlays, too."""
    csv, out = trained
    shutil.copytree(out, tmp_path / "run")
    assert segment(tmp_path / "run", csv=csv, **LEARNS | {"lr": "1e-3"}, dice_weight="0") == 2
    assert "holds another run (dice_weight: 1.0 there, 0.0 now; lr: 0.003 there, 0.001 now): choose" in (
        capsys.readouterr().err)
    assert end_of(tmp_path / "run") == end_of(out)
    assert segment(tmp_path / "run", "--overwrite", csv=csv, **QUICK) == 0
    previous = tmp_path / "run" / "previous"
    assert end_of(previous) == end_of(out)
    for name in ("overlays", "plots"):
        assert sorted(path.name for path in (previous / name).iterdir()) == sorted(
            path.name for path in (out / name).iterdir())
    assert not (tmp_path / "run" / "overlays").exists() and masks_of(tmp_path / "run") != masks_of(previous)
    assert results_of(tmp_path / "run")["fingerprint"] != results_of(out)["fingerprint"]
    assert_same_test(evaluate(tmp_path / "run", out / "checkpoint-best.pth", csv), out)  # not that folder's own best


# ---------------------------------------------------------------------------------------------------- the numbers

def sampled(mask: np.ndarray) -> np.ndarray:
    """(224, 224) nearest neighbours, floor(i * in / out), as the published code scores."""
    rows, columns = (np.arange(224) * side // 224 for side in mask.shape)
    return mask[rows][:, columns]


def marred(mask: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """A mask with errors that vanish at 224: in it and beside it, a share of the pixels that are not sampled there."""
    seen = np.zeros_like(mask)
    rows, columns = (np.arange(224) * side // 224 for side in mask.shape)
    seen[np.ix_(rows, columns)] = True
    near = mask | np.roll(mask, 30, axis=1)
    return mask ^ (near & ~seen & (rng.random(mask.shape) < share))


def test_equal_to_the_challenge_score(trained, tmp_path, no_plots) -> None:
    """isic-challenge-scoring on the mask files of 600 x 450, whose truth differs from them only where 224 is blind."""
    from isic_challenge_scoring.segmentation import SegmentationScore

    best, rng = trained[1] / "checkpoint-best.pth", np.random.default_rng(3)
    names = [f"ISIC_{number:07d}" for number in range(5)]
    for part in ("images", "truth"):
        (tmp_path / part).mkdir()
    for name in names:
        Image.fromarray(disc_picture(rng, (450, 600))[0]).save(tmp_path / "images" / f"{name}.jpg")
    assert segment(tmp_path / "out", "--predict", str(tmp_path / "images"), "--checkpoint", str(best), **BARE) == 0
    predicted = {}
    for name, share in zip(names, (0.0, 0.05, 0.1, 0.25, 0.7), strict=True):
        predicted[name] = pixels_of(tmp_path / "out/predict_images/masks" / f"{name}_segmentation.png") > 0
        assert predicted[name].shape == (450, 600) and 0.005 < predicted[name].mean() < 0.6
        truth = marred(predicted[name], share, rng)
        np.testing.assert_array_equal(sampled(truth), sampled(predicted[name]))
        Image.fromarray(truth.astype(np.uint8) * 255).save(tmp_path / "truth" / f"{name}_segmentation.png")
    csv = write_csv(tmp_path / "isic.csv", image=[f"images/{name}.jpg" for name in names],
                    mask=[f"truth/{name}_segmentation.png" for name in names], split=["test"] * 5)
    folder = evaluate(tmp_path / "out", best, csv)
    theirs = SegmentationScore.from_dir(tmp_path / "truth", folder / "masks").macro_average
    ours = {name: entry["value"] for name, entry in results_of(folder)["splits"]["test"]["metrics"].items()}
    for name in ("threshold_jaccard", "dice", "jaccard"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-6)
    table = table_of(folder)
    assert table["jaccard"].iat[0] == 1 and table["jaccard"].iat[4] < 0.65 < table["jaccard"].iat[1] < 1
    assert table["jaccard"].is_monotonic_decreasing and ours["threshold_jaccard"] < ours["jaccard"] < 0.9


@pytest.mark.parametrize("words", [[], ["--tta"], ["--window", "24", "--overlap", "0.25"]])
def test_not_of_the_batch(trained, tmp_path, no_plots, words: list[str]) -> None:
    """One picture per forward pass or twelve: the same files, bit for bit."""
    csv, out = trained
    one, twelve = (evaluate(tmp_path / batch, out / "checkpoint-best.pth", csv, *words, test_batch_size=batch)
                   for batch in ("1", "12"))
    assert_same_test(one, twelve)
    assert (masks_of(one) == masks_of(out)) == (not words), "the option does something"


# -------------------------------------------------------------------------------------------- what its model is for

def test_evaluate_is_the_runs_own_test(trained, tmp_path, no_plots, caplog) -> None:
    """Without a checkpoint the best of --save_name: its numbers, tables and masks, in a folder inside; then stored."""
    csv, out = trained
    shutil.copytree(out, tmp_path / "run")
    assert segment(tmp_path / "run", "--evaluate", csv=csv, **BARE) == 0
    (folder,) = (tmp_path / "run").glob("eval_*")
    assert_same_test(folder, out)
    assert end_of(tmp_path / "run") == end_of(out)
    results = results_of(folder)
    assert (results["best_epoch"], results["model"]) == (results_of(out)["best_epoch"], results_of(out)["model"])
    caplog.clear()
    assert RUN.main(["-c", str(folder / "args.yaml")]) == 0
    assert "this run is finished" in caplog.text and len(list((tmp_path / "run").glob("eval_*"))) == 1


def test_on_another_data_set(trained, tmp_path, no_plots) -> None:
    """A CSV of test rows alone; with --all_as_test every image of a set, whatever its split."""
    best = trained[1] / "checkpoint-best.pth"
    other = disc_set(tmp_path / "other", train=0, val=0, test=3, seed=9).rename(tmp_path / "other" / "clinic.csv")
    folder = evaluate(tmp_path / "test", best, other)
    assert results_of(folder)["data_set"] == "clinic" and list(results_of(folder)["splits"]) == ["test"]
    assert table_of(folder)["filename"].tolist() == pd.read_csv(other)["image"].tolist()
    folder = evaluate(tmp_path / "all", best, trained[0], "--all_as_test")
    results = results_of(folder)
    assert results["splits"]["test"]["n"] == 16 and "--all_as_test" in results["split_note"]
    mine = table_of(trained[1]).set_index("filename")
    pd.testing.assert_frame_equal(table_of(folder).set_index("filename").loc[mine.index], mine)


def test_a_size_of_its_own(trained, tmp_path, no_plots) -> None:
    """--size 64 brings the checkpoint there; the results say so, and the masks are others."""
    folder = evaluate(tmp_path, trained[1] / "checkpoint-best.pth", trained[0], size="64")
    assert results_of(folder)["input_size"] == [64, 64] and masks_of(folder) != masks_of(trained[1])


@pytest.fixture
def published(tmp_path, monkeypatch) -> tuple[Path, SegmentationModel]:
    """(A file in the published layout, at width 32 instead of 1024, half of whose pixels are lesion; its model)."""
    monkeypatch.setitem(panderm.SIZES, "Large", {"embed_dim": 32, "depth": 24, "num_heads": 2})
    listed = json.loads((GOLDEN / "keys_seg_large.json").read_text())
    model = create_segmenter("PanDerm_Large_LP", "random", pyramid=True)
    model.load_state_dict(fill_published(model.state_dict()))
    with torch.no_grad():
        low = model.forward_low(torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1)))
        model.decode_head.conv_seg.bias[1] -= (low[:, 1] - low[:, 0]).median()
    state = OrderedDict((listed["prefix"] + re.sub(r"^neck\.", "backbone.", key), value)
                        for key, value in model.state_dict().items())
    assert set(state) == {entry["key"] for entry in listed["keys"]}
    torch.save({"epoch": 57, "global_step": 11600, "pytorch-lightning_version": "2.2.1", "state_dict": state,
                "lr_schedulers": [{"T_max": 100}]}, tmp_path / "model_best_0.ckpt")
    return tmp_path / "model_best_0.ckpt", model


@torch.no_grad()
def test_published_checkpoint(published, tmp_path, no_plots) -> None:
    """--evaluate and --predict give the same masks: those of the published transform (bicubic squash, 0.5 / 0.5)."""
    path, model = published
    csv = disc_set(tmp_path / "data", train=0, val=0, test=2)
    folder = evaluate(tmp_path / "out", path, csv)
    results = results_of(folder)
    assert (results["model"], results["recipe"], results["taps"], results["input_size"], results["best_epoch"]) == (
        "PanDerm_Large_LP", "panderm", [7, 11, 15, 23], [224, 224], 57)
    for name in ("test_0", "test_1"):
        picture = torch.from_numpy(pixels_of(tmp_path / "data/images" / f"{name}.png")).permute(2, 0, 1)[None].float()
        squashed = F.interpolate(picture, (224, 224), mode="bicubic").round().clamp(0, 255)
        lesion = model((squashed / 255 - 0.5) / 0.5).softmax(dim=1)[:, 1:]
        want = F.interpolate(lesion, picture.shape[-2:], mode="bilinear")[0, 0] > 0.5
        assert 0.02 < want.float().mean() < 0.98
        found = torch.from_numpy(pixels_of(folder / "masks" / f"{name}_segmentation.png") > 0)
        assert (found == want).float().mean() > 0.999
    assert segment(tmp_path / "out", "--predict", str(tmp_path / "data/images"), "--checkpoint", str(path), **BARE) == 0
    assert masks_of(tmp_path / "out/predict_images") == masks_of(folder)


@pytest.mark.parametrize("kind", ["folder", "image", "csv"])
def test_predict(trained, tmp_path, no_plots, capsys, kind: str) -> None:
    """Masks as the run's own, of the photographs' size; a row and an overlay each; existing output is left alone."""
    csv, out = trained
    frame = pd.read_csv(csv).query("split == 'test'")
    source, chosen = {"folder": (tmp_path / "photos", list(frame["image"])),
                      "image": (csv.parent / "images" / "test_1.png", ["images/test_1.png"]),
                      "csv": (tmp_path / "some.csv", ["images/test_3.png", "images/test_0.png"])}[kind]
    if kind == "folder":
        source.mkdir()
        for name in chosen:
            shutil.copy(csv.parent / name, source)
    elif kind == "csv":
        write_csv(source, filename=chosen)
    words = ["--predict", str(source), "--checkpoint", str(out / "checkpoint-best.pth")]
    root = str(csv.parent) if kind == "csv" else None
    bare = BARE | {"root_path": root}
    assert segment(tmp_path / "out", *words, **bare) == 0
    folder = tmp_path / "out" / f"predict_{source.stem}"
    table, own = pd.read_csv(folder / "predictions.csv"), masks_of(out)
    assert [Path(name).name for name in table["filename"]] == [Path(name).name for name in chosen]
    assert masks_of(folder) == {name: own[name] for name in (f"{Path(one).stem}_segmentation.png" for one in chosen)}
    for row in table.to_dict("records"):
        mask = pixels_of(folder / row["mask"]) > 0
        assert mask.shape == (row["height"], row["width"]) and mask.sum() == row["lesion_pixels"]
        assert row["lesion_share"] == pytest.approx(mask.mean(), abs=1e-8)
        drawn = pixels_of(folder / "overlays" / f"{Path(row['filename']).stem}.png")
        assert (drawn == ImageColor.getrgb(PREDICTION)).all(axis=2).any() == mask.any()
    (folder / "masks" / "stale.png").touch()
    before = (folder / "predictions.csv").stat().st_mtime_ns
    assert segment(tmp_path / "out", *words, **bare) == 2
    assert "holds an earlier prediction" in capsys.readouterr().err
    assert (folder / "predictions.csv").stat().st_mtime_ns == before and (folder / "masks" / "stale.png").exists()
    assert segment(tmp_path / "out", *words, "--overwrite", "--largest_component", **bare) == 0
    assert not (folder / "masks" / "stale.png").exists() and len(masks_of(folder)) == len(chosen)


def test_predict_with_the_runs_best(trained, tmp_path, capsys) -> None:
    """Without --checkpoint that of --save_name; photographs of a folder that holds the run are refused."""
    shutil.copytree(trained[1], tmp_path / "run")
    assert segment(tmp_path / "run", "--predict", str(tmp_path), **BARE) == 2
    assert "would be written into the input folder" in capsys.readouterr().err
    assert segment(tmp_path / "run", "--predict", str(trained[0].parent / "images/test_2.png"), **BARE) == 0
    assert masks_of(tmp_path / "run/predict_test_2") == {
        "test_2_segmentation.png": masks_of(trained[1])["test_2_segmentation.png"]}


# ----------------------------------------------------------------------------------------- processes, folds, seeds

ONE_AFTER_THE_OTHER = """
import sys
from furnace.runtime import distributed
from tiny_segmentation import RUN
stop, distributed.stop = distributed.stop, lambda: None
codes = [RUN.main(line.split()) for line in sys.argv[1:]]
stop()
sys.exit(max(codes))
"""


@pytest.fixture(scope="module")
def two_processes(trained, tmp_path_factory) -> tuple[Path, str]:
    """(Folder, what was said): torchrun on a CPU, ``tested`` of the trained checkpoint, then a training ``run``."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "driver.py").write_text(ONE_AFTER_THE_OTHER)
    best = str(trained[1] / "checkpoint-best.pth")
    lines = [command(folder / "tested", "--evaluate", "--checkpoint", best, csv=trained[0], **BARE),
             command(folder / "run", csv=trained[0], batch_size="2")]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         str(folder / "driver.py"), *map(" ".join, lines)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "classification"), str(ROOT / "tests")]),
             "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    return folder, done.stdout + done.stderr


def test_two_processes_test_as_one(trained, two_processes) -> None:
    """Every image is scored once, and the files are those of one process, bit for bit."""
    (folder,) = (two_processes[0] / "tested").glob("eval_*")
    assert_same_test(folder, trained[1])
    assert results_of(folder)["splits"]["test"]["n"] == 5 and table_of(folder)["filename"].is_unique
    assert (folder / "plots" / "worst_cases.png").exists()


def test_two_processes_train(trained, two_processes, tmp_path, no_plots) -> None:
    """Each has its own batch statistics on a CPU, which is said; the model that is kept is the one that was tested."""
    folder, told = two_processes
    run, log = folder / "run", log_of(folder / "run")
    assert told.count("on a cpu each process has its own batch statistics") == 1
    assert results_of(run)["plan"] == {"micro": 2, "accumulation": 1, "world_size": 2, "steps_per_epoch": 2,
                                       "even": False, "least": 2}
    assert (run / "plots" / "learning_curve.png").exists()
    assert_same_test(evaluate(tmp_path / "one", run / "checkpoint-best.pth", trained[0]), run)
    best = results_of(run)["splits"]["val"]["metrics"]["dice"]["value"]
    assert best == pytest.approx(log[results_of(run)["best_epoch"]]["val_dice"], abs=1e-12)


def test_folds_in_separate_calls(tmp_path, monkeypatch, no_plots, caplog) -> None:
    """--resume K for each K is one call of all: the same files. Lesions stay together; test is left alone."""
    csv = disc_set(tmp_path / "data", train=10, val=2, test=3, copies=2)
    draw, drawn = RUN.draw_data, []
    monkeypatch.setattr(RUN, "draw_data", lambda *words: drawn.append(draw(*words)) or drawn[-1])
    assert segment(tmp_path / "whole", "--kfold", "3", csv=csv, **QUICK) == 0
    for fold, left in ((2, 2), (0, 1), (1, 0)):
        assert not (tmp_path / "parts" / "results.json").exists()
        assert segment(tmp_path / "parts", "--kfold", "3", "--resume", str(fold), csv=csv, **QUICK) == 0
        assert not left or f"fold {fold} is finished; the summary comes when {left} more are" in caplog.text
    assert results_of(tmp_path / "parts") == results_of(tmp_path / "whole")
    assert (tmp_path / "parts" / "table.csv").read_bytes() == (tmp_path / "whole" / "table.csv").read_bytes()
    frame = pd.read_csv(csv)
    learnt = frame[frame["split"] != "test"]
    held_out = []
    for fold, (train, val) in enumerate(drawn[0]):
        name = f"seed_0_fold_{fold}"
        assert end_of(tmp_path / "parts" / name) == end_of(tmp_path / "whole" / name)
        assert not set(train.frame["lesion_id"]) & set(val.frame["lesion_id"])
        assert sorted([*train.filenames, *val.filenames]) == sorted(learnt["image"])
        assert set(table_of(tmp_path / "whole" / name, "val")["filename"]) == set(val.filenames)
        assert results_of(tmp_path / "whole" / name)["train_images"] == len(train)
        assert table_of(tmp_path / "whole" / name)["filename"].tolist() == frame.query("split == 'test'")[
            "image"].tolist()
        held_out += val.filenames
    assert sorted(held_out) == sorted(learnt["image"])


def test_folds_made_again(tmp_path, no_plots, caplog) -> None:
    """--overwrite fold by fold with other options: the folds of the run before are not taken for finished ones."""
    csv = disc_set(tmp_path / "data", train=6, val=2, test=2)
    words = ("--kfold", "2", "--resume")
    assert segment(tmp_path / "run", *words[:2], csv=csv, **QUICK) == 0
    assert segment(tmp_path / "run", *words, "1", "--overwrite", csv=csv, lr="1e-3", **QUICK) == 0
    assert "fold 1 is finished; the summary comes when 1 more are" in caplog.text
    assert not (tmp_path / "run" / "results.json").exists()
    made = (tmp_path / "run" / "seed_0_fold_1" / "results.json").stat().st_mtime_ns
    assert segment(tmp_path / "run", *words, "0", "--overwrite", csv=csv, lr="1e-3", **QUICK) == 0
    assert (tmp_path / "run" / "seed_0_fold_1" / "results.json").stat().st_mtime_ns == made
    rates = [log_of(tmp_path / "run" / f"seed_0_fold_{fold}")[0]["lr"] for fold in (0, 1)]
    assert rates[0] == rates[1] > 1e-6 and len(results_of(tmp_path / "run")["runs"]) == 2


def test_seeds(tmp_path, no_plots) -> None:
    """A run of each, which is the run of that seed alone; mean and standard deviation over them."""
    csv = disc_set(tmp_path / "data", train=4, val=2, test=2)
    assert segment(tmp_path / "both", "--seeds", "0", "1", csv=csv, **QUICK) == 0
    assert segment(tmp_path / "one", "--seed", "1", csv=csv, **QUICK) == 0
    assert end_of(tmp_path / "both" / "seed_1") == end_of(tmp_path / "one")
    runs = [results_of(tmp_path / "both" / f"seed_{seed}") for seed in (0, 1)]
    assert runs[0]["weights_sha256"] != runs[1]["weights_sha256"]
    summary = {(entry["split"], entry["metric"]): entry for entry in results_of(tmp_path / "both")["summary"]}
    for split in ("val", "test"):
        a, b = (run["splits"][split]["metrics"]["pixel_acc"]["value"] for run in runs)
        assert summary[split, "pixel_acc"]["mean"] == pytest.approx((a + b) / 2)
        assert summary[split, "pixel_acc"]["sd"] == pytest.approx(abs(a - b) / 2**0.5)
    assert results_of(tmp_path / "both")["runs"] == [{"seed": 0}, {"seed": 1}]
