"""The commands of Pretraining.md, flag for flag, and its tables.

Substitutions: paths become temporary folders, the models a tiny one with random weights, an epoch two images; tiny
crops, and options for them.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from furnace.command_line import parse
from furnace.data.image_labels import encode_labels
from furnace.data.ontology import read_ontology
from furnace.data.pretraining_data import read_pretraining
from furnace.pretraining_arguments import pretraining_parser
from helpers import HAM, PRETRAINING, ROOT, block_with, words_of
from tiny_pretraining import CONFIGS, MODEL, ONTOLOGY, OPTIONS, RUN, command, drawn_set, log_of, no_plots, pretrain

__all__ = ["no_plots"]  # acts on every test here
pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ["--global_crops_size", "48", "--local_crops_size", "32", "--local_crops_number", "1", "--max_updates", "1",
         "--head_n_prototypes", "8", "--head_hidden_dim", "8", "--head_bottleneck_dim", "4", "--num_workers", "0",
         "--device", "cpu", "--amp_dtype", "fp32"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The folder of pretraining.csv and eval.csv."""
    return drawn_set(tmp_path_factory.mktemp("page") / "data").parent


def test_demo_commands(demo_csv, tmp_path) -> None:
    """By hand, the demo's configuration as it is, one update of it; by run.sh, the same configuration."""
    words = words_of("python3 pretraining/run.py -c pretraining/configs/demo_cpu.yaml", {
        "pretraining/configs/demo_cpu.yaml": str(CONFIGS / "demo_cpu.yaml"),
        "demo_data/synthetic_lesions.csv": str(demo_csv),
        "output_dir/pretraining/demo": str(tmp_path / "run")}, PRETRAINING)
    assert RUN.main([*words, "--max_updates", "1", "--num_workers", "0"]) == 0
    assert (tmp_path / "run" / "teacher" / "model.safetensors").exists()
    done = subprocess.run(["bash", str(ROOT / "pretraining" / "run.sh"), "--help"], cwd=tmp_path, text=True,
                          env={**os.environ, "PYTHON": sys.executable, "DATA_CSV": str(demo_csv),
                               "PYTHONPATH": str(ROOT / "classification")}, capture_output=True, timeout=120)
    assert done.returncode == 0 and "--local_crops_number" in done.stdout, done.stderr
    assert "[ -f \"$config\" ]" in (ROOT / "pretraining" / "run.sh").read_text()


@pytest.mark.parametrize("begin", ["torchrun --nproc_per_node 8 pretraining/run.py", "python3 pretraining/run.py -c "
                                   "pretraining/configs/dermino_base.yaml"])
def test_recipe_commands(data, tmp_path, begin) -> None:
    """On several GPUs and on one: without torchrun here, a tiny model, random prototypes."""
    (line,) = [line for line in block_with(begin, PRETRAINING).replace("\\\n", " ").splitlines()
               if line.startswith(begin)]
    words = line.split(".py", 1)[1].split()
    paths = {"pretraining/configs/dermino_base.yaml": str(CONFIGS / "dermino_base.yaml"),
             "pretraining.csv": str(data / "pretraining.csv"), "/path/to/images": str(data),
             "pretraining/configs/dermatology.csv": str(ONTOLOGY), "dinov2_vitb14_pretrain.pth": "random",
             "HAM_clean.csv": str(data / "eval.csv"), "/path/to/HAM10000/images": str(data),
             "output_dir/pretraining/base": str(tmp_path / "run"),
             "output_dir/pretraining/base_one_gpu": str(tmp_path / "run"), "64": "4"}
    assert RUN.main([*(paths.get(word, word) for word in words), "--model", MODEL, "--prototypes", "random", *SMALL,
                     *([] if "64" in words else ["--batch_size", "4"])]) == 0
    assert (tmp_path / "run" / "teacher" / "heads.safetensors").exists()


def test_folder_command(data, tmp_path) -> None:
    """No labels, a model of timm's."""
    words = words_of("python3 pretraining/run.py --data_csv /path/to/photographs", {
        "/path/to/photographs": str(data / "images"), "timm:vit_small_patch14_dinov2.lvd142m": MODEL, "64": "4",
        "output_dir/pretraining/small": str(tmp_path / "run")}, PRETRAINING)
    assert RUN.main([*words, "--pretrained_checkpoint", "random", *SMALL]) == 0
    assert not (tmp_path / "run" / "prototypes.safetensors").exists()


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory) -> Path:
    """RUN of the page."""
    run = tmp_path_factory.mktemp("teacher") / "RUN"
    assert pretrain(run, csv=data / "pretraining.csv", epochs="1", warmup_teacher_temp_epochs="0") == 0
    return run


