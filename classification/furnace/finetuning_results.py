"""The test of a fine-tuned classifier: predictions, metrics with intervals, plots."""

from dataclasses import dataclass
from typing import Any

import torch

from furnace.data.class_names import numbered
from furnace.data.manifest import Manifest
from furnace.data.transforms import build_transform
from furnace.engine_for_finetuning import Predicted, TTAHandler, predict
from furnace.evaluation.calibration import apply_temperature, fit_temperature
from furnace.evaluation.multilabel import multilabel_table, score_multilabel
from furnace.evaluation.plots import draw_classification_plots
from furnace.evaluation.report import predictions_table, score_split
from furnace.evaluation.statistics import resampling_for
from furnace.models.classifier import FineTuned
from furnace.runtime import distributed
from furnace.runtime.files import UserError
from furnace.runtime.run_directory import RunDirectory

SHOWN = ("bacc", "auroc", "auroc_ovr", "weighted_f1", "macro_f1", "acc")


@dataclass(frozen=True)
class Testing:
    """How a classifier is tested.

    Attributes:
        tta: average the logits of several views; val is predicted without.
        tta_views: published or deterministic.
        seed: of the random views.
        device: where to run.
        batch_size: images per forward pass at most.
        num_workers: decoding processes, None picks.
        stratify: bootstrap within classes.
        resamples: of the bootstrap.
    """

    tta: bool
    tta_views: str
    seed: int
    device: torch.device
    batch_size: int
    num_workers: int | None
    stratify: bool
    resamples: int


def check_fit(classifier: FineTuned, manifest: Manifest, *, model: str) -> None:
    """The classifier is of this model and tells these classes apart.

    Raises:
        UserError: it is not, or the classes have other names.
    """
    task = "multilabel" if manifest.multilabel else "multiclass"
    if classifier.name != model:
        raise UserError(f"{classifier.path} holds a {classifier.name}; you asked for --model {model}")
    if len(classifier.class_names) != manifest.nb_classes or classifier.task != task:
        raise UserError(f"{classifier.path} tells {len(classifier.class_names)} classes ({classifier.task}) apart and "
                        f"the data set has {manifest.nb_classes} ({task})")
    unnamed = numbered(manifest.nb_classes)
    if unnamed not in (classifier.class_names, manifest.class_names) and \
            classifier.class_names != manifest.class_names:
        raise UserError(f"the classes of {classifier.path} are {', '.join(classifier.class_names)}; those of the data "
                        f"set are {', '.join(manifest.class_names)}: give both the same order")


def predict_split(classifier: FineTuned, manifest: Manifest, how: Testing, *, tta: bool,
                  description: str) -> Predicted | None:
    """The predictions of some images, with the transform, precision and crop that the classifier was made with."""
    transform = build_transform(classifier.data_config, crop_pct=classifier.crop_pct)
    if tta:
        transform = TTAHandler(classifier.data_config, views=how.tta_views, crop_pct=classifier.crop_pct)
    return predict(classifier.model, manifest, transform, device=how.device, amp_dtype=classifier.amp_dtype,
                   batch_size=how.batch_size, num_workers=how.num_workers, seed=how.seed if tta else None,
                   multilabel=manifest.multilabel, description=description)


def score_splits(run: RunDirectory, classifier: FineTuned, splits: dict[str, Manifest | None], how: Testing, *,
                 data_set: str) -> dict[str, Any]:
    """Predict val, test and an external test set; write their CSVs and plots into the run directory.

    A temperature is fitted on val where there is one. All processes call it.

    Args:
        run: the directory.
        classifier: the chosen model.
        splits: val first, then test and external; empty and absent ones are left out.
        how: settings.
        data_set: its name.

    Returns:
        What results.json holds, in the main process; {} in others.
    """
    results: dict[str, Any] = {}
    temperature, fitted_on = None, None
    for name, manifest in splits.items():
        if manifest is None or not len(manifest):
            continue
        found = predict_split(classifier, manifest, how, tta=how.tta and name != "val", description=name)
        if found is None:
            continue
        if name == "val" and not manifest.multilabel:
            temperature = fit_temperature(found.probabilities, manifest.labels)
            fitted_on = None if temperature is None else f"{len(manifest)} val images"
        results[name] = _score(run, name, manifest, found, how, temperature, fitted_on)
    if not distributed.is_main():
        return {}
    return {"task": "finetuning", "data_set": data_set, "model": classifier.name,
            "weights_sha256": classifier.sha256, "amp_dtype": classifier.amp_dtype,
            "class_names": list(classifier.class_names), "best_epoch": classifier.epoch,
            "tta": how.tta_views if how.tta else None, "temperature": temperature, "splits": results}


def _score(run: RunDirectory, name: str, manifest: Manifest, found: Predicted, how: Testing, temperature: float | None,
           fitted_on: str | None) -> dict[str, Any]:
    """One split: its CSV, its metrics, and (but for val) its plots."""
    resampling = resampling_for(manifest.frame, stratify=how.stratify, resamples=how.resamples)
    if manifest.multilabel:
        run.write_predictions(name, multilabel_table(manifest.filenames, manifest.targets, found.probabilities,
                                                     manifest.class_names))
        return score_multilabel(manifest.targets, found.probabilities, class_names=manifest.class_names,
                                resampling=resampling)
    labels = manifest.labels
    run.write_predictions(name, predictions_table(manifest.filenames, labels, found.probabilities))
    if name != "val":
        calibrated = None if temperature is None else apply_temperature(found.probabilities, temperature)
        draw_classification_plots(run.path / "plots" / ("" if name == "test" else name), labels, found.probabilities,
                                  manifest.class_names, calibrated=calibrated)
    return score_split(labels, found.probabilities, resampling=resampling,
                       temperature=None if name == "val" else temperature, fitted_on=fitted_on)
