"""Classes of many data sets in one table, and which of them each data set annotates: partial labels.

Targets have three states. For an image of source s with the labels L of its CSV row, class c is

- present: s annotates c (it stands in c's row), and c is in L or, with ``label_ancestors``, above one of L;
- absent: s annotates c, and c is not present;
- unknown: everything else. The loss must leave it out (``image_labels.ImageLabels.known`` is False).

So a class that the source does not annotate is unknown, not absent. With ``label_ancestors`` two rules more:

- A class that s does not annotate is present where a present class lies below it, and else unknown: a set that has only
  actinic keratosis cannot say of a squamous cell carcinoma whether it belongs to "actinic keratosis or Bowen's
  disease". So an ancestor is *known to be absent* only where s stands in its own row.
- Below the most specific labels of an image everything is unknown: "melanoma" does not deny "lentigo maligna".

Without ``label_ancestors`` known is the table of sources and classes alone, as DermINO published it (arXiv 2508.12190).
"""

import difflib
import graphlib
import hashlib
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from furnace.data.class_names import some
from furnace.data.csv_table import missing_column, parse_csv, read_csv_bytes
from furnace.data.multilabel import SEPARATOR, names_in
from furnace.data.problems import ROW, ManifestError, Problem, report

REMEDIES = {"id": "add a column with a unique number or short word per class",
            "name": "add a column with each class's name",
            "synonyms": "add a column, empty or with other names between semicolons",
            "parent": "add a column, empty or with the ids of the parents between semicolons",
            "sources": "add a column with the data sets that annotate each class, between semicolons"}
COLUMNS = tuple(REMEDIES)
_MARKS = re.compile(r"(?<![\d\W_])[\W_]+|[\W_]+(?![\d\W_])")  # not between two digits: 1.5 is not 15


@dataclass(frozen=True, eq=False)
class Ontology:
    """K classes, S sources; immutable. Class numbers follow the file's rows, so that new rows at its end change none.

    Attributes:
        path: the file.
        sha256: of its bytes, for fingerprints.
        ids: K.
        names: K, for people and text encoders.
        synonyms: K tuples.
        parents: K tuples of class numbers.
        ancestors: (K, K) bool, ``[c, a]`` where a lies above c, over any number of steps; never on the diagonal.
        sources: S names, as first written, in the order of the file.
        mask: (S, K) bool, the classes in whose row the source stands.
        terms: class number of every id, name and synonym, by ``fold``; ask ``find``.
    """

    path: Path
    sha256: str
    ids: tuple[str, ...]
    names: tuple[str, ...]
    synonyms: tuple[tuple[str, ...], ...]
    parents: tuple[tuple[int, ...], ...]
    ancestors: np.ndarray
    sources: tuple[str, ...]
    mask: np.ndarray
    terms: dict[str, int]

    def __len__(self) -> int:
        return len(self.ids)

    def find(self, term: str) -> int | None:
        """The class that an id, name or synonym means, in any capitals and punctuation; None for no class."""
        return self.terms.get(fold(term))

    def source_index(self, source: str) -> int:
        """The row of ``mask`` of a source, in any capitals and punctuation; -1 for one that annotates no class."""
        return {fold(name): s for s, name in enumerate(self.sources)}.get(fold(source), -1)


def fold(term: str) -> str:
    """What two spellings of one term share: no capitals, accents, blanks or punctuation ("Behçet's disease").

    Marks between digits stay (stage 1.5 is not stage 15), and a term without a letter stays as it is (-1 is not 1).
    """
    text = "".join(c for c in unicodedata.normalize("NFKD", term.strip().casefold()) if not "\u0300" <= c <= "\u036f")
    return _MARKS.sub("", text) if any(c.isalpha() for c in text) else text


# ---------------------------------------------------------------------------------------------------------- reading

def read_ontology(path: str | Path, *, report_folder: str | Path | None = None) -> Ontology:
    """Read a CSV ``id,name,synonyms,parent,sources``; every problem is found in one pass.

    Several synonyms, parents (ids) or sources are separated by semicolons. Roots have no parent.

    Args:
        path: the file.
        report_folder: where the full list goes when there are more than 20 problems.

    Raises:
        ManifestError: one or more errors, or no table at all; all are in the message or in the file it names.
        UserError: there is no such file.
    """
    path = Path(path).expanduser()
    content = read_csv_bytes(path, "the ontology")
    if not content.strip():
        raise ManifestError(f"the ontology {path} is empty: its first line must be {','.join(COLUMNS)}")
    problems: list[Problem] = []
    frame = parse_csv(content, path, problems)
    problems = [problem for problem in problems if problem.kind != "no rows"]
    if not len(frame):
        problems.append(Problem("no rows", text="the ontology has no class", remedy="add a row per class"))
    problems += [missing_column(frame, column, REMEDIES[column]) for column in COLUMNS if column not in frame]
    problems += [Problem("unknown column", column=name, row=1, warning=True, text="is not read",
                         remedy=f"the columns of an ontology are {', '.join(COLUMNS)}")
                 for name in frame.columns if name not in (*COLUMNS, ROW)]
    for column in COLUMNS:
        frame[column] = frame[column].fillna("") if column in frame else ""
    if not any(problem.kind == "missing column" for problem in problems):
        terms = _terms(frame, problems)
        parents = _parents(frame, problems)
    report(problems, csv_path=path, folder=report_folder)
    sources, mask = _sources(frame)
    return Ontology(path=path, sha256=hashlib.sha256(content).hexdigest(), ids=tuple(frame["id"]),
                    names=tuple(frame["name"]), synonyms=tuple(tuple(names_in(cell)) for cell in frame["synonyms"]),
                    parents=parents, ancestors=_ancestors(parents), sources=sources, mask=mask, terms=terms)


