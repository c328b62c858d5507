"""The linear evaluation on features that are there: fit on a part of train, test once, write everything down.

The published probe is fitted on train alone. The sweep chooses its strength on val and is refitted on train and val.
Where there is a val split, a temperature is fitted on its probabilities (of the probe that has not seen val) and told
beside the uncalibrated numbers; predictions are stored uncalibrated.
"""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from furnace.data.manifest import ROW, Manifest
from furnace.data.splits import take_percent
from furnace.evaluation.calibration import apply_temperature, fit_temperature
from furnace.evaluation.linear_probe import LinearProbe, fit_linear_probe
from furnace.evaluation.metrics import NAMES, classification_metrics
from furnace.evaluation.plots import draw_classification_plots, plot_label_efficiency
from furnace.evaluation.probe_sweep import sweep_linear_probe
from furnace.evaluation.report import predictions_table, score_split, table_row
from furnace.evaluation.saved_probe import save_probe
from furnace.evaluation.statistics import resampling_for
from furnace.models import Provenance
from furnace.runtime import files
from furnace.runtime.files import UserError
from furnace.runtime.run_directory import RunDirectory

logger = logging.getLogger(__name__)

TASK = "linear_probe"
PRINTED = ("bacc", "auroc", "weighted_f1", "acc")  # of the summary


@dataclass(frozen=True)
class Protocol:
    """What does not change between the runs of one command.

    Attributes:
        probe: published or sweep.
        monitor: metric by which a sweep chooses.
        stratify: bootstrap within classes.
        resamples: of the bootstrap.
        amp_dtype: precision of the features.
        transform: published or fast.
        checkpoint: as the user gave it.
        model_seed: of random weights.
        device: where the published probe is fitted.
    """

    probe: str
    monitor: str
    stratify: bool
    resamples: int
    amp_dtype: str
    transform: str
    checkpoint: str | None
    model_seed: int
    device: Any = "cpu"


@dataclass(frozen=True)
class LabelledFeatures:
    """Manifest rows and their (N, D) features, in the same order."""

    manifest: Manifest
    embeddings: np.ndarray

    def split(self, name: str) -> "LabelledFeatures":
        """The images of a split."""
        at = np.flatnonzero((self.manifest.frame["split"] == name).to_numpy())
        return LabelledFeatures(self.manifest.split(name), self._rows(at))

    def of(self, part: Manifest) -> "LabelledFeatures":
        """The images of a subset of the manifest, in the subset's order."""
        at = pd.Index(self.manifest.frame[ROW]).get_indexer(part.frame[ROW])
        return LabelledFeatures(part, self._rows(at))

    def _rows(self, at: np.ndarray) -> np.ndarray:
        """A view where the rows lie together: at a million images a copy is gigabytes."""
        if len(at) and at[-1] - at[0] == len(at) - 1 and (np.diff(at) == 1).all():
            return self.embeddings[at[0]:at[-1] + 1]
        return self.embeddings[at]


def draw_subsets(manifest: Manifest, settings: list[dict[str, Any]], percent_mode: str) -> list[Manifest]:
    """The train images of every run.

    Raises:
        UserError: parts that no probe can be fitted on, all of them in one message.
    """
    train, subsets, faults = manifest.split("train"), [], []
    for setting in settings:
        subset = take_percent(train, setting["percent_data"], mode=percent_mode, seed=setting["seed"])
        classes = len(np.unique(subset.labels))
        if classes < 2:
            faults.append(f"  --percent_data {setting['percent_data']:g}, seed {setting['seed']}: {len(subset)} images "
                          f"of {classes} class")
        subsets.append(subset)
    if faults:
        raise UserError("a probe needs train images of two or more classes, and there are\n" + "\n".join(faults) +
                        "\n  Take larger fractions, other seeds, or --percent_mode stratified")
    return subsets


def needed_images(manifest: Manifest, subsets: list[Manifest]) -> Manifest:
    """The images that any of the runs reads: val, test, and the union of the train subsets, in the CSV's order."""
    rows = set().union(*(subset.frame[ROW].tolist() for subset in subsets))
    keep = (manifest.frame["split"] != "train") | manifest.frame[ROW].isin(rows)
    return manifest.take(np.flatnonzero(keep.to_numpy()))


