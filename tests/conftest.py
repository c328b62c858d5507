"""Fixtures for every test."""

import logging
import os
from pathlib import Path

import pytest
import torch

from furnace.data.synthetic import draw_demo_data_set
from helpers import golden_state

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches a network
torch.set_num_threads(1 if os.environ.get("PYTEST_XDIST_WORKER") else 2)  # test processes share the cores


@pytest.fixture(autouse=True, scope="session")
def feature_cache_of_the_tests(tmp_path_factory) -> Path:
    """No test reads or fills the user's cache of features."""
    path = tmp_path_factory.mktemp("cache")
    os.environ["XDG_CACHE_HOME"] = str(path)
    return path


@pytest.fixture(autouse=True)
def log_level():
    """Entry scripts set it for their process."""
    before = logging.getLogger().level
    yield
    logging.getLogger().setLevel(before)


@pytest.fixture
def one_thread():
    """For tests that compare bits, or whose pictures are so small that threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def demo_csv(tmp_path_factory) -> Path:
    """A small demo data set: 60 drawn images of 96 px."""
    return draw_demo_data_set(tmp_path_factory.mktemp("demo"), images=60, size=96)


@pytest.fixture(scope="session")
def base_checkpoint(tmp_path_factory) -> Path:
    """The goldens' PanDerm_Base checkpoint as a flat file, 343 MB."""
    path = tmp_path_factory.mktemp("weights") / "panderm_bb.pth"
    torch.save(golden_state("keys_base.json"), path)
    return path
