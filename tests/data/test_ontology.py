"""Ontologies and partial labels: the three states against sets, every fault of a file, and the ready ontology."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from furnace.data import image_labels
from furnace.data.image_labels import ImageLabels, encode_labels
from furnace.data.ontology import Ontology, fold, read_ontology
from furnace.data.problems import ManifestError, Problem
from furnace.runtime.files import UserError
from helpers import ROOT

READY = ROOT / "pretraining" / "configs" / "dermatology.csv"
METADATA = ROOT.parent / "shared" / "data" / "metadata"
HEADER = "id,name,synonyms,parent,sources"
TREE = ("tumour,tumour,neoplasm,,coarse",            # 0
        "mel,Melanoma,malignant melanoma;MM,tumour,ham;fitz",  # 1
        "lm,lentigo maligna,,mel,fitz",              # 2
        "ssm,superficial spreading,,mel,fitz",       # 3
        "nv,nevus,naevus,tumour;pigmented,ham",      # 4
        "pigmented,pigmented lesion,,,",             # 5
        "acne,acne,,,fitz")                          # 6


def written(path: Path, *lines: str, header: str = HEADER) -> Path:
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Ontology:
    return read_ontology(written(tmp_path_factory.mktemp("tree") / "tree.csv", *TREE))


@pytest.fixture(scope="module")
def ready() -> Ontology:
    return read_ontology(READY)


def faults(tmp_path: Path, *lines: str, header: str = HEADER) -> list[tuple]:
    """(kind, row, column) of the errors of an ontology; each has a text and a remedy."""
    with pytest.raises(ManifestError) as caught:
        read_ontology(written(tmp_path / "o.csv", *lines, header=header))
    assert all(problem.text and problem.remedy for problem in caught.value.problems)
    return [(p.kind, p.row, p.column) for p in caught.value.problems]


def encode(ontology: Ontology, *images: tuple, label_ancestors: bool = True,
           **more) -> tuple[ImageLabels, list[Problem]]:
    """Pairs of labels and source, encoded."""
    problems: list[Problem] = []
    labels, sources = zip(*images, strict=True) if images else ((), ())
    return encode_labels(ontology, labels, sources, label_ancestors=label_ancestors, problems=problems,
                         **more), problems


def told(problems: list[Problem]) -> list[tuple]:
    return [(p.kind, p.row, p.column, p.warning) for p in problems]


# ------------------------------------------------------------------------------------------------------------ terms

@pytest.mark.parametrize(("one", "other"), [
    ("Darier's disease", "dariers disease"), ("Behçet’s Disease", "behcets disease"), ("  mel ", "MEL"),
    ("port-wine_stain", "PORT WINE STAIN"), ("a / b", "ab"), ("non-neoplastic", "non neoplastic"),
    ("ﬁbroma", "Fibroma"), ("grade-1", "grade 1"), ("皮膚", " 皮膚")])
def test_spellings_of_one_term(one: str, other: str) -> None:
    assert fold(one) == fold(other)


@pytest.mark.parametrize(("one", "other"), [
    ("3.0", "30"), ("-1", "1"), ("stage 1.5", "stage 15"), ("1 2", "12"), ("type 1-2", "type 12"), ("?", ""),
    ("皮膚", "皮"), ("type 1 - 2", "type 12")])
def test_terms_that_differ(one: str, other: str) -> None:
    assert fold(one) != fold(other)


def test_find(tree: Ontology) -> None:
    for k, terms in enumerate([("tumour", "Neoplasm"), ("mel", "MELANOMA", "Malignant-melanoma", "m.m."), ("LM",)]):
        assert [tree.find(term) for term in terms] == [k] * len(terms)
    assert tree.find("melanom") is None and tree.find("") is None
    assert tree.source_index("HAM") == tree.sources.index("ham") and tree.source_index("") == -1


# ---------------------------------------------------------------------------------------------------------- reading

def test_contract(tree: Ontology, caplog) -> None:
    assert len(tree) == 7 and not caplog.records
    assert tree.ids == ("tumour", "mel", "lm", "ssm", "nv", "pigmented", "acne")
    assert tree.names[1] == "Melanoma" and tree.synonyms[1] == ("malignant melanoma", "MM")
    assert tree.parents == ((), (0,), (1,), (1,), (0, 5), (), ())
    assert tree.ancestors.dtype == bool
    assert [np.flatnonzero(row).tolist() for row in tree.ancestors] == [[], [0], [0, 1], [0, 1], [0, 5], [], []]
    assert tree.sources == ("coarse", "ham", "fitz") and tree.mask.dtype == bool
    assert [np.flatnonzero(row).tolist() for row in tree.mask] == [[0], [1, 4], [1, 2, 3, 6]]
    assert tree.sha256 == hashlib.sha256(tree.path.read_bytes()).hexdigest()


def test_immutable_and_fit_for_workers(tree: Ontology) -> None:
    for array in (tree.ancestors, tree.mask):
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = True
    with pytest.raises(AttributeError):
        tree.ids = ()
    copy = pickle.loads(pickle.dumps(tree))  # noqa: S301
    assert copy.find("mm") == 1 and np.array_equal(copy.ancestors, tree.ancestors)


def test_rows_in_any_order_and_numbers_as_ids(tmp_path: Path) -> None:
    ontology = read_ontology(written(tmp_path / "o.csv", "30,leaf,,2,a", "2,middle,,1,", "1,root,,,A ;b"))
    assert np.flatnonzero(ontology.ancestors[0]).tolist() == [1, 2]
    assert ontology.find("30") == 0 and ontology.find("3.0") is None
    assert ontology.sources == ("a", "b") and ontology.mask.tolist() == [[True, False, True], [False, False, True]]


def test_every_fault_in_one_pass(tmp_path: Path) -> None:
    lines = ["a,Acne,,,s", ",nameless id,,,", "c,,,,", "a,other,,,", "e,ACNE!,,,", "f,eff,e;g;acne,,", "g,gee,,x;a,",
             "h,aitch,,h,", "i,eye,,j,", "j,jay,,k,", "k,kay,,i,", "l,ell,,k,", "m;n,em;en,,,"]
    assert faults(tmp_path, *lines) == [
        ("empty id", 3, "id"), ("empty name", 4, "name"), ("repeated id", 5, "id"), ("ambiguous term", 6, "name"),
        ("ambiguous term", 7, "synonyms"), ("ambiguous term", 7, "synonyms"), ("ambiguous term", 8, "id"),
        ("semicolon", 14, "id"), ("semicolon", 14, "name"), ("unknown parent", 8, "parent"),
        ("cycle", 9, "parent"), ("cycle", 10, "parent")]  # l, below a cycle, is on none
    with pytest.raises(ManifestError) as caught:
        read_ontology(tmp_path / "o.csv")
    texts = {(p.kind, p.row): str(p) for p in caught.value.problems}
    assert "means row 2 (a), too" in texts["ambiguous term", 6]
    assert "no class has the id 'x'" in texts["unknown parent", 8]
    assert "i and j and k" in texts["cycle", 10]


def test_a_class_may_repeat_itself(tmp_path: Path) -> None:
    ontology = read_ontology(written(tmp_path / "o.csv", "acne,Acne,acne;ACNE;acné,,s;S", "b,b,,acne;acne,"))
    assert len(ontology) == 2 and ontology.sources == ("s",) and ontology.parents[1] == (0,)


def test_columns(tmp_path: Path, caplog) -> None:
    assert faults(tmp_path, "a,b,c", header="id,Name,sources") == [
        ("missing column", None, "name"), ("missing column", None, "synonyms"), ("missing column", None, "parent")]
    with pytest.raises(ManifestError, match="rename Name to name"):
        read_ontology(tmp_path / "o.csv")
    caplog.clear()
    read_ontology(written(tmp_path / "o.csv", "a,A,,,s,note", header=HEADER + ",remark"))
    assert "unknown column" in caplog.text and "remark" in caplog.text


def test_no_table(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=f"is empty: its first line must be {HEADER}"):
        read_ontology(written(tmp_path / "o.csv", header=""))
    assert faults(tmp_path) == [("no rows", None, "")]
    assert faults(tmp_path, "a,b,,,s,t") == [("ragged row", 2, "")]
    with pytest.raises(UserError, match="does not exist.*has: o.csv"):
        read_ontology(tmp_path / "missing.csv")


def test_the_suggested_parent(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="write 'melanoma'"):
        read_ontology(written(tmp_path / "o.csv", "melanoma,m,,,", "lm,l,,Melanoma,"))


# --------------------------------------------------------------------------------------------------- the three states

def test_states_with_ancestors(tree: Ontology) -> None:
    labels, problems = encode(tree, ("lm", "fitz"), ("mel", "fitz"), ("mel", "ham"), ("nv", "ham"), ("acne", "fitz"),
                              ("", "fitz"), (None, None), ("mel;lm", "fitz"), ("tumour", "coarse"))
    every = np.arange(9)
    assert labels.rows(every).dtype == np.float32 and labels.known(every).dtype == bool
    state = np.where(labels.known(every), labels.rows(every), -1).astype(int)
    assert state.tolist() == [  # tumour mel lm ssm nv pigmented acne
        [1, 1, 1, 0, -1, -1, 0],      # tumour is implied; nv and pigmented: not annotated by fitz
        [1, 1, -1, -1, -1, -1, 0],    # "melanoma" does not deny lentigo maligna
        [1, 1, -1, -1, 0, -1, -1],    # of ham: nv is absent, and pigmented, which it would imply, stays unknown
        [1, 0, -1, -1, 1, 1, -1],     # two parents, both implied
        [-1, 0, 0, 0, -1, -1, 1],     # tumour: fitz does not stand in its row, so it is not known to be absent
        [-1] * 7, [-1] * 7,
        [1, 1, 1, 0, -1, -1, 0],      # the more specific label decides
        [1, -1, -1, -1, -1, -1, -1]]
    assert labels.labelled.tolist() == [True] * 5 + [False, False, True, True]
    assert labels.source.tolist() == [2, 2, 1, 1, 2, 2, -1, 2, 0] and labels.source.dtype == np.int64
    assert told(problems) == [("class that is never absent", None, "labels", True)]
    assert "pigmented:" in problems[0].text  # tumour is listed by coarse


def test_states_as_published(tree: Ontology) -> None:
    labels, problems = encode(tree, ("lm", "fitz"), ("mel", "fitz"), ("mel;lm", "fitz"), ("nv", "HAM"), ("", "ham"),
                              label_ancestors=False)
    assert told(problems) == [("class denied by a label below it", None, "labels", True)]
    assert "mel: absent in images with a label below (1 row of mel)" in problems[0].text  # lm without mel
    assert labels.rows(range(5)).tolist() == [[0, 0, 1, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0],
                                              [0, 0, 0, 0, 1, 0, 0], [0] * 7]
    expected = tree.mask[[2, 2, 2, 1, 1]]
    expected[4] = False
    assert np.array_equal(labels.known(range(5)), expected)


def test_rows_follow_the_indices(tree: Ontology) -> None:
    labels, _ = encode(tree, ("lm", "fitz"), ("", ""), ("acne; mel ;;MM", "fitz"), ("nv", "ham"))
    whole, known = labels.rows(range(4)), labels.known(range(4))
    assert labels.offsets.tolist() == [0, 1, 1, 3, 4] and labels.classes.tolist() == [2, 1, 6, 4]
    for indices in ([3, 0, 2, 2, 1], [1], [1, 1], [], np.array([2])):
        assert np.array_equal(labels.rows(indices), whole[np.asarray(indices, dtype=int)])
        assert np.array_equal(labels.known(indices), known[np.asarray(indices, dtype=int)])
    assert labels.rows([]).shape == labels.known([]).shape == (0, 7)
    labels.rows([0])[:] = 5  # a copy
    assert labels.rows([0]).max() == 1
    with pytest.raises(ValueError, match="read-only"):
        labels.classes[0] = 1


@pytest.mark.parametrize("chunk", [4096, 1, 2])
def test_log_odds_count_the_known_alone(tree: Ontology, monkeypatch, chunk: int) -> None:
    """Of the states that ``test_states_with_ancestors`` spells out: present + 1 against absent + 1, class by class."""
    monkeypatch.setattr(image_labels, "CHUNK", chunk)
    labels, _ = encode(tree, ("lm", "fitz"), ("mel", "fitz"), ("mel", "ham"), ("nv", "ham"), ("acne", "fitz"),
                       ("", "fitz"), (None, None), ("mel;lm", "fitz"), ("tumour", "coarse"))
    present, absent = np.array([6, 4, 2, 0, 1, 1, 1]), np.array([0, 2, 1, 3, 1, 0, 3])
    assert labels.log_odds().dtype == np.float32
    np.testing.assert_allclose(labels.log_odds(), np.log((present + 1) / (absent + 1)), rtol=1e-6)
    nothing, _ = encode(tree, ("", "fitz"), (None, None))
    assert not nothing.log_odds().any()


def test_purely_unlabelled(tree: Ontology) -> None:
    labels, problems = encode(tree, ("", ""), (None, "web"), (float("nan"), None), (" ; ", "fitz"))
    assert not problems and not labels.labelled.any() and labels.source.tolist() == [-1, -1, -1, 2]
    assert not labels.rows(range(4)).any() and not labels.known(range(4)).any()
    nothing, _ = encode(tree)
    assert len(nothing) == 0 and nothing.rows([]).shape == (0, 7)


def slow_states(ontology: Ontology, labels: set[int], source: int, label_ancestors: bool) -> list[int]:
    """1 present, 0 absent, -1 unknown, from the module's sentences and the parents alone."""
    def above(k: int) -> set[int]:
        return set().union(*({p} | above(p) for p in ontology.parents[k]))

    classes = range(len(ontology))
    annotated = {k for k in classes if source >= 0 and ontology.mask[source, k]}
    if not label_ancestors:
        return [(int(k in labels) if k in annotated and annotated & labels else -1) for k in classes]
    present = labels.union(*(above(k) for k in labels))
    if not present & annotated:
        return [-1] * len(ontology)
    implied = set().union(*(above(k) for k in present & annotated))
    specific = {k for k in labels if not any(k in above(other) for other in labels)}
    state = []
    for k in classes:
        if k in present:
            state.append(1 if k in annotated | implied else -1)
        else:
            state.append(0 if k in annotated and not above(k) & specific else -1)
    return state


