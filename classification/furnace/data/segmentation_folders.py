"""Public segmentation sets as their archives unpack: which folder holds what, and how a mask is named."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from furnace.data.class_names import some
from furnace.data.problems import ROW, Problem
from furnace.runtime.files import UserError

logger = logging.getLogger(__name__)

DEPTHS = ("", "*/", "*/*/")  # archives are often unpacked into a folder of their own, or two


@dataclass(frozen=True)
class Part:
    """A folder of images and the folder of their masks.

    Attributes:
        split: train, val or test; "" where the archive has no official split.
        folder: its name.
        images: a glob below ``folder``.
        mask_folder: the folder of the masks; may be ``folder`` itself.
        mask: the mask's path below ``mask_folder``, with the image's {stem}, its {name} (the stem without _orig) and
            its {folder} below ``folder``.
    """

    split: str
    folder: str
    images: str
    mask_folder: str
    mask: str

    @property
    def mask_pattern(self) -> str:
        """A glob of all masks below ``mask_folder``."""
        return self.mask.format(stem="*", name="*", folder="*")


def _challenge(images: str, masks: str, mask: str, splits: Sequence[tuple[str, str]]) -> tuple[Part, ...]:
    """The parts of an ISIC challenge; {} stands for the archive's word for the split."""
    return tuple(Part(split, images.format(word), "*.jpg", masks.format(word), mask) for split, word in splits)


_SPLITS = (("train", "Training"), ("val", "Validation"), ("test", "Test"))

# a name's layouts; the first that is found is read
LAYOUTS: dict[str, tuple[tuple[Part, ...], ...]] = {
    "ISIC2016": (_challenge("ISBI2016_ISIC_Part1_{}_Data", "ISBI2016_ISIC_Part1_{}_GroundTruth",
                            "{stem}_Segmentation.png", (_SPLITS[0], _SPLITS[2])),),
    "ISIC2017": (_challenge("ISIC-2017_{}_Data", "ISIC-2017_{}_Part1_GroundTruth", "{stem}_segmentation.png",
                            (*_SPLITS[:2], ("test", "Test_v2"))),),
    "ISIC2018": (_challenge("ISIC2018_Task1-2_{}_Input", "ISIC2018_Task1_{}_GroundTruth", "{stem}_segmentation.png",
                            _SPLITS),
                 # renamed as PanDerm's segmentation code wants them
                 _challenge("{}_Data", "{}_GroundTruth", "{stem}_segmentation.png", _SPLITS)),
    "PH2": ((Part("", "PH2 Dataset images", "*/*_Dermoscopic_Image/*.bmp", "PH2 Dataset images",
                  "{stem}/{stem}_lesion/{stem}_lesion.bmp"),),),
    "HAM10000": (tuple(Part("", f"HAM10000_images_part_{part}", "*.jpg", "HAM10000_segmentations_lesion_tschandl",
                            "{stem}_segmentation.png") for part in (1, 2)),),
    "Waterloo": ((Part("", "skin_data", "*/*/*_orig.jpg", "skin_data", "{folder}/{name}_contour.png"),),),
}
HAM_METADATA = ("HAM10000_metadata.csv", "HAM10000_metadata")  # names the lesion of each image


def known_name(dataset: str) -> str:
    """The data set that a ``--dataset`` names, whatever its capitals and hyphens; a longer name may contain it.

    Raises:
        UserError: it names none, or more than one.
    """
    plain = "".join(c for c in dataset.casefold() if c.isalnum())
    found = [name for name in LAYOUTS if name.casefold() in plain]
    if len(found) != 1:
        raise UserError(f"--dataset {dataset} is none of {', '.join(LAYOUTS)}: pass one of these, or a CSV with the "
                        "columns image, mask, split for your own data")
    return found[0]


def read_folders(dataset: str, parent: str | Path, *, needed: Sequence[str],
                 problems: list[Problem]) -> tuple[pd.DataFrame, Path]:
    """The images and masks of a public data set.

    Args:
        dataset: a key of LAYOUTS, as ``known_name`` gives it.
        parent: the folder that has a folder of that name, or the archive's own folders.
        needed: the splits without which the run makes no sense.
        problems: extended by missing folders and masks, and by masks without an image (a warning).

    Returns:
        A frame with image, mask (None where there is none), split ("" without an official one), ROW (from 1) and, for
        HAM10000 with its metadata file, lesion_id, sorted by image within a part; and the folder that the names are
        relative to.

    Raises:
        UserError: there is no such folder, or it has another layout; says which.
    """
    parent = Path(parent).expanduser()
    if not parent.is_dir():
        raise UserError(f"--parent_path {parent} is not a folder: it must hold the folder {dataset}, or the folders of "
                        "its archives")
    base = next((folder for folder in sorted(parent.iterdir()) if folder.is_dir()
                 and folder.name.casefold() == dataset.casefold()), parent)
    layout = next((layout for layout in LAYOUTS[dataset] if _present(base, layout)), None)
    if layout is None:
        raise UserError(_not_found(dataset, base))
    rows: list[dict] = []
    for part in layout:
        rows += _read_part(base, part, needed, problems)
    frame = pd.DataFrame(rows, columns=["image", "mask", "split"]).astype(object).where(lambda f: f.notna(), None)
    frame[ROW] = range(1, len(frame) + 1)
    if dataset == "HAM10000":
        _add_lesions(frame, base)
    return frame, base