def test_scripts_take_the_teacher(teacher, data, tmp_path) -> None:
    """The three evaluation commands parse with their own scripts' options; the folder is a model's name."""
    import knn_eval
    import linear_eval
    import run_class_finetuning

    block = block_with("classification/linear_eval.py --model RUN/teacher", PRETRAINING).replace("\\\n", " ")
    csv = pd.read_csv(data / "eval.csv")
    csv.assign(split=np.where(csv["split"] == "val", "test", "train")).to_csv(data / "eval_test.csv", index=False)
    for name, main in (("linear_eval", linear_eval.main), ("knn_eval", knn_eval.main),
                       ("run_class_finetuning", run_class_finetuning.main)):
        (line,) = [line for line in block.splitlines() if f"classification/{name}.py" in line]
        words = [{"RUN/teacher": str(teacher / "teacher"), "7": "3", "DATA/HAM_clean.csv": str(data / "eval_test.csv"),
                  "DATA/images": str(data), "output_dir": str(tmp_path / name),
                  "output_dir/finetuned": str(tmp_path / name)}.get(word, word)
                 for word in line.split(".py")[1].split()]
        more = ["--epochs", "1", "--warmup_epochs", "0", "--batch_size", "2"] if name == "run_class_finetuning" else \
            ["--no_cache"]
        assert main([*words, "--num_workers", "0", "--amp_dtype", "fp32", *more]) == 0, name
        (asked,) = (tmp_path / name).rglob("args.yaml")
        assert yaml.safe_load(asked.read_text())["input_size"] == 48, "the large crops' size, by itself"


def test_python_example(teacher, data, monkeypatch) -> None:
    """The backbone equals timm's, and the class logits have a column per class."""
    monkeypatch.chdir(teacher.parent)
    code = block_with("class_logits", PRETRAINING).replace("224", "48").replace("48, 48) -> (B, D)", "")
    names: dict = {}
    exec(compile(code, "page", "exec"), names)  # noqa: S102 - the page's own code
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(names["backbone"](images), names["same"].eval()(images))
        assert names["class_logits"](images).shape == (2, 127)


def test_ham_example(tmp_path, monkeypatch) -> None:
    """The CSV of the official metadata is understood by the ready ontology."""
    metadata = HAM.parent / "metadata" / "HAM10000_metadata.csv"
    if not metadata.exists():
        pytest.skip("the shared data sets are not here")
    (tmp_path / "HAM10000_metadata.csv").write_bytes(metadata.read_bytes())
    official = pd.read_csv(metadata)
    listed = pd.DataFrame({"image": official["image_id"] + ".jpg", "label": 0,
                           "split": np.resize(["train", "train", "val", "test"], len(official))}).iloc[100:]
    listed.to_csv(tmp_path / "HAM_clean.csv", index=False)
    monkeypatch.chdir(tmp_path)
    exec(compile(block_with("HAM10000_metadata.csv", PRETRAINING), "page", "exec"), {})  # noqa: S102
    table = pd.read_csv("pretraining.csv")
    assert len(table) == 9_915 and set(table["labels"]) == {"akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"}
    assert table.set_index("image")["split"].to_dict() == listed.set_index("image")["split"].to_dict()
    few = table[table["split"] == "train"].groupby("labels").head(1)
    for name in few["image"]:
        (tmp_path / name).write_bytes((ROOT / "tests" / "golden" / "synthetic_640x480.png").read_bytes())
    few.to_csv("few.csv", index=False)
    data = read_pretraining("few.csv", ontology=ONTOLOGY)
    assert data.labels.labelled.all() and len(data.manifest) == 7


@pytest.mark.parametrize("recipe", ["dermino_base", "dermino_large", "demo_cpu", "ham_cpu"])
def test_no_recipe_denies_what_a_label_implies(tmp_path, recipe) -> None:
    """A melanoma is malignant, whatever the recipe; a nevus is benign, and known not to be malignant."""
    ontology = read_ontology(ONTOLOGY)
    args = parse(pretraining_parser(), ["-c", str(CONFIGS / f"{recipe}.yaml"), "--output_dir", str(tmp_path)])
    problems: list = []
    labels = encode_labels(ontology, ["mel", "nv"], ["ham10000"] * 2, label_ancestors=args.label_ancestors,
                           problems=problems)
    state = np.where(labels.known([0, 1]), labels.rows([0, 1]), -1)
    of = {name: state[:, ontology.find(name)].tolist() for name in ("melanoma", "malignant", "benign")}
    assert of == {"melanoma": [1, 0], "malignant": [1, 0], "benign": [0, 1]}
    assert "class denied by a label below it" not in [problem.kind for problem in problems]