@st.composite
def worlds(draw) -> tuple[list[str], list[tuple[str, str]]]:
    n = draw(st.integers(2, 8))
    parents = [draw(st.sets(st.integers(0, k - 1), max_size=2)) if k else set() for k in range(n)]
    listed = [draw(st.sets(st.sampled_from("stu"))) for _ in range(n)]
    lines = [f"c{k},name {k} x,,{';'.join(f'c{p}' for p in parents[k])},{';'.join(sorted(listed[k]))}"
             for k in range(n)]
    image = st.tuples(st.lists(st.integers(0, n - 1), max_size=4), st.sampled_from("stuv"))
    images = draw(st.lists(image, max_size=12))
    return lines, [(";".join(f"c{k}" for k in classes), source) for classes, source in images]


@settings(max_examples=150, deadline=None)
@given(world=worlds(), label_ancestors=st.booleans())
def test_equal_to_the_slow_version(tmp_path_factory, world, label_ancestors: bool) -> None:
    lines, images = world
    ontology = read_ontology(written(tmp_path_factory.getbasetemp() / "random.csv", *lines))
    labels, problems = encode(ontology, *images, label_ancestors=label_ancestors, strict=False)
    every = range(len(images))
    found = np.where(labels.known(every), labels.rows(every), -1).astype(int).tolist()
    wanted = [slow_states(ontology, {int(c[1:]) for c in cell.split(";") if c}, ontology.source_index(source),
                          label_ancestors) for cell, source in images]
    assert found == wanted
    assert labels.labelled.tolist() == [max(state, default=-1) == 1 for state in wanted]
    assert all(problem.warning for problem in problems)