def _folders(base: Path, name: str, pattern: str) -> list[Path]:
    """The folders of that name, of the least depth at which one has a match of the pattern."""
    for depth in DEPTHS:
        found = sorted(folder for folder in base.glob(depth + name)
                       if folder.is_dir() and "__MACOSX" not in folder.parts and _visible(folder, pattern))
        if found:
            return found
    return []


def _visible(folder: Path, pattern: str) -> list[Path]:
    """The matches, sorted, without the hidden files that some systems leave beside images."""
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def _present(base: Path, layout: tuple[Part, ...]) -> bool:
    return any(_folders(base, part.folder, part.images) for part in layout)


def _read_part(base: Path, part: Part, needed: Sequence[str], problems: list[Problem]) -> list[dict]:
    folders = _folders(base, part.folder, part.images)
    if not folders:
        problems.append(_missing_folder(base, part.folder, f"with images {part.images}", part.split not in needed))
        return []
    own = part.mask_folder == part.folder
    mask_folders = folders if own else _folders(base, part.mask_folder, part.mask_pattern)
    if not mask_folders:
        problems.append(_missing_folder(base, part.mask_folder, f"with the masks of {part.folder}", False))
        return []
    rows, used = [], set()
    for folder in folders:
        masks = folder if own else mask_folders[0]
        for image in _visible(folder, part.images):
            mask = masks / part.mask.format(stem=image.stem, name=image.stem.removesuffix("_orig"),
                                            folder=image.parent.relative_to(folder).as_posix())
            used.add(mask.name)
            rows.append({"image": image.relative_to(base).as_posix(), "mask": mask.relative_to(base).as_posix(),
                         "split": part.split})
    if not own and part.split:  # of HAM10000's two parts either has masks of the other
        _warn_of_spare_masks(mask_folders[0], part, used, problems)
    return rows


def _missing_folder(base: Path, name: str, what: str, warning: bool) -> Problem:
    return Problem("missing folder", text=f"there is no folder {name} {what} in {base}", warning=warning,
                   remedy="download and unpack that archive, too" + (", unless you mean to do without" if warning
                                                                     else ""))


def _warn_of_spare_masks(folder: Path, part: Part, used: set[str], problems: list[Problem]) -> None:
    spare = [path.name for path in _visible(folder, part.mask_pattern) if path.name not in used]
    if spare:
        problems.append(Problem("mask without image", file=spare[0], warning=True,
                                text=f"{len(spare)} masks of {part.mask_folder} have no image in {part.folder}",
                                remedy="see whether the archive of the images is complete"))


def _not_found(dataset: str, base: Path) -> str:
    """What was expected, and what the folder looks like instead."""
    wanted = " or ".join(some(dict.fromkeys(part.folder for part in layout)) for layout in LAYOUTS[dataset])
    like = [name for name, layouts in LAYOUTS.items() if any(_present(base, layout) for layout in layouts)]
    text = f"{base} does not look like {dataset}: there is no folder {wanted} with images in it"
    if like:
        return f"{text}. It looks like {' and '.join(like)}: pass --dataset {like[0]}, or another --parent_path"
    there = some(sorted(entry.name for entry in base.iterdir() if not entry.name.startswith("."))) or "nothing"
    return f"{text}. It has: {there}. Pass the --parent_path of the unpacked archives, or a CSV image,mask,split"


def _add_lesions(frame: pd.DataFrame, base: Path) -> None:
    """HAM10000 has up to six images of a lesion: they must stay together."""
    found = [path for depth in DEPTHS for name in HAM_METADATA for path in base.glob(depth + name) if path.is_file()]
    table = pd.read_csv(found[0], dtype=str) if found else pd.DataFrame()
    if not {"image_id", "lesion_id"} <= set(table.columns):
        logger.warning("%s has no %s with the columns image_id and lesion_id: images of one lesion can come into "
                       "different splits, and the results are then too good", base, HAM_METADATA[0])
        return
    lesions = table.drop_duplicates("image_id").set_index("image_id")["lesion_id"]
    ids = frame["image"].map(lambda name: lesions.get(Path(name).stem))
    frame["lesion_id"] = ids.astype(object).where(ids.notna(), None)
