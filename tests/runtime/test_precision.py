"""Device and number format."""

import pytest
import torch

from furnace.runtime import precision
from furnace.runtime.files import UserError


@pytest.mark.parametrize("requested,words", [("gpu", "is no device"), ("cuda:99", "cuda"), ("mps", "mps")])
def test_absent_device_is_refused(requested: str, words: str) -> None:
    """With the way out."""
    if requested == "mps" and torch.backends.mps.is_available():
        requested, words = "xla", "no xla"
    with pytest.raises(UserError, match=words):
        precision.pick_device(requested)


def test_cpu_is_always_there() -> None:
    """Explicitly, and by default without an accelerator."""
    assert precision.pick_device("cpu").type == "cpu"
    if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        assert precision.pick_device().type == precision.pick_device("auto").type == "cpu"


@pytest.mark.parametrize("seconds,chosen", [({"fp32": 1.0, "bf16": 0.5}, "bf16"), ({"fp32": 1.0, "bf16": 0.95}, "fp32"),
                                            ({"fp32": 1.0, "bf16": 2.0}, "fp32")])
def test_auto_takes_the_clearly_faster(monkeypatch, seconds: dict, chosen: str) -> None:
    """bf16 must be 1.1 times as fast."""
    monkeypatch.setattr(precision, "_time_forward", lambda model, images, name: seconds[name])
    assert precision.resolve_amp_dtype("auto", torch.nn.Identity(), torch.device("cpu"), 8) == chosen


def test_explicit_precision_is_not_probed() -> None:
    """No model needed."""
    assert precision.resolve_amp_dtype("fp16", None, torch.device("cpu"), 8) == "fp16"


def test_probe_runs_the_model_in_both() -> None:
    """The real timing function sees fp32 and bf16 outputs, without gradients."""
    seen = []

    class Probe(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.layer(x.flatten(1)[:, :4])
            seen.append((out.dtype, out.requires_grad))
            assert x.is_contiguous(memory_format=torch.channels_last), "timed in the layout that extraction has"
            return out

    assert precision.resolve_amp_dtype("auto", Probe(), torch.device("cpu"), 8) in ("bf16", "fp32")
    assert {dtype for dtype, _ in seen} == {torch.float32, torch.bfloat16} and not any(g for _, g in seen)


@pytest.mark.parametrize("size,shape", [(8, (8, 8)), ((16, 24), (16, 24))])
def test_probe_images_have_the_size_of_the_input(monkeypatch, size: int | tuple[int, int], shape: tuple) -> None:
    """A side, or height and width: four black images on a CPU."""
    seen = set()

    def timed(model: torch.nn.Module, images: torch.Tensor, name: str) -> float:
        seen.add((name, tuple(images.shape)))
        return 1.0

    monkeypatch.setattr(precision, "_time_forward", timed)
    assert precision.resolve_amp_dtype("auto", torch.nn.Identity(), torch.device("cpu"), size) == "fp32"
    assert seen == {(name, (4, 3, *shape)) for name in ("fp32", "bf16")}


@pytest.mark.parametrize("name,dtype", [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_autocast(name: str, dtype: torch.dtype) -> None:
    """A product comes out in the asked format."""
    with precision.autocast(torch.device("cpu"), name):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