# --------------------------------------------------------------------------------------------------------- problems

def test_labels_outside_the_ontology(tree: Ontology) -> None:
    images = [("acne", "fitz"), ("Melanomma;acne", "fitz"), ("wart", "ham"), ("melanomma", "ham"),
              ("Melanomma", "fitz"), ("30", "ham")]
    labels, problems = encode(tree, *images)
    assert told(problems) == [("label outside the ontology", row, "labels", False) for row in (3, 4, 5, 7)]
    assert "'Melanomma' (2 rows)" in problems[0].text and "write 'Melanoma' if that is meant" in problems[0].remedy
    assert "'wart' (1 row)" in problems[1].text and problems[1].remedy.startswith("add it")
    assert labels.labelled.tolist() == [True] + [False] * 5  # not even acne: the other term may mean any class
    assert not labels.known([1]).any()
    _, lenient = encode(tree, *images, strict=False, lines=[10, 20, 30, 40, 50, 60])
    assert told(lenient) == [("label outside the ontology", row, "labels", True) for row in (20, 30, 40, 60)]


def test_many_unknown_terms_are_all_told(tree: Ontology) -> None:
    _, problems = encode(tree, *((f"melanom {i}x", "fitz") for i in range(40)))
    assert [p.row for p in problems] == list(range(2, 42))
    assert sum("if that is meant" in p.remedy for p in problems) == 20