def filled(cells: list[str], published: str) -> list[str]:
    """Cells of a row of the recipes; "same" is what stands to its left."""
    found = [published]
    for cell in cells:
        found.append(found[-1] if cell.startswith("same") else cell)
    return found[1:]


def wanted(args) -> dict[str, str]:
    """The rows of the recipes' table, but for words, as an option's value says."""
    small = f", {args.local_crops_number} x {args.local_crops_size}" if args.local_crops_number else ""
    rise = f"{args.warmup_teacher_temp:g} to {args.teacher_temp:g} in {args.warmup_teacher_temp_epochs:g}"
    return {
        "crops": f"2 x {args.global_crops_size}{small}", "blur": "1 - p" if args.dinov2_compat else "p",
        "updates": f"{args.epochs} x {args.epoch_length}" if args.epoch_length else f"{args.epochs} passes",
        "learning rate at 1,024 images": f"{args.base_lr:.0e}".replace("e-0", "e-"),
        "warm-up, epochs": f"{args.warmup_epochs:g}",
        "weight decay": f"{args.weight_decay:g} to {args.weight_decay_end:g}",
        "teacher's momentum": f"{args.momentum_teacher:g} to {args.final_momentum_teacher:g}",
        "teacher's temperature": rise if args.warmup_teacher_temp_epochs else f"{args.teacher_temp:g}",
        "DINO and iBOT head": f"{args.head_n_prototypes:,}", "drop path": f"{args.drop_path:g}",
        "weights of DINO, iBOT, KoLeo, labels": ", ".join(
            f"{getattr(args, f'{part}_loss_weight'):g}" for part in ("dino", "ibot", "koleo", "label")),
        "label vectors, never trained": {"pooler": "CODER, pooler", "mean": "CODER, mean of the tokens"}[
            args.text_pooling],
        "bias of the classes": {"zero": "0", "prior": "log odds"}[args.label_bias],
        "a label implies those above it": "yes" if args.label_ancestors else "no",
        "precision": {"auto": "bf16 where it is faster"}.get(args.amp_dtype, args.amp_dtype)}


def test_tables() -> None:
    """The recipes' numbers are those of the files; every file of a run and every flag exists."""
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
            for line in PRETRAINING.splitlines() if line.startswith("| ")}
    for place, name in enumerate(("dermino_base", "dermino_large", "demo_cpu", "ham_cpu")):
        args = parse(pretraining_parser(), ["-c", str(CONFIGS / f"{name}.yaml")])
        assert args.prototypes == "text" and args.prototype_mode == "frozen"
        for row, value in wanted(args).items():
            published, *cells = rows[row]
            cell = filled(cells, published)[place]
            cell = {"1 - p (`dinov2_compat`)": "1 - p", "65,536 prototypes each": "65,536"}.get(cell, cell)
            assert cell.removesuffix(" epochs") == value or float(cell) == float(value), (name, row, cell, value)
    known = {option for action in pretraining_parser()._actions for option in action.option_strings}
    others = {"--nproc_per_node", "--data", "--nb_classes", "--csv_path", "--input_size", "--output",
                  "--extra", "--help", "--more"}
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z_]+", PRETRAINING))
    assert used - others <= known, used - others - known


def test_files_of_the_page(teacher) -> None:
    """Section 4, but for the plots, which other tests look at."""
    listed = {name for line in PRETRAINING.split("## 4.")[1].split("## 5.")[0].splitlines() if line.startswith("| `")
              for name in line.split("|")[1].replace("`", "").replace(" ", "").split(",")}
    there = {str(path.relative_to(teacher)) for path in teacher.rglob("*") if path.is_file()}
    assert listed - {"plots/", "checkpoint-previous.pth"} <= there, listed - there
    named = {word for line in PRETRAINING.split("## 5.")[1].split("## 6.")[0].splitlines() if line.startswith("| `")
             for word in line.split("|")[1].replace("`", "").replace(" ", "").split(",")}
    logged = {*log_of(teacher)[0], "seconds", "val_knn_acc", "val_knn_bacc"}
    assert named <= logged, named - logged
    assert OPTIONS["model"] == MODEL and command(teacher)  # the run that made it is the tests' own
