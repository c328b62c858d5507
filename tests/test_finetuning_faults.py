"""run_class_finetuning.py when something goes wrong, and how it goes on; the scripts of the recipe."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from furnace import engine_for_finetuning
from furnace.runtime import trainer
from furnace.runtime.train_state import read_stored
from helpers import ROOT
from tiny_finetuning import command, drawn_set, end_of, finetune, log_of, no_plots, one_thread, results_of

__all__ = ["no_plots", "one_thread"]  # fixtures that act on every test here
STEPS = ("--save_every_steps", "1")


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory, one_thread) -> tuple[Path, Path]:
    """(CSV, the folder of a run of three epochs of three updates)."""
    folder = tmp_path_factory.mktemp("whole")
    csv = drawn_set(folder / "data")
    assert finetune(csv, folder / "run", *STEPS) == 0
    return csv, folder / "run"


def killed_after(updates: int, csv: Path, out: Path, *words: str, **options: str) -> None:
    """A run whose process ends after so many updates, the last of which no file has."""
    update, left = trainer._Fit._update, [updates]

    def counted(self, batches):
        result = update(self, batches)
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        return result

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trainer._Fit, "_update", counted)
        finetune(csv, out, *words, **options)


# ---------------------------------------------------------------------------------------------------- cut off, goes on

@pytest.mark.parametrize("workers", ["0", "2"])
def test_goes_on_to_the_same_end(whole, tmp_path, caplog, workers: str) -> None:
    """In the middle of an epoch, with as many loader workers or others."""
    csv, out = whole
    killed_after(5, csv, tmp_path / "run", *STEPS)
    assert read_stored(tmp_path / "run" / "checkpoint-last.pth")["update"] == 4
    assert finetune(csv, tmp_path / "run", *STEPS, num_workers=workers) == 0
    assert "continuing after 1 epochs and 4 updates" in caplog.text
    assert end_of(tmp_path / "run") == end_of(out)


def test_damaged_checkpoint(whole, tmp_path, caplog, capsys) -> None:
    """The one before is taken; without any whole one the run is refused, and --overwrite starts it again."""
    csv, out = whole
    killed_after(5, csv, tmp_path / "run", *STEPS)
    last, previous = (tmp_path / "run" / f"checkpoint-{name}.pth" for name in ("last", "previous"))
    shutil.copytree(tmp_path / "run", tmp_path / "both")
    last.write_bytes(last.read_bytes()[:-2000])
    assert finetune(csv, tmp_path / "run", *STEPS) == 0
    assert "taking the one before" in caplog.text and "continuing after 1 epochs and 3 updates" in caplog.text
    assert end_of(tmp_path / "run") == end_of(out)
    for path in (last, previous):
        (tmp_path / "both" / path.name).write_bytes(b"PK")
    assert finetune(csv, tmp_path / "both", *STEPS) == 2
    assert "no checkpoint is left to continue from; add --overwrite" in capsys.readouterr().err
    assert finetune(csv, tmp_path / "both", *STEPS, "--overwrite") == 0
    assert end_of(tmp_path / "both") == end_of(out)


def test_a_run_that_moved(whole, tmp_path, capsys) -> None:
    """--resume checkpoint-last.pth in a new folder; of another run it is refused."""
    csv, out = whole
    killed_after(4, csv, tmp_path / "old", *STEPS)
    last = str(tmp_path / "old" / "checkpoint-last.pth")
    assert finetune(csv, tmp_path / "other", *STEPS, "--resume", last, lr="2e-3") == 2
    assert "is of another run" in capsys.readouterr().err
    assert finetune(csv, tmp_path / "new", *STEPS, "--resume", last) == 0
    assert end_of(tmp_path / "new") == end_of(out)


def test_no_auto_resume(whole, tmp_path, capsys) -> None:
    """An unfinished run is refused then, and left as it was."""
    csv, out = whole
    killed_after(4, csv, tmp_path / "run", *STEPS)
    before = (tmp_path / "run" / "checkpoint-last.pth").read_bytes()
    assert finetune(csv, tmp_path / "run", *STEPS, "--no_auto_resume") == 2
    assert "unfinished: leave out --no_auto_resume" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoint-last.pth").read_bytes() == before
    assert finetune(csv, tmp_path / "run", *STEPS, "--auto_resume") == 0
    assert end_of(tmp_path / "run") == end_of(out)


def test_another_run_in_the_folder(whole, tmp_path, capsys) -> None:
    """Refused, naming what differs; with --overwrite the old one is kept in ``previous``."""
    csv, out = whole
    shutil.copytree(out, tmp_path / "run")
    capsys.readouterr()
    assert finetune(csv, tmp_path / "run", *STEPS, "--mixup", "0.8", lr="2e-3") == 2
    told = capsys.readouterr().err
    assert "holds another run (lr: 0.001 there, 0.002 now; mixup: 0.0 there, 0.8 now): choose" in told
    assert end_of(tmp_path / "run") == end_of(out)
    assert finetune(csv, tmp_path / "run", *STEPS, "--overwrite", lr="2e-3") == 0
    assert end_of(tmp_path / "run" / "previous") == end_of(out)
    assert log_of(tmp_path / "run")[0]["lr"] == pytest.approx(2 * log_of(out)[0]["lr"], rel=1e-2)
    assert results_of(tmp_path / "run")["fingerprint"] != results_of(out)["fingerprint"]


def test_disk_full(whole, tmp_path, monkeypatch, capsys) -> None:
    """Exit code 2 with the reason; the checkpoint before stays whole; with room the run goes on to the same end."""
    csv, out = whole
    real, count = torch.save, []

    def save(content, file):
        count.append(1)
        real(content, file)
        if len(count) == 7:  # after 3 updates, the best and the last of the epoch, and one more update
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        assert finetune(csv, tmp_path / "run", *STEPS) == 2
    assert "the disk is full" in capsys.readouterr().err
    assert read_stored(tmp_path / "run" / "checkpoint-last.pth")["update"] == 4
    assert not list((tmp_path / "run").glob(".*.tmp"))
    assert finetune(csv, tmp_path / "run", *STEPS) == 0
    assert end_of(tmp_path / "run") == end_of(out)


def test_a_signal_to_the_process(whole, tmp_path) -> None:
    """SIGTERM, as a queue sends it: exit code 143; the same command goes on to the same end."""
    csv = whole[0]
    words = {"epochs": "25"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "classification"), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, str(ROOT / "classification" / "run_class_finetuning.py"),
            *command(csv, tmp_path / "run", **words)]
    with open(tmp_path / "told.txt", "w") as file:
        process = subprocess.Popen(line, env=environment, stdout=file, stderr=file)
        try:
            end = time.monotonic() + 120
            while not (tmp_path / "run" / "log.txt").exists() and time.monotonic() < end:
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 143
        finally:
            process.kill()
    assert "the same command goes on" in (tmp_path / "told.txt").read_text()
    stopped = read_stored(tmp_path / "run" / "checkpoint-last.pth")
    assert 1 <= stopped["epoch"] < 25 and not (tmp_path / "run" / "results.json").exists()
    assert finetune(csv, tmp_path / "run", **words) == finetune(csv, tmp_path / "uncut", **words) == 0
    assert len(log_of(tmp_path / "run")) == 25
    assert end_of(tmp_path / "run") == end_of(tmp_path / "uncut")


# ------------------------------------------------------------------------------------------------------- what is wrong

def test_loss_that_is_not_finite(whole, tmp_path, monkeypatch, capsys) -> None:
    """Exit code 2 with remedies; the checkpoint is of the last good update and has only finite weights."""
    csv, out = whole
    assert finetune(csv, tmp_path / "wild", lr="1e30", epochs="9") == 2
    told = capsys.readouterr().err
    assert "the loss is nan at update" in told and "lower --lr" in told
    loss, calls = engine_for_finetuning.classification_loss, []

    def broken_once(logits, targets, **how):
        calls.append(logits.requires_grad)
        return loss(logits, targets, **how) * (float("nan") if sum(calls) == 5 and calls[-1] else 1)

    with monkeypatch.context() as patch:
        patch.setattr(engine_for_finetuning, "classification_loss", broken_once)
        assert finetune(csv, tmp_path / "run", *STEPS) == 2
    told = capsys.readouterr().err
    assert "the loss is nan at update 5; the last checkpoint, " in told and "checkpoint-last.pth, is of before" in told
    stored = read_stored(tmp_path / "run" / "checkpoint-last.pth")
    assert stored["update"] == 4 and all(value.isfinite().all() for value in stored["model"].values())
    assert finetune(csv, tmp_path / "run", *STEPS) == 0
    assert end_of(tmp_path / "run") == end_of(out)


def test_broken_images(tmp_path, capsys) -> None:
    """Found while training: all of the train images that cannot be decoded, with their rows, in one list."""
    csv = drawn_set(tmp_path / "data")
    for name in ("train_0_2.png", "train_2_5.png"):
        path = tmp_path / "data" / "images" / name
        path.write_bytes(path.read_bytes()[:300])
    for workers in ("0", "1"):
        assert finetune(csv, tmp_path / f"run{workers}", num_workers=workers) == 2
        told = capsys.readouterr().err
        assert "2 images cannot be decoded" in told
        assert told.count("train_0_2.png") == told.count("train_2_5.png") == 1
        assert "row 4," in told and "row 19," in told
        assert not (tmp_path / f"run{workers}" / "results.json").exists()


def test_refusals_before_training(whole, tmp_path, monkeypatch, capsys) -> None:
    """Exit code 2, the remedy in the message, and no weight trained."""
    csv = whole[0]

    def fit(*words, **options) -> None:
        raise AssertionError("something was trained")

    monkeypatch.setattr("furnace.training.fit", fit)
    frame = pd.read_csv(csv)
    many = csv.with_name("many.csv")
    frame.assign(labels="a;b").to_csv(many, index=False)
    few = csv.with_name("few.csv")
    frame.assign(patient_id=np.where(frame["split"] == "test", "T", "P")).to_csv(few, index=False)
    wrong = []
    for source, words, options, message in (
        (csv, [], {"nb_classes": "2"}, "pass --nb_classes 3"),
        (csv, [], {"nb_classes": "0"}, "--nb_classes 3"),
        (csv, [], {"nb_classes": "1"}, "two or more"),
        (csv.with_name("no.csv"), [], {}, "no.csv"),
        (few, ["--folds", "2"], {}, "take fewer folds"),
        (csv, ["--folds", "1"], {}, "--folds 1 is no cross-validation"),
        (csv, ["--tta_views", "deterministic"], {}, "of --TTA: add it"),
        (csv, ["--lora_rank", "4"], {}, "of --tune lora: add it"),
        (csv, ["--mixup", "0.8"], {"batch_size": "5"}, "must be even"),
        (csv, ["--percent_data", "0.01"], {}, "--percent_data"),
        (many, ["--task", "multilabel", "--mixup", "0.8"], {"nb_classes": "0"}, "mixup and cutmix mix single labels"),
        (many, ["--task", "multilabel", "--weights"], {"nb_classes": "0"}, "--weights balances single labels"),
        (csv, ["--use_cls", "--use_mean_pooling"], {}, "exclude each other"),
        (csv, ["--seeds", "0", "1", "--resume", "x.pth"], {}, "leave out --seeds and --folds"),
        (csv, ["--start_epoch", "3"], {}, "--start_epoch 3 is not below --epochs 3"),
        (csv, ["--eval_data_path", "x"], {}, "--test_csv_path"),
        (csv, ["--opt", "none_such"], {}, "none_such"),
        (csv, ["--aa", "none_such"], {}, "none_such"),
        (csv, ["--rel_pos_bias"], {}, "rel"),
        (csv, ["--disable_sin_pos_emb"], {"model": "timm:test_efficientnet"}, "no table of positions"),
        (csv, [], {"model": "timm:none_such"}, "none_such"),
        (csv, [], {"pretrained_checkpoint": str(csv)}, csv.name),
        (csv, ["--enable_deepspeed"], {}, "torchrun"),
    ):
        capsys.readouterr()
        code, told = finetune(source, tmp_path / "run", *words, **options), capsys.readouterr().err
        if code != 2 or message not in told or list((tmp_path / "run").glob("checkpoint*")):
            wrong.append((words, options, code, told))
    assert not wrong


def test_too_few_classes(tmp_path, capsys) -> None:
    """--nb_classes below the labels: the rows and the number that is right."""
    csv = drawn_set(tmp_path / "data", classes=4)
    assert finetune(csv, tmp_path / "run") == 2
    told = capsys.readouterr().err
    assert "row " in told and "--nb_classes 4" in told
    assert not list((tmp_path / "run").glob("checkpoint*"))


# --------------------------------------------------------------------------------------------------------- the scripts

def script(name: str, folder: Path, *words: str) -> subprocess.CompletedProcess:
    """A script of the recipe on the sets in ``folder``/data."""
    return subprocess.run(["bash", str(ROOT / "script" / name), *words], capture_output=True, text=True, cwd=folder,
                          env={**os.environ, "DATA_ROOT": str(folder / "data"), "OUT": str(folder / "out"),
                               "WEIGHTS": str(folder), "MODELS": "timm:test_vit", "PYTHON": sys.executable,
                               "OMP_NUM_THREADS": "1"})


def test_scripts(tmp_path) -> None:
    """finetune_train.sh with the published recipe, options passed on; finetune_test.sh tests what it left."""
    data = tmp_path / "data" / "pad-ufes"
    drawn_set(data, classes=6, train=3, val=1, test=1).rename(data / "2000.csv")
    table = pd.read_csv(data / "2000.csv")
    table.assign(image=table["image"].str.removeprefix("images/")).to_csv(data / "2000.csv", index=False)
    words = ["--input_size", "32", "--device", "cpu"]
    more = ["--pretrained_checkpoint", "random", "--epochs", "2", "--warmup_epochs", "1"]
    done = script("finetune_train.sh", tmp_path, *words, *more)
    summary = done.stdout.split("\nran: ")[1]
    assert done.returncode == 0 and summary.startswith("1\n  timm:test_vit on PAD-UFES\nskipped: 8\n"), done.stderr
    out = tmp_path / "out" / "finetuning" / "PAD-UFES" / "timm-test_vit"
    said = (out / "args.yaml").read_text()
    for line in ("batch_size: 128", "lr: 0.0005", "layer_decay: 0.65", "drop_path: 0.2", "weight_decay: 0.05",
                 "mixup: 0.8", "cutmix: 1.0", "weights: true", "TTA: true", "epochs: 2", "nb_classes: 6"):
        assert f"{line}\n" in said
    (tmp_path / "data" / "ddi" / "images").mkdir(parents=True)
    (tmp_path / "data" / "ddi" / "ddi_clean.csv").write_text("image,split\n")
    done = script("finetune_test.sh", tmp_path, *words)
    summary = done.stdout.split("\nran: ")[1]
    assert done.returncode == 0 and summary.startswith("1\n  timm:test_vit on PAD-UFES\nskipped: 8\n"), done.stderr
    assert "DDI/timm-test_vit/checkpoint-best.pth: script/finetune_train.sh first" in summary
    (tested,) = out.glob("eval_*")
    assert (tested / "test.csv").read_bytes() == (out / "test.csv").read_bytes()
