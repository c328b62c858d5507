"""Process groups: two real gloo processes, and the single-process no-ops."""

import os
import socket

import numpy as np
import pytest
import torch.multiprocessing as mp

from furnace.runtime import distributed
from furnace.runtime.files import UserError


def _worker(rank: int, size: int, port: int, folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    distributed.start()
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (rank, size, rank == 0)
    assert distributed.on_main(lambda: {"from": os.environ["RANK"]}) == {"from": "0"}
    assert distributed.gather_lists([rank] * (rank + 1)) == [0, 1, 1]
    try:
        distributed.on_main(_fail)
    except UserError as error:
        assert str(error) == "mend it"
    else:
        raise AssertionError("the error of the main process did not reach this one")
    for total in (7, 2, 1):
        whole = np.arange(total * 3, dtype=np.float32).reshape(total, 3)
        out = distributed.gather_strided(whole[rank::size], total)
        assert (out is None) == (rank != 0)
        if rank == 0:
            np.testing.assert_array_equal(out, whole)
    distributed.stop()
    open(f"{folder}/done{rank}", "w").close()


def _fail() -> None:
    raise UserError("mend it")


def test_two_processes(tmp_path) -> None:
    """Values, errors and rows arrive; uneven shares; one process with none."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, args=(2, port, str(tmp_path)), nprocs=2)
    assert sorted(os.listdir(tmp_path)) == ["done0", "done1"]


def test_single_process() -> None:
    """Everything is local."""
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.gather_lists([1, 2]) == [1, 2] and distributed.on_main(lambda: 5) == 5
    rows = np.ones((2, 3), np.float32)
    assert distributed.gather_strided(rows, 2) is rows
    with pytest.raises(UserError):
        distributed.on_main(_fail)
