"""The public names of DESIGN section 4."""

import subprocess
import sys

import pytest

import furnace


@pytest.mark.parametrize("name", furnace.__all__)
def test_public_names_resolve(name: str) -> None:
    """Each is callable and documented."""
    function = getattr(furnace, name)
    assert callable(function) and len(function.__doc__) > 40


def test_unknown_name_is_an_attribute_error() -> None:
    """With the list of what there is."""
    with pytest.raises(AttributeError, match="create_backbone"):
        furnace.nothing  # noqa: B018


def test_import_is_lazy() -> None:
    """``import furnace`` does not import torch."""
    code = "import sys, furnace; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": furnace.__path__[0] + "/.."}).returncode == 0
