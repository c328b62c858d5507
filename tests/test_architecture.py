"""DESIGN's floors: a module imports its own package and lower floors only."""

import ast
from pathlib import Path

import pytest

from helpers import ROOT

FURNACE = ROOT / "classification" / "furnace"
FLOOR = {"runtime": 0, "data": 1, "models": 1, "evaluation": 2, "engine_for": 3, "training": 4, "finetuning": 5,
         "finetuning_results": 5, "segmentation": 5, "segmentation_results": 5, "pretraining_options": 5,
         "pretraining": 6, "pretraining_results": 7, "federated": 6, "command_line": 7, "published": 7, "arguments": 8,
         "training_arguments": 9, "finetuning_arguments": 10, "segmentation_arguments": 10, "pretraining_arguments": 10}
SCRIPTS = {path.stem for path in (ROOT / "classification").glob("*.py")}
MODULES = sorted(FURNACE.rglob("*.py"))


def room(parts: list[str]) -> str:
    """runtime, data, models, evaluation, engine_for, federated or arguments; "" for furnace itself."""
    name = parts[0] if parts else ""
    return "engine_for" if name.startswith("engine_for") else name


def imports(path: Path) -> list[list[str]]:
    """The parts behind ``furnace.`` of everything a module imports."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
            assert node.level == 0, f"{path}: relative import"
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found += [name.split(".")[1:] for name in names if name.split(".")[0] == "furnace"]
        assert not any(name.split(".")[0] in SCRIPTS for name in names), f"{path} imports an entry script"
    return found


@pytest.mark.parametrize("path", MODULES, ids=[str(p.relative_to(FURNACE)) for p in MODULES])
def test_imports_go_down(path: Path) -> None:
    """Own package, or a lower floor; data and models do not know each other."""
    here = room(list(path.relative_to(FURNACE).with_suffix("").parts))
    if here == "__init__":
        assert not imports(path), "furnace/__init__.py imports lazily"
        return
    for target in map(room, imports(path)):
        assert target == here or FLOOR[target] < FLOOR[here], f"{path.name} ({here}) imports furnace.{target}"


def test_rooms_are_known() -> None:
    """A new room needs a floor."""
    assert {room(list(p.relative_to(FURNACE).with_suffix("").parts)) for p in MODULES} <= {*FLOOR, "__init__"}
