"""Which device, and in which number format the forward pass runs."""

import contextlib
import copy
import logging
import time

import torch

from furnace.runtime.files import UserError

logger = logging.getLogger(__name__)

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
WORTHWHILE = 1.1  # bf16 must be this many times faster than fp32 before --amp_dtype auto takes it


def pick_device(requested: str | None = None) -> torch.device:
    """cuda, else mps, else cpu; or the one asked for.

    Raises:
        UserError: the device asked for is not on this machine.
    """
    if not requested or requested == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(requested)
    except RuntimeError as error:
        raise UserError(f"--device {requested} is no device: use auto, cpu, cuda, cuda:1 or mps") from error
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not present.get(device.type, False):
        raise UserError(f"--device {requested}: this machine (or this PyTorch build) has no {device.type}; "
                        "leave --device out to pick what there is")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {requested}: this machine has {torch.cuda.device_count()} CUDA device(s)")
    return device


def autocast(device: torch.device, amp_dtype: str) -> contextlib.AbstractContextManager:
    """The context for a forward pass in ``amp_dtype`` (bf16, fp16 or fp32; fp32 means no autocast)."""
    dtype = AMP_DTYPES[amp_dtype]
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def prepare_for_inference(backbone: torch.nn.Module, amp_dtype: str, compile_backbone: bool = False) -> torch.nn.Module:
    """A backbone as it runs fastest without gradients; the weights of the one that was given keep their values.

    Convolutions get the channels-last layout (on a CPU five times as fast for EfficientNet-Lite0 in fp32, no matter for
    a ViT). In bf16 or fp16 the weights of linear and convolutional layers are cast once, in a copy, as autocast would
    cast them in every batch; the rest (norms, residual sums) stays as autocast leaves it.

    Args:
        backbone: in eval mode.
        amp_dtype: bf16, fp16 or fp32.
        compile_backbone: compile it by torch.compile for one fixed batch size.
    """
    dtype = AMP_DTYPES[amp_dtype]
    if dtype is not None:
        backbone = copy.deepcopy(backbone)
        for module in backbone.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                module.to(dtype)
    backbone = torch.nn.utils.convert_conv2d_weight_memory_format(backbone, torch.channels_last)
    return torch.compile(backbone, dynamic=False) if compile_backbone else backbone


def resolve_amp_dtype(requested: str, backbone: torch.nn.Module, device: torch.device,
                      input_size: int | tuple[int, int]) -> str:
    """Turn ``auto`` into bf16 or fp32 by timing a few forward passes; other values are returned as they are.

    Args:
        requested: auto, bf16, fp16 or fp32.
        backbone: the model on ``device``, in eval mode.
        input_size: side, or (height, width), of the probe images in pixels.
    """
    if requested != "auto":
        return requested
    size = (input_size, input_size) if isinstance(input_size, int) else input_size
    images = torch.zeros(32 if device.type == "cuda" else 4, 3, *size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)  # timed as it will run
    seconds = {name: _time_forward(prepare_for_inference(backbone, name), images, name) for name in ("fp32", "bf16")}
    chosen = "bf16" if seconds["bf16"] * WORTHWHILE < seconds["fp32"] else "fp32"
    logger.info("precision: %s (probe: fp32 %.3f s, bf16 %.3f s for %d images)",
                chosen, seconds["fp32"], seconds["bf16"], len(images))
    return chosen


@torch.inference_mode()
def _time_forward(backbone: torch.nn.Module, images: torch.Tensor, amp_dtype: str, repeats: int = 3) -> float:
    """Best of ``repeats`` forward passes in seconds, after one that does not count."""
    best = float("inf")
    for repeat in range(repeats + 1):
        began = time.perf_counter()
        with autocast(images.device, amp_dtype):
            backbone(images)
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)
        if repeat:
            best = min(best, time.perf_counter() - began)
    return best