def test_a_source_nobody_annotates(tree: Ontology) -> None:
    images = [("mel", "clinic"), ("", "clinic"), ("nv;mel", " clinic "), ("mel", ""), ("acne", None), ("mel", "ham")]
    labels, problems = encode(tree, *images)
    assert told(problems)[:-1] == [("source nobody annotates", 2, "source", False),
                                   ("labels without a source", 5, "source", False)]
    assert "'clinic'" in problems[0].text and "2 rows" in problems[0].text and "2 rows" in problems[1].text
    assert "coarse and ham and fitz" in problems[0].remedy
    assert labels.source.tolist() == [-1] * 5 + [1] and labels.labelled.tolist() == [False] * 5 + [True]
    assert not labels.known(range(5)).any() and not labels.rows(range(5)).any()
    _, lenient = encode(tree, *images, strict=False)
    assert [p.warning for p in lenient[:2]] == [True, True]


def test_a_label_that_its_source_does_not_annotate(tree: Ontology) -> None:
    images = [("acne", "ham"), ("nv", "ham"), ("acne;mel", "ham"), ("lm", "ham")]
    labels, problems = encode(tree, *images)
    kind = "label its source does not annotate"
    assert told(problems)[:2] == [(kind, 2, "labels", False), (kind, 5, "labels", True)]
    assert "ham does not annotate acne (2 rows): it counts for nothing" in problems[0].text
    assert "lm (1 row): it counts through its ancestors only" in problems[1].text
    assert labels.labelled.tolist() == [False, True, True, True]
    state = np.where(labels.known([2, 3]), labels.rows([2, 3]), -1).astype(int)
    assert state[0].tolist() == [1, 1, -1, -1, 0, -1, -1]
    assert state[1].tolist() == [1, 1, -1, -1, 0, -1, -1]  # lm implies melanoma, which ham annotates
    plain, problems = encode(tree, *images, label_ancestors=False)
    assert told(problems) == [(kind, 2, "labels", False), (kind, 5, "labels", False)]
    assert plain.labelled.tolist() == [False, True, True, False]


