"""Pretrain a vision transformer the DermINO way: self-supervised, with labels where there are some, with prototypes.

    python run.py -c configs/dermino_base.yaml --data_csv images.csv --ontology configs/dermatology.csv --output_dir RUN
    python run.py -c configs/demo_cpu.yaml --data_csv FOLDER --output_dir RUN
    torchrun --nproc_per_node 8 run.py -c configs/dermino_base.yaml --data_csv images.csv --output_dir RUN

The same command goes on where an unfinished run was. RUN/teacher is what was learned: pass it as --model to any script.
"""

import argparse
import dataclasses
import functools
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    import furnace as furnace
except ModuleNotFoundError as missing:
    if missing.name != "furnace":
        raise
    print("error: this script needs the package furnace: type\n  pip install -r requirements.txt && pip install -e ."
          "\nin the repository's root", file=sys.stderr)
    sys.exit(2)

from furnace.command_line import entry_point, own_option_names, parse
from furnace.data.datasets import require_decodable
from furnace.data.overlap import forbid_overlap
from furnace.data.pretraining_data import PretrainingData, read_pretraining
from furnace.evaluation.run import open_evaluation_run
from furnace.models.dino import DinoModel
from furnace.models.dino_files import export_teacher
from furnace.pretraining import (
    HeldOut,
    build_backbone,
    build_model,
    keep_vectors,
    label_bias,
    label_vectors,
    pretrain,
    read_held_out,
)
from furnace.pretraining_arguments import HERE, pretraining_parser, settle_options
from furnace.pretraining_options import LABEL_SOURCES, PretrainingOptions, build_schedules, cut_batches
from furnace.pretraining_results import Progress, results_of
from furnace.runtime import distributed
from furnace.runtime.files import UserError, sha256_file
from furnace.runtime.run_directory import RunDirectory
from furnace.runtime.tracking import tracking
from furnace.training import settle_precision

logger = logging.getLogger(__name__)

