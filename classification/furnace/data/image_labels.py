"""Labels of images in the terms of an ontology, each image with what its source says of each class.

What "present", "absent" and "unknown" mean stands in ``ontology``.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from furnace.data.class_names import some
from furnace.data.multilabel import SEPARATOR
from furnace.data.ontology import Ontology, fold
from furnace.data.problems import PRINTED, Problem

CHUNK = 4096  # images whose dense rows are made at a time


@dataclass(frozen=True, eq=False)
class ImageLabels:
    """The labels of N images, a few class numbers each; dense rows are made for the images of a batch.

    Attributes:
        ontology: of K classes.
        label_ancestors: whether a label implies its ancestors.
        labelled: (N,) bool, images that take part in the label loss: their source annotates one of their labels.
        source: (N,) int64, the image's row of ``ontology.mask``; -1 for no source, or one that annotates no class.
        classes: (E,) int64, the labels of all labelled images, one image after the other; without ancestors.
        offsets: (N + 1,) int64; image i has ``classes[offsets[i]:offsets[i + 1]]``.
        specific: (E,) bool, labels with no other label of their image below them.
    """

    ontology: Ontology
    label_ancestors: bool
    labelled: np.ndarray
    source: np.ndarray
    classes: np.ndarray
    offsets: np.ndarray
    specific: np.ndarray

    def __len__(self) -> int:
        return len(self.labelled)

    def rows(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Images (B,) to targets (B, K) float32: 1 where a class is present, else 0; zeros for unlabelled images."""
        indices = np.asarray(indices, dtype=np.int64)
        row, entry = self._entries(indices)
        targets = np.zeros((len(indices), len(self.ontology)), dtype=np.float32)
        targets[row, self.classes[entry]] = 1
        if self.label_ancestors:
            at, ancestor = np.nonzero(self.ontology.ancestors[self.classes[entry]])
            targets[row[at], ancestor] = 1
        return targets

    def known(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Images (B,) to (B, K) bool: the classes that count in the loss; none of an unlabelled image.

        It is ``ontology.mask[source]``, corrected for each image by the module's two rules with ``label_ancestors``.
        """
        indices = np.asarray(indices, dtype=np.int64)
        known = np.zeros((len(indices), len(self.ontology)), dtype=bool)
        labelled = self.labelled[indices]
        known[labelled] = self.ontology.mask[self.source[indices[labelled]]]
        if self.label_ancestors:
            row, present = np.nonzero(known & (self.rows(indices) > 0))
            at, ancestor = np.nonzero(self.ontology.ancestors[present])
            known[row[at], ancestor] = True
            row, entry = self._entries(indices)
            row, entry = row[self.specific[entry]], entry[self.specific[entry]]
            at, below = np.nonzero(self.ontology.ancestors.T[self.classes[entry]])
            known[row[at], below] = False
        return known

    def log_odds(self) -> np.ndarray:
        """(K,) float32: ln((present + 1) / (absent + 1)) of each class over the images where it is known."""
        present, absent = np.ones(len(self.ontology)), np.ones(len(self.ontology))
        for start in range(0, len(self), CHUNK):
            indices = np.arange(start, min(start + CHUNK, len(self)))
            targets, known = self.rows(indices) > 0, self.known(indices)
            present += (known & targets).sum(axis=0)
            absent += (known & ~targets).sum(axis=0)
        return np.log(present / absent).astype(np.float32)

    def _entries(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(E',) places in ``indices`` and (E',) places in ``classes`` of all labels of these images."""
        start = self.offsets[indices]
        count = self.offsets[indices + 1] - start
        shift = start - (np.cumsum(count) - count)
        return np.repeat(np.arange(len(indices)), count), np.repeat(shift, count) + np.arange(count.sum())


def encode_labels(ontology: Ontology, labels: Sequence[str | None], sources: Sequence[str | None], *,
                  label_ancestors: bool, problems: list[Problem], images: Sequence[str] | None = None,
                  lines: Sequence[int] | None = None, strict: bool = True) -> ImageLabels:
    """Look up the labels of N images; 1,000,000 images with 1-3 of 600 classes take about 3 s of one core.

    An image without a label is unlabelled, without a word. One picture may stand under two sources: each row has its
    own labels and is masked by its own source, and where the labels differ there is a warning. Under one source the
    rows of a picture must agree, for each says that the other's labels are absent.

    Args:
        ontology: the classes and sources.
        labels: N cells of ids, names or synonyms between semicolons; "", None or NaN for none.
        sources: N data sets, as the ontology names them; "", None or NaN for none.
        label_ancestors: whether a label implies its ancestors.
        problems: extended; nothing is raised here.
        images: N names, by which one picture in two rows is found; None does not look for that.
        lines: N lines in the CSV, for the problems; None counts from 2.
        strict: labels outside the ontology, labels that count for nothing and rows that disagree are errors; False
            makes them warnings. An image with a term that is not understood is then unlabelled: to call it free of
            all other classes might be wrong.
    """
    lines = np.arange(2, len(labels) + 2) if lines is None else np.asarray(lines)
    source_cells = _text(sources)
    codes, names = pd.factorize(source_cells)
    source = np.array([ontology.source_index(name) for name in names], dtype=np.int64)[codes]
    image, label, term, terms = _entries_of(_text(labels), ontology)
    unknown = label < 0
    _tell_unknown(ontology, terms, term[unknown], lines[image[unknown]], strict, problems)
    understood = np.ones(len(source), dtype=bool)
    understood[image[unknown]] = False
    image, label = np.divmod(np.unique((image * len(ontology) + label)[~unknown]), len(ontology))

    annotated = np.append(ontology.mask, np.zeros((1, len(ontology)), dtype=bool), axis=0)  # the last: no source, -1
    counts = annotated
    if label_ancestors:
        counts = annotated | (annotated.astype(np.float32) @ ontology.ancestors.T.astype(np.float32) > 0)
    labelled = np.zeros(len(source), dtype=bool)
    labelled[image[counts[source[image], label]]] = True
    labelled &= understood
    idle = ~annotated[source[image], label]
    _tell_idle(ontology, source_cells, source, image[idle], label[idle], counts, lines, strict, problems)

    kept = labelled[image]
    image, label = image[kept], label[kept]
    offsets = np.zeros(len(source) + 1, dtype=np.int64)
    np.cumsum(np.bincount(image, minlength=len(source)), out=offsets[1:])
    result = ImageLabels(ontology=ontology, label_ancestors=label_ancestors, labelled=labelled, source=source,
                         classes=label, offsets=offsets, specific=_specific(label, offsets, ontology.ancestors))
    for array in (labelled, source, label, offsets, result.specific):
        array.flags.writeable = False
    if label_ancestors:
        _tell_never_absent(result, problems)
    else:
        _tell_denied(result, problems)
    if images is not None:
        _tell_shared(result, images, lines, strict, problems)
    return result


def _text(cells: Sequence[str | None]) -> np.ndarray:
    cells = pd.Series(cells, dtype=object)
    return cells.where(cells.notna(), "").to_numpy()


def _entries_of(cells: np.ndarray, ontology: Ontology) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(E,) image, (E,) class (-1 for none) and (E,) number of every term of all cells, and the terms by number."""
    filled = np.flatnonzero(cells != "")
    cells = cells[filled]
    count = np.fromiter((cell.count(SEPARATOR) + 1 for cell in cells), dtype=np.int64, count=len(cells))
    parts = SEPARATOR.join(cells).split(SEPARATOR) if len(cells) else []
    codes, terms = pd.factorize(np.array(parts, dtype=object))
    empty = np.array([not term.strip() for term in terms], dtype=bool)
    found = [ontology.find(term) for term in terms]
    of_term = np.array([-1 if k is None else k for k in found], dtype=np.int64)
    written = ~empty[codes]
    return np.repeat(filled, count)[written], of_term[codes[written]], codes[written], terms


def _specific(classes: np.ndarray, offsets: np.ndarray, ancestors: np.ndarray) -> np.ndarray:
    """(E,) bool; images with equally many labels are compared together, all pairs of an image's labels."""
    specific = np.ones(len(classes), dtype=bool)
    count = np.diff(offsets)
    for size in np.unique(count[count > 1]):
        starts = offsets[:-1][count == size]
        for part in np.array_split(starts, 1 + len(starts) * size * size // 10_000_000):  # ten MB at a time
            entries = part[:, None] + np.arange(size)  # (n, size)
            labels = classes[entries]
            specific[entries] = ~ancestors[labels[:, :, None], labels[:, None, :]].any(axis=1)
    return specific


# --------------------------------------------------------------------------------------------------------- problems

def _tell_unknown(ontology: Ontology, terms: np.ndarray, codes: np.ndarray, lines: np.ndarray, strict: bool,
                  problems: list[Problem]) -> None:
    """A problem per term that is no class, with a suggestion for as many as are printed."""
    which, first, times = np.unique(codes, return_index=True, return_counts=True)
    for number, k in enumerate(np.argsort(first)):
        term = terms[which[k]].strip()
        close = difflib.get_close_matches(fold(term), ontology.terms, 1) if number < PRINTED else []
        remedy = f"write {ontology.names[ontology.terms[close[0]]]!r} if that is meant, or add" if close else "add"
        parts = [part.strip() for part in term.replace("|", ",").replace("/", ",").split(",")]
        if len(parts) > 1 and all(ontology.find(part) is not None for part in parts):
            remedy = f"write {SEPARATOR.join(parts)!r} for several labels, or add"
        problems.append(Problem(
            "label outside the ontology", row=int(lines[first[k]]), column="labels", warning=not strict,
            text=f"{term!r} ({_times(times[k])}) is no id, name or synonym in {ontology.path.name}",
            remedy=f"{remedy} it to the ontology, or take it out"))


def _tell_idle(ontology: Ontology, cells: np.ndarray, source: np.ndarray, image: np.ndarray, label: np.ndarray,
               counts: np.ndarray, lines: np.ndarray, strict: bool, problems: list[Problem]) -> None:
    """Labels that their source does not annotate: a problem per source that annotates none, else per source and class.

    Args:
        ontology: of K classes and S sources.
        cells: (N,) sources as written.
        source: (N,) int64.
        image: (E,) the image of each such label.
        label: (E,) its class.
        counts: (S + 1, K) bool, the classes that, or of which an ancestor, a source annotates.
        lines: (N,).
        strict: see ``encode_labels``.
        problems: extended.
    """
    lost = np.unique(image[source[image] < 0])
    for name, rows in pd.Series(lost).groupby(pd.Series(cells[lost], dtype=object).str.strip(), sort=False):
        kind, text = "labels without a source", f"which classes are absent is not known ({_times(len(rows))})"
        remedy = "fill the source, or leave the labels empty"
        if name:
            kind, text = "source nobody annotates", (f"no class of {ontology.path.name} lists {name!r}: its labels "
                                                     f"({_times(len(rows))}) count for nothing")
            remedy = (f"write a source of the ontology ({some(ontology.sources, 6) or 'it has none'}), add {name!r} to "
                      "the sources of its classes, or leave its labels empty")
        problems.append(Problem(kind, row=int(lines[rows.iat[0]]), column="source", text=text, remedy=remedy,
                                warning=not strict))
    listed = source[image] >= 0
    image, label = image[listed], label[listed]
    pair, first, times = np.unique(source[image] * len(ontology) + label, return_index=True, return_counts=True)
    for k in np.argsort(first):
        s, c = divmod(int(pair[k]), len(ontology))
        name, effect = ontology.sources[s], "through its ancestors only" if counts[s, c] else "for nothing"
        problems.append(Problem(
            "label its source does not annotate", row=int(lines[image[first[k]]]), column="labels",
            text=f"{name} does not annotate {ontology.ids[c]} ({_times(times[k])}): it counts {effect}",
            remedy=f"add {name} to the sources of {ontology.ids[c]} if it does, or take the label out",
            warning=not strict or bool(counts[s, c])))


def _tell_never_absent(labels: ImageLabels, problems: list[Problem]) -> None:
    """Classes that are only ever implied: a model learns nothing from a class that is never absent."""
    ontology, source = labels.ontology, np.repeat(labels.source, np.diff(labels.offsets))
    used = np.zeros_like(ontology.mask)
    used[source, labels.classes] = True
    used |= used.astype(np.float32) @ ontology.ancestors.astype(np.float32) > 0
    implied = ontology.ancestors[(used & ontology.mask).any(axis=0)].any(axis=0)
    never = np.flatnonzero(implied & ~ontology.mask[np.unique(source)].any(axis=0))
    if len(never):
        problems.append(Problem(
            "class that is never absent", column="labels", warning=True,
            text=f"{some((ontology.ids[k] for k in never), 8)}: present where a label implies it and else unknown, for "
                 "no source of these images stands in its row of the ontology",
            remedy="add to its sources those whose other images are surely without it"))


def _tell_denied(labels: ImageLabels, problems: list[Problem]) -> None:
    """Labels taken literally say that the classes above them are absent, where the source annotates those, too."""
    ontology, denied = labels.ontology, np.zeros(len(labels.ontology), dtype=np.int64)  # of a class, its images
    for start in range(0, len(labels), CHUNK):
        indices = np.arange(start, min(start + CHUNK, len(labels)))
        row, entry = labels._entries(indices)
        at, ancestor = np.nonzero(ontology.ancestors[labels.classes[entry]])
        above = np.zeros((len(indices), len(ontology)), dtype=bool)
        above[row[at], ancestor] = True
        denied += (above & labels.known(indices) & (labels.rows(indices) == 0)).sum(axis=0)
    names = [ontology.ids[k] for k in np.argsort(-denied, kind="stable") if denied[k]]
    if names:
        problems.append(Problem(
            "class denied by a label below it", column="labels", warning=True,
            text=f"{some(names, 8)}: absent in images with a label below ({_times(denied.max())} of "
                 f"{names[0]}), for their source annotates it and labels are taken literally",
            remedy="write every level among the labels, or take --label_ancestors"))


def _tell_shared(labels: ImageLabels, images: Sequence[str], lines: np.ndarray, strict: bool,
                 problems: list[Problem]) -> None:
    """Pictures in several labelled rows whose labels differ, within one source or between two."""
    place = np.flatnonzero(labels.labelled)
    place = place[pd.Series(np.asarray(images, dtype=object)[place]).duplicated(keep=False).to_numpy()]
    met: dict[str, dict[int, tuple[tuple[int, ...], int]]] = {}  # of a picture and a source, the first labels and row
    differ: dict[str, tuple[int, int]] = {}
    for i in place:
        name, source = images[i], int(labels.source[i])
        classes = tuple(labels.classes[labels.offsets[i]:labels.offsets[i + 1]].tolist())
        of_image = met.setdefault(name, {})
        before, row = of_image.setdefault(source, (classes, i))
        if before != classes:
            problems.append(Problem(
                "one image with other labels", file=str(name), row=int(lines[i]), column="labels", warning=not strict,
                text=f"{labels.ontology.sources[source]} gives it other labels in row {lines[row]}",
                remedy="write all of its labels in one row, between semicolons"))
        for other, (before, row) in of_image.items():
            if other != source and before != classes:
                differ.setdefault(name, (i, row))
    if differ:
        name, (i, row) = next(iter(differ.items()))
        problems.append(Problem(
            "image of two sources", file=str(name), row=int(lines[i]), column="labels", warning=True,
            text=f"row {lines[row]} has it under another source with other labels ({len(differ)} such images in all): "
                 "each row keeps its own source's classes",
            remedy="none is needed where both sources are right about their own classes"))


def _times(rows: int) -> str:
    return f"{rows:,} row{'s' if rows != 1 else ''}"