def test_an_image_of_two_sources(tree: Ontology) -> None:
    images = [("lm", "fitz"), ("mel", "ham"), ("nv", "ham"), ("acne", "fitz"), ("", "ham")]
    labels, problems = encode(tree, *images, images=["a.png", "a.png", "b.png", "c.png", "c.png"])
    problems = [p for p in problems if p.kind != "class that is never absent"]
    assert told(problems) == [("image of two sources", 3, "labels", True)] and problems[0].file == "a.png"
    assert "row 2" in problems[0].text and "1 such images" in problems[0].text
    assert labels.labelled[:2].all()
    state = np.where(labels.known([0, 1]), labels.rows([0, 1]), -1).astype(int).tolist()
    assert state == [[1, 1, 1, 0, -1, -1, 0], [1, 1, -1, -1, 0, -1, -1]]  # each row its own source's classes
    same = encode(tree, ("mel", "fitz"), ("MM", "ham"), images=["a.png", "a.png"])[1]
    assert [p.kind for p in same] == ["class that is never absent"]


def test_one_image_with_other_labels_under_one_source(tree: Ontology) -> None:
    images = [("mel", "ham"), ("acne", "fitz"), ("nv", "HAM"), ("mel", "ham")]
    names = ["a.png", "b.png", "a.png", "a.png"]
    for strict in (True, False):
        problems = [p for p in encode(tree, *images, images=names, strict=strict)[1] if "never" not in p.kind]
        assert told(problems) == [("one image with other labels", 4, "labels", not strict)]
        assert problems[0].file == "a.png" and "ham gives it other labels in row 2" in problems[0].text


