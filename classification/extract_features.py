"""Features of a frozen backbone for images with or without labels, as a file.

    python3 extract_features.py IMAGE_OR_FOLDER_OR_CSV --model PanDerm_Base_LP --pretrained_checkpoint FILE.pth \
        --output features.npz --scatter pca --color class_name --attention

Written: features.npz (or .safetensors) and features.csv, a line per image with all columns of the input; with --scatter
features_pca.png (or _umap), with --attention the folder features_attention.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from furnace.arguments import extract_features_parser, extraction_of, settle_input_size
from furnace.command_line import entry_point, logger, parse
from furnace.data.manifest import Manifest
from furnace.data.unlabelled import read_images
from furnace.evaluation.attention import draw_attention, require_attention
from furnace.evaluation.feature_export import FORMATS, image_table, import_umap, project, write_features
from furnace.evaluation.features import Extraction, backbone_features, settle_amp_dtype
from furnace.evaluation.plots import plot_scatter
from furnace.models import Provenance, create_backbone
from furnace.runtime import distributed, files
from furnace.runtime.files import UserError


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Extract; returns the exit code."""
    args = parse(extract_features_parser(), argv)
    outputs = name_outputs(args)
    distributed.on_main(lambda: files.refuse_outputs(outputs.values(), [args.input], overwrite=args.overwrite))
    manifest = read_images(args.input, args.root_path,
                           report_folder=args.output.parent if distributed.is_main() else None)
    table = image_table(manifest)
    check_pictures(args, table)
    settle_input_size(args)
    backbone = create_backbone(args.model, args.pretrained_checkpoint, input_size=args.input_size, seed=args.seed)
    if args.attention:
        require_attention(backbone)
    files.check_space(args.output.parent, 65536 + len(manifest) * (4 * backbone.num_features + 400))

    how = extraction_of(args)
    how = replace(how, amp_dtype=distributed.on_main(
        lambda: settle_amp_dtype(args.amp_dtype, backbone.to(how.device), manifest, how)))
    features = backbone_features(backbone, manifest, how)
    if features is None:
        return 0
    write_features(args.output, features, describe(manifest, backbone.provenance, how))
    files.write_table(outputs["table"], table)
    if args.scatter:
        xy, title = project(features.embeddings, args.scatter, seed=args.seed)
        plot_scatter(outputs["scatter"], xy, table[args.color].to_numpy(dtype=object) if args.color else None,
                     title=f"{args.model}: {title}", column=args.color or "")
    if args.attention:
        for path in outputs["attention"].glob("[0-9][0-9][0-9][0-9]_*.png"):
            path.unlink()  # of an earlier run, with --overwrite
        draw_attention(outputs["attention"], backbone, manifest.take(range(min(args.attention, len(manifest)))), how)
    logger.info("%d images, %d features each, %s; written: %s", *features.embeddings.shape, how.amp_dtype,
                ", ".join(map(str, outputs.values())))
    return 0


def name_outputs(args: argparse.Namespace) -> dict[str, Path]:
    """Everything that this run writes."""
    if args.output.suffix not in FORMATS:
        raise UserError(f"--output {args.output} must end in {' or '.join(FORMATS)}")
    beside = {"features": args.output, "table": args.output.with_suffix(".csv")}
    if args.scatter:
        beside["scatter"] = args.output.with_name(f"{args.output.stem}_{args.scatter}.png")
    if args.attention:
        beside["attention"] = args.output.with_name(f"{args.output.stem}_attention")
    return beside


def check_pictures(args: argparse.Namespace, table: pd.DataFrame) -> None:
    """Refuse before the work what would fail after it."""
    if args.color is not None and not args.scatter:
        raise UserError("--color colours the points of --scatter: add --scatter pca")
    if args.color is not None and args.color not in table:
        raise UserError(f"--color {args.color} is no column of {args.input}; there are: {', '.join(table.columns[1:])}")
    if args.scatter and len(table) < 3:
        raise UserError(f"--scatter needs at least 3 images, and there are {len(table)}")
    if args.scatter == "umap":
        import_umap()


def describe(manifest: Manifest, provenance: Provenance, how: Extraction) -> dict[str, Any]:
    """What the features depend on."""
    return {"model": provenance.name, "weights": provenance.file, "weights_sha256": provenance.sha256,
            "transform": {"mode": how.transform, **provenance.data_config}, "precision": how.amp_dtype,
            "input": manifest.name, "input_sha256": manifest.sha256, "images_digest": manifest.images_digest}


if __name__ == "__main__":
    sys.exit(main())