def _terms(frame: pd.DataFrame, problems: list[Problem]) -> dict[str, int]:
    """Every folded term's class; a term of two classes is a problem of the later one."""
    terms: dict[str, int] = {}
    ids = list(frame["id"])
    for k, (row, identity, name, synonyms) in enumerate(zip(frame[ROW], ids, frame["name"], frame["synonyms"],
                                                            strict=True)):
        for column, term in (("id", identity), ("name", name)):
            if not term:
                problems.append(Problem(f"empty {column}", row=row, column=column, text="the class has none",
                                        remedy="fill it, or take the row out"))
            elif SEPARATOR in term:
                problems.append(Problem("semicolon", row=row, column=column, remedy="write it in another way",
                                        text=f"{term!r} could not stand in a list of labels"))
        for column, term in (("id", identity), ("name", name), *(("synonyms", term) for term in names_in(synonyms))):
            owner = terms.setdefault(fold(term), k) if term else k
            if owner == k:
                continue
            place = f"row {frame[ROW].iat[owner]} ({ids[owner]})"
            if column == "id" and term == ids[owner]:
                problems.append(Problem("repeated id", row=row, column="id", text=f"{term!r} is the id of {place}, too",
                                        remedy="give every class an id of its own"))
            else:
                problems.append(Problem("ambiguous term", row=row, column=column, remedy="leave it to one of the two",
                                        text=f"{term!r} means {place}, too (capitals and punctuation do not count)"))
    return terms


def _parents(frame: pd.DataFrame, problems: list[Problem]) -> tuple[tuple[int, ...], ...]:
    place = {identity: k for k, identity in enumerate(frame["id"]) if identity}
    parents: list[tuple[int, ...]] = []
    for row, cell in zip(frame[ROW], frame["parent"], strict=True):
        wanted = list(dict.fromkeys(names_in(cell)))
        for parent in wanted:
            if parent not in place:
                close = difflib.get_close_matches(parent, place, 1)
                problems.append(Problem("unknown parent", row=row, column="parent", text=f"no class has the id "
                                        f"{parent!r}", remedy=f"write {close[0]!r}" if close else
                                        "write the id of another row, or leave it empty"))
        parents.append(tuple(place[parent] for parent in wanted if parent in place))
    edges = np.array([(k, p) for k, of_class in enumerate(parents) for p in of_class], dtype=np.int64).reshape(-1, 2)
    graph = coo_array((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(len(parents), len(parents)))
    component = connected_components(graph.tocsr(), connection="strong")[1] if len(parents) else []
    for circle in np.unique(component):
        members = np.flatnonzero(component == circle)
        if len(members) > 1 or members[0] in parents[members[0]]:
            problems.append(Problem("cycle", row=int(frame[ROW].iat[members[0]]), column="parent",
                                    text=f"going up from {some(frame['id'].iloc[members])} leads back to it",
                                    remedy="take one of their parents away"))
    return tuple(parents)


def _ancestors(parents: tuple[tuple[int, ...], ...]) -> np.ndarray:
    above = np.zeros((len(parents), len(parents)), dtype=bool)
    for k in graphlib.TopologicalSorter(dict(enumerate(parents))).static_order():  # parents first
        for parent in parents[k]:
            above[k] |= above[parent]
            above[k, parent] = True
    above.flags.writeable = False
    return above


def _sources(frame: pd.DataFrame) -> tuple[tuple[str, ...], np.ndarray]:
    names: dict[str, str] = {}
    cells = [[names.setdefault(fold(name), name) for name in names_in(cell)] for cell in frame["sources"]]
    place = {name: s for s, name in enumerate(names.values())}
    mask = np.zeros((len(place), len(frame)), dtype=bool)
    for k, cell in enumerate(cells):
        mask[[place[name] for name in cell], k] = True
    mask.flags.writeable = False
    return tuple(place), mask