def test_no_complaint_where_every_ancestor_is_listed(tree: Ontology) -> None:
    assert [p.kind for p in encode(tree, ("mel", "ham"))[1]] == ["class that is never absent"]
    assert not encode(tree, ("mel", "ham"), ("tumour", "coarse"))[1]
    assert not encode(tree, ("mel", "ham"), label_ancestors=False)[1]


def test_images_with_many_labels(tmp_path: Path) -> None:
    """A chain of 300: only the lowest label of an image is specific."""
    lines = [f"c{k},name {k} x,,{f'c{k - 1}' if k else ''},s" for k in range(300)]
    chain = read_ontology(written(tmp_path / "o.csv", *lines))
    cells = [";".join(f"c{k}" for k in range(200)), "c5", "c7;c3"] * 200
    labels, problems = encode(chain, *((cell, "s") for cell in cells))
    assert not problems and labels.specific.sum() == 600
    assert labels.rows([0, 1, 2]).sum(axis=1).tolist() == [200, 6, 8]
    assert labels.known([0, 1, 2]).sum(axis=1).tolist() == [200, 6, 8]


# -------------------------------------------------------------------------------------------------- the ready ontology

HAM_LABELS = {"akiec": "akiec", "bcc": "basal_cell_carcinoma", "bkl": "benign_keratosis", "df": "dermatofibroma",
              "mel": "melanoma", "nv": "melanocytic_nevus", "vasc": "vascular_lesion"}
PAD_LABELS = {"ACK": "actinic_keratosis", "BCC": "basal_cell_carcinoma", "MEL": "melanoma", "NEV": "melanocytic_nevus",
              "SCC": "squamous_cell_carcinoma", "SEK": "seborrheic_keratosis"}
NINE = {"malignant epidermal": "malignant", "malignant dermal": "malignant", "malignant melanoma": "malignant",
        "malignant cutaneous lymphoma": "malignant", "benign dermal": "benign", "benign epidermal": "benign",
        "benign melanocyte": "benign", "genodermatoses": "non-neoplastic", "inflammatory": "non-neoplastic"}


def annotates(ontology: Ontology, source: str, term: str) -> bool:
    return bool(ontology.mask[ontology.source_index(source), ontology.find(term)])


def test_the_ready_ontology_covers_the_sources(ready: Ontology) -> None:
    assert len(ready) == 127 and ready.sources == ("ham10000", "isic2018", "pad_ufes_20", "fitzpatrick17k", "ddi",
                                                   "med_node")
    for source, table in (("HAM10000", HAM_LABELS), ("ISIC 2018", HAM_LABELS), ("PAD-UFES-20", PAD_LABELS),
                          ("MED-NODE", {"melanoma": "melanoma", "naevus": "melanocytic_nevus"}),
                          ("DDI", {"malignant": "malignant", "not malignant": "non_malignant"})):
        for label, identity in table.items():
            assert ready.ids[ready.find(label)] == identity and annotates(ready, source, label)
    for group, above in NINE.items():
        assert annotates(ready, "fitzpatrick17k", group) and annotates(ready, "fitzpatrick17k", above)
        assert ready.ancestors[ready.find(group), ready.find(above)]
    # 3 + 9 + 114 labels, of which melanoma is three and pyogenic granuloma two, and "not malignant"
    assert ready.mask.sum(axis=1).tolist() == [14, 14, 13, 126 - 3 + 1, 2, 6]