def evaluate_once(run: RunDirectory, setting: dict[str, Any], subset: Manifest, data: LabelledFeatures,
                  external: LabelledFeatures | None, protocol: Protocol, provenance: Provenance, *,
                  plots: bool = True) -> dict[str, Any]:
    """One probe: fit, test, write predictions, probe and plots into the run directory.

    Args:
        run: the directory.
        setting: percent_data and seed.
        subset: the train images, from ``draw_subsets``.
        data: features of ``needed_images``.
        external: features of an external test set.
        protocol: the rest.
        provenance: the backbone.
        plots: draw confusion matrix, ROC, precision-recall and reliability of the test split.

    Returns:
        What results.json holds.
    """
    manifest, seed = data.manifest, setting["seed"]
    train, val = data.of(subset), data.split("val")
    probe, on_train, chosen = _fit(train, val, protocol, manifest.nb_classes, seed)
    temperature, fitted_on = None, None
    splits: dict[str, Any] = {}
    if len(val.manifest):
        probabilities = on_train.predict_proba(val.embeddings)
        temperature = fit_temperature(probabilities, val.manifest.labels)
        fitted_on = None if temperature is None else f"{len(val.manifest)} val images"
        run.write_predictions("val", predictions_table(val.manifest.filenames, val.manifest.labels, probabilities))
    rows = []
    for name, part in (("test", data.split("test")), ("external", external)):
        if part is None or not len(part.manifest):
            continue
        probabilities, labels = probe.predict_proba(part.embeddings), part.manifest.labels
        run.write_predictions(name, predictions_table(part.manifest.filenames, labels, probabilities))
        resampling = resampling_for(part.manifest.frame, stratify=protocol.stratify, resamples=protocol.resamples)
        splits[name] = score_split(labels, probabilities, resampling=resampling, temperature=temperature,
                                   fitted_on=fitted_on)
        title = manifest.name if name == "test" else f"{manifest.name}->{part.manifest.name}"
        rows.append(table_row(title, classification_metrics(labels, probabilities)))
        if plots:
            calibrated = None if temperature is None else apply_temperature(probabilities, temperature)
            draw_classification_plots(run.path / "plots" / ("" if name == "test" else name), labels, probabilities,
                                      manifest.class_names, calibrated=calibrated)
    save_probe(run.path, probe, class_names=manifest.class_names, provenance=provenance, checkpoint=protocol.checkpoint,
               seed=protocol.model_seed, transform=protocol.transform, amp_dtype=protocol.amp_dtype,
               temperature=temperature, fitted_on=fitted_on)
    return {"task": TASK, "data_set": manifest.name, "model": provenance.name,
            "weights_sha256": provenance.sha256, "amp_dtype": protocol.amp_dtype,
            "class_names": list(manifest.class_names), "setting": {**setting, "train_images": len(subset)},
            "probe": {"kind": protocol.probe, "cost": probe.cost, "iterations": probe.iterations, **chosen},
            "table_rows": rows, "splits": splits}


def _fit(train: LabelledFeatures, val: LabelledFeatures, protocol: Protocol, nb_classes: int,
         seed: int) -> tuple[LinearProbe, LinearProbe, dict[str, Any]]:
    """The probe, the probe that has not seen val, and what is to be told of the choice."""
    if protocol.probe == "sweep":
        sweep = sweep_linear_probe(train.embeddings, train.manifest.labels, val.embeddings, val.manifest.labels,
                                   nb_classes=nb_classes, monitor=protocol.monitor)
        return sweep.probe, sweep.on_train, {"monitor": protocol.monitor, "sweep": sweep.table}
    probe = fit_linear_probe(train.embeddings, train.manifest.labels, nb_classes=nb_classes, seed=seed,
                             device=protocol.device)
    return probe, probe, {"objective": probe.objective}


def summarise_runs(parent: RunDirectory, outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds of every fraction, for the test and an external split.

    Writes table.csv (a row per run and split), summary.csv (a row per fraction and split) and the label-efficiency
    plots.

    Args:
        parent: the directory of the whole command.
        outcomes: the children's results.

    Returns:
        What results.json of the parent holds.
    """
    table = pd.DataFrame([{"split": split, **outcome["setting"],
                           **{name: entry["value"] for name, entry in scored["metrics"].items()}}
                          for outcome in outcomes for split, scored in outcome["splits"].items()])
    table = table.astype({name: float for name in NAMES})
    files.write_table(parent.path / "table.csv", table)
    (parent.path / "plots").mkdir(exist_ok=True)
    summary = []
    for split, runs in table.groupby("split", sort=False):
        name = "label_efficiency.png" if split == "test" else f"label_efficiency_{split}.png"
        plot_label_efficiency(parent.path / "plots" / name, runs)
        for percent, group in runs.groupby("percent_data"):
            entry = {"split": split, "percent_data": float(percent),
                     "train_images": int(group["train_images"].iloc[0]), "runs": len(group)}
            for metric in NAMES:
                values = group[metric].dropna()
                entry[f"{metric}_mean"] = float(values.mean()) if len(values) else None
                entry[f"{metric}_sd"] = float(values.std(ddof=1)) if len(values) > 1 else None
            summary.append(entry)
    files.write_table(parent.path / "summary.csv", pd.DataFrame(summary))
    shared = {key: outcomes[0][key] for key in ("task", "data_set", "model", "weights_sha256", "amp_dtype",
                                                "class_names")}
    rows = [_named(outcome) for outcome in outcomes]
    return {**shared, "summary": summary, "table_rows": [row for part in rows for row in part]}


def _named(outcome: dict[str, Any]) -> list[str]:
    """A child's lines of the published table, its setting in the name."""
    setting = outcome["setting"]
    mark = f"@percent_{setting['percent_data']:g}_seed_{setting['seed']}"
    named = []
    for row in outcome["table_rows"]:
        name, *values = row.rsplit(",", 5)
        named.append(",".join([name[:-1] + mark + '"' if name.endswith('"') else name + mark, *values]))
    return named


def summary_lines(results: dict[str, Any]) -> str:
    """The summary for the eye: mean (SD) over the runs of each fraction."""
    lines = [f"{results['data_set']}, {results['model']}, {results['amp_dtype']}: mean (SD) over seeds",
             "  split     percent  images  runs  " + "".join(f"{name:<18}" for name in PRINTED)]
    for entry in results["summary"]:
        cells = []
        for name in PRINTED:
            mean, sd = entry[f"{name}_mean"], entry[f"{name}_sd"]
            spread = "" if sd is None else f" ({sd:.4f})"
            cells.append("nan" if mean is None else f"{mean:.4f}{spread}")
        lines.append(f"  {entry['split']:<8}  {100 * entry['percent_data']:6g}%  {entry['train_images']:6d}  "
                     f"{entry['runs']:4d}  " + "".join(f"{cell:<18}" for cell in cells))
    return "\n".join(lines)