TASK = "pretraining"
# options that cannot change the numbers, besides those of every evaluation
NOT_IN_FINGERPRINT = {"data_csv", "ontology", "eval_csv", "eval_root", "forbid_overlap", "forbid_overlap_root",
                      "max_updates", "resume",
                      "grad_checkpointing", "pin_mem", "save_ckpt", "save_ckpt_freq", "save_every_steps", "wandb",
                      "wandb_project", "exp_name", "log_dir"}


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Pretrain; returns the exit code."""
    with own_option_names(HERE):
        return run(argv)


def run(argv: Sequence[str] | None) -> int:
    """``main``, whose messages may name options as other scripts call them."""
    args = parse(pretraining_parser(), argv)
    given = dict(vars(args))  # args.yaml says what was asked for
    settle_options(args)
    options = PretrainingOptions(**{field.name: getattr(args, field.name)
                                    for field in dataclasses.fields(PretrainingOptions)})
    data, held_out = distributed.on_main(functools.partial(read_data, args))
    backbone = build_backbone(options)
    build_schedules(options, cut_batches(len(data.manifest), options))  # its faults before any work
    vectors = label_vectors(backbone, data, options, None if args.overwrite else args.output_dir)
    directory = open_run_of(args, data, held_out, backbone)
    results = distributed.on_main(directory.read_results)
    if results:
        logger.info("this run is finished:")
        report(results)
        return 0
    if not directory.previous:  # a new run
        for images in (data.manifest, *([] if held_out.gallery is None else (held_out.gallery, held_out.queries))):
            distributed.on_main(functools.partial(require_decodable, images))
    options = distributed.on_main(functools.partial(settle_precision, options, directory, backbone,
                                                    options.global_crops_size))
    distributed.on_main(lambda: directory.write_arguments({**given, "resolved_amp_dtype": options.amp_dtype}))
    if vectors is not None:
        distributed.on_main(lambda: keep_vectors(directory.path, vectors))
    model = build_model(backbone, vectors, options, label_bias(data, options))
    return train(args, options, directory, model, data, held_out)


def read_data(args: argparse.Namespace) -> tuple[PretrainingData, HeldOut]:
    """Images, labels and the images that the teacher is judged on; every problem told before any work."""
    data = read_pretraining(args.data_csv, args.root_path, ontology=args.ontology,
                            label_ancestors=args.label_ancestors, strict_labels=not args.lenient_labels,
                            report_folder=args.output_dir)
    with own_option_names({"--root_path": "--eval_root"}):
        held_out = read_held_out(args.eval_csv, args.eval_root, data.manifest, seed=args.seed, folder=args.output_dir)
    if args.forbid_overlap:
        roots = args.forbid_overlap_root
        with own_option_names({"--root_path": "--forbid_overlap_root"}):
            forbid_overlap(data.manifest, args.forbid_overlap, report_folder=args.output_dir,
                           roots=roots * len(args.forbid_overlap) if roots and len(roots) == 1 else roots)
    return data, held_out


def open_run_of(args: argparse.Namespace, data: PretrainingData, held_out: HeldOut, backbone: Any) -> RunDirectory:
    """``--output_dir`` itself."""
    also = {"processes": distributed.world_size(), "batch_size": args.batch_size,
            "ontology_sha256": data.ontology.sha256 if data.ontology else "",
            "eval_sha256": "" if held_out.gallery is None else
            f"{held_out.queries.sha256} {held_out.queries.images_digest}",
            "prototypes_sha256": "" if args.prototypes in LABEL_SOURCES else digest_of(args.prototypes)}
    return distributed.on_main(lambda: open_evaluation_run(
        TASK, vars(args), data.manifest, backbone.provenance, also=also, left_out=NOT_IN_FINGERPRINT,
        folder=lambda mark: args.output_dir))


def digest_of(prototypes: str) -> str:
    """Hex SHA-256 of the file of ``--prototypes``."""
    path = Path(prototypes).expanduser()
    if not path.is_file():
        raise UserError(f"--prototypes {path} does not exist")
    return sha256_file(path)


def train(args: argparse.Namespace, options: PretrainingOptions, run: RunDirectory, model: DinoModel,
          data: PretrainingData, held_out: HeldOut) -> int:
    """Pretrain and export the teacher."""
    about = {"method": "hybrid pretraining (DINO, iBOT, KoLeo, masked multi-label cross-entropy)",
             "start": model.backbone.provenance.name, "data_set": data.manifest.name,
             "images": len(data.manifest), "fingerprint": run.fingerprint}
    with tracking(folder=run.path, run_id=run.fingerprint[:16], config=run.parts, run_name=args.exp_name,
                  wandb_project=args.wandb_project if args.wandb else None, tensorboard=args.log_dir) as track:
        progress = Progress(run.path / "plots", data, model, options, track)
        trained = pretrain(run, model, data, held_out, options, meta=about, track=progress)
    model.load_state_dict(trained.best["model"])
    finished = len(trained.history) == options.epochs
    if distributed.is_main():
        export_teacher(run.path / "teacher", model.eval(), input_size=options.global_crops_size,
                       about={**about, "updates": trained.updates, "finished": finished})
        if finished:
            run.write_results(results_of(data, held_out, model, trained, run))
            report(run.read_results())
        else:
            logger.info("paused after %d updates (the same command without --max_updates goes on); the teacher so far "
                        "is %s", trained.updates, run.path / "teacher")
    return 0


def report(results: dict[str, Any]) -> None:
    """Print what was learned and where it is."""
    if not distributed.is_main():
        return
    values = {**results["losses"], **{name: entry["value"]
                                      for split in results["splits"].values()
                                      for name, entry in split["metrics"].items()}}
    logger.info("%d updates on %d images (%d labelled): %s; the teacher is %s", results["updates"],
                results["train_images"], results["labelled_images"],
                ", ".join(f"{name} {value:.4f}" for name, value in values.items() if value is not None),
                results["teacher"])


if __name__ == "__main__":
    sys.exit(main())