def test_the_ready_ontology_never_contradicts_a_source(ready: Ontology) -> None:
    """An ancestor of a label is in its source's row or listed by nobody for it; the exceptions are the unions."""
    for s, source in enumerate(ready.sources):
        implied = ready.ancestors[ready.mask[s]].any(axis=0) & ~ready.mask[s]
        unions = {"pad_ufes_20": {"akiec"}, "fitzpatrick17k": {"akiec", "benign_keratosis", "vascular_lesion"}}
        assert {ready.ids[k] for k in np.flatnonzero(implied)} == unions.get(source, set())
    malignant, benign = ready.find("malignant"), ready.find("not malignant")
    both = (ready.ancestors[:, malignant] & ready.ancestors[:, benign])
    assert not both.any() and ready.ancestors[:, [malignant, benign]].any(axis=1).sum() == len(ready) - 2


def test_a_squamous_cell_carcinoma_of_pad(ready: Ontology) -> None:
    """It may be Bowen's disease, so that akiec is unknown; of HAM10000's melanomas akiec is absent."""
    labels, _ = encode(ready, ("SCC", "PAD-UFES-20"), ("ACK", "PAD-UFES-20"), ("mel", "HAM10000"), ("nv", "HAM10000"))
    state = np.where(labels.known(range(4)), labels.rows(range(4)), -1).astype(int)
    assert state[:, ready.find("akiec")].tolist() == [-1, 1, 0, 0]
    assert state[:, ready.find("malignant")].tolist() == [1, 1, 1, 0]
    assert state[:, ready.find("not malignant")].tolist() == [0, 0, 0, 1]
    assert state[:, ready.find("psoriasis")].tolist() == [-1] * 4
    assert state[:, ready.find("lentigo maligna")].tolist() == [-1] * 4


@pytest.mark.skipif(not METADATA.is_dir(), reason="needs ../shared/data/metadata")
def test_every_label_of_the_metadata(ready: Ontology) -> None:
    fitzpatrick = pd.read_csv(METADATA / "fitzpatrick17k.csv").drop_duplicates("label")
    assert len(fitzpatrick) == 114
    columns = fitzpatrick[["label", "nine_partition_label", "three_partition_label"]]
    for label, nine, three in columns.itertuples(index=False):
        place, *above = (ready.find(term) for term in (label, nine, three))
        assert ready.mask[ready.source_index("fitzpatrick17k"), [place, *above]].all(), label
        assert all(a == place or ready.ancestors[place, a] for a in above), label
        groups = {k for k in np.flatnonzero(ready.ancestors[place]) if k in map(ready.find, NINE)} | (
            {place} & set(map(ready.find, NINE)))
        assert groups == {above[0]}, label  # of one group only
    assert set(pd.read_csv(METADATA / "HAM10000_metadata.csv")["dx"]) == set(HAM_LABELS)
    assert set(pd.read_csv(METADATA / "pad_ufes_20_metadata.csv")["diagnostic"]) == set(PAD_LABELS)
    header = pd.read_csv(METADATA / "ISIC2018_Task3_Test_GroundTruth.csv", nrows=1).columns[1:]
    assert [ready.ids[ready.find(name)] for name in header] == [HAM_LABELS[name.lower()] for name in header]


@pytest.mark.skipif(not METADATA.is_dir(), reason="needs ../shared/data/metadata")
def test_the_metadata_encode_without_an_error(ready: Ontology) -> None:
    fitzpatrick = pd.read_csv(METADATA / "fitzpatrick17k.csv")
    pad = pd.read_csv(METADATA / "pad_ufes_20_metadata.csv")
    problems: list[Problem] = []
    labels = encode_labels(ready, [*fitzpatrick["label"], *pad["diagnostic"]],
                           ["Fitzpatrick17k"] * len(fitzpatrick) + ["PAD-UFES-20"] * len(pad), label_ancestors=True,
                           problems=problems, images=[*fitzpatrick["md5hash"], *pad["img_id"]])
    assert labels.labelled.all() and [p.kind for p in problems] == ["class that is never absent"]
    counts = labels.rows(range(len(labels))).sum(axis=0)
    three = fitzpatrick["three_partition_label"].value_counts()
    assert counts[ready.find("non-neoplastic")] == three["non-neoplastic"]
    cancers = pad["diagnostic"].isin(["BCC", "SCC", "MEL", "ACK"]).sum()
    assert counts[ready.find("malignant")] == three["malignant"] + cancers
