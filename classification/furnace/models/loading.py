"""From whatever a checkpoint file holds to a backbone with every tensor in its place, or a clear refusal.

The steps: unwrap (``{"model": ...}``), find the one key prefix that fits best, translate published key names, resample
position tables, then judge. A backbone tensor that the file lacks, or has in another shape, is an error: evaluating
half-loaded weights gives numbers that look real.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import resize_rel_pos_bias_table
from torch import nn

from furnace.runtime.files import CheckpointError, CheckpointFile

State = dict[str, torch.Tensor]

WRAPPERS = ("model", "module", "state_dict", "teacher")
PREFIX_PARTS = ("module.", "_orig_mod.", "teacher.", "model.", "backbone.", "encoder.")
RELATIVE_TABLE = "relative_position_bias_table"
ALWAYS_MAY_MISS = ("num_batches_tracked",)  # a counter that no forward pass in eval mode reads


@dataclass(frozen=True)
class LoadRules:
    """What is particular to one architecture.

    Attributes:
        rename: key beginnings of the file and what the model calls them.
        may_miss: key endings that the file may lack.
        may_drop: key endings that the file may have although the model's outputs would need them.
    """

    rename: dict[str, str] = field(default_factory=dict)
    may_miss: tuple[str, ...] = ()
    may_drop: tuple[str, ...] = ()

    def __or__(self, other: "LoadRules") -> "LoadRules":
        """The rules of both."""
        return LoadRules({**self.rename, **other.rename}, self.may_miss + other.may_miss,
                         self.may_drop + other.may_drop)


PLAIN = LoadRules()


def asked_rules(options: Mapping[str, Any]) -> LoadRules:
    """What a file may lack, or call differently, because the user asked for another form of the architecture.

    Args:
        options: of timm's constructor. ``init_values`` adds layer scales, ``use_rel_pos_bias`` relative positions,
            and ``global_pool`` may move the pretrained final norm behind the pooling or back.
    """
    rules = LoadRules()
    if options.keys() & {"init_values", "ls_init_value"}:
        rules |= LoadRules(may_miss=(".gamma", ".gamma_1", ".gamma_2"))
    if "use_rel_pos_bias" in options:
        rules |= LoadRules(may_miss=(RELATIVE_TABLE,)) if options["use_rel_pos_bias"] else \
            LoadRules(may_drop=(RELATIVE_TABLE,))
    if "global_pool" in options:
        rules |= LoadRules(rename={"norm.": "fc_norm.", "fc_norm.": "norm."})
    return rules


@dataclass(frozen=True)
class LoadReport:
    """What became of every tensor, by name.

    Attributes:
        matched: loaded from the file.
        missing: in the model, not in the file, and allowed to be missing.
        unexpected: in the file, not in the model (decoders, heads, other networks).
        resampled: position tables brought to the model's size.
        prefix: what stood before the backbone's keys in the file.
    """

    matched: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    resampled: tuple[str, ...] = ()
    prefix: str = ""

    def summary(self) -> str:
        """One line for the log."""
        text = f"{len(self.matched)} tensors loaded"
        for title, keys in (("resampled", self.resampled), ("left at their start", self.missing),
                            ("not used", self.unexpected)):
            if keys:
                text += f", {len(keys)} {title} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        return text


def load_backbone(model: nn.Module, file: CheckpointFile, name: str, *, asked: LoadRules = PLAIN,
                  wrappers: tuple[str, ...] = WRAPPERS, prefix: str = "") -> LoadReport:
    """Load a checkpoint file into ``model`` (a backbone without a head), strictly.

    Args:
        model: a timm model with ``num_classes=0``.
        file: what ``runtime.files.read_checkpoint`` returned.
        name: what the user asked for, for messages.
        asked: see ``asked_rules``.
        wrappers: the keys under which the state dict may lie, in this order.
        prefix: what stands before the backbone's keys; "" finds the best one.

    Raises:
        CheckpointError: no state dict inside, or a backbone tensor is missing, misshapen or not finite; the message
            says what the file seems to be.
    """
    state = unwrap(file.content, wrappers)
    if not state:
        raise CheckpointError(f"checkpoint {file.path} has no tensors under "
                              f"{', '.join(wrappers)} or at its top level: is it a model checkpoint?")
    if prefix and not any(key.startswith(prefix) for key in state):
        raise CheckpointError(f"checkpoint {file.path} has no key that begins with {prefix!r} (it has "
                              f"{', '.join(list(state)[:3])}, ...): leave --model_prefix empty to find it")
    return load_state(model, state, name=name, source=str(file.path), asked=asked, prefix=prefix)


def load_state(model: nn.Module, state: State, *, name: str, source: str, asked: LoadRules = PLAIN,
               prefix: str = "") -> LoadReport:
    """Load a state dict into ``model``; see ``load_backbone``."""
    rules = getattr(model, "load_rules", PLAIN) | asked
    target = model.state_dict()
    state = translate(state, target)
    prefix = prefix or best_prefix(state, target, rules)
    bare = {key[len(prefix):]: value for key, value in state.items() if key.startswith(prefix)}
    others = [key for key in state if not key.startswith(prefix)]
    renamed = {_rename(key, rules, target, bare): value for key, value in bare.items()}
    renamed, resampled = resample_positions(renamed, model, target)

    found = {key: value for key, value in renamed.items() if key in target}
    misshapen = [f"{key} {tuple(value.shape)}, not {tuple(target[key].shape)}"
                 for key, value in found.items() if value.shape != target[key].shape]
    absent = [key for key in target if key not in found]
    allowed = [key for key in absent if key.endswith(rules.may_miss + ALWAYS_MAY_MISS)]
    missing = [key for key in absent if key not in allowed]
    if missing or misshapen:
        raise CheckpointError(_refusal(name, source, describe_state(bare), found, missing, misshapen, len(target)))
    deeper = [key for key in renamed if key not in target and _is_deeper(key, target)]
    if deeper:
        raise CheckpointError(
            f"checkpoint {source} does not fit: this looks like {describe_state(bare)}; you asked for {name}. It has "
            f"{len(deeper)} tensors of layers that {name} lacks ({', '.join(deeper[:4])}, ...): a deeper "
            "network of the same widths. Nothing was loaded.")
    refuse_lost_positions(renamed, target, rules, name=name, source=source)
    broken = [key for key, value in found.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise CheckpointError(f"checkpoint {source}: {len(broken)} tensors hold NaN or infinity ({broken[0]}, ...): "
                              "the file is damaged or the training diverged")
    model.load_state_dict(found, strict=False)
    return LoadReport(matched=tuple(found), missing=tuple(allowed), resampled=tuple(resampled), prefix=prefix,
                      unexpected=tuple([key for key in renamed if key not in target] + others))


def refuse_lost_positions(state: State, target: State, rules: LoadRules, *, name: str, source: str) -> None:
    """A file whose attention learned relative positions computes something else in a model without them."""
    lost = [key for key, value in state.items() if key.startswith("blocks.") and key.endswith(RELATIVE_TABLE)
            and key not in target and value.any()]
    if lost and not any(key.endswith(rules.may_drop) for key in lost):
        raise CheckpointError(f"checkpoint {source} has learned relative positions in {len(lost)} blocks, which {name} "
                              "lacks: take PanDerm_Base_FT or PanDerm_Large_FT, or ask for relative positions")


def _is_deeper(key: str, target: State) -> bool:
    """Whether a key belongs to a numbered family of the model (blocks.<n>, layer1.<n>) beyond the model's last one."""
    parts = key.split(".")
    for i, part in enumerate(parts[:-1]):
        family = ".".join(parts[:i]) + "."
        if i and part.isdigit() and not any(k.startswith(f"{family}{part}.") for k in target):
            return any(re.match(re.escape(family) + r"\d+\.", k) for k in target)
    return False


def _refusal(name: str, source: str, looks_like: str, found: State, missing: list[str], misshapen: list[str],
             total: int) -> str:
    lines = [f"checkpoint {source} does not fit: this looks like {looks_like}; you asked for {name}.",
             f"  fitting tensors: {len(found) - len(misshapen)} of {total}"]
    for title, items in (("missing", missing), ("of another shape", misshapen)):
        if items:
            lines.append(f"  {title}: {len(items)} ({'; '.join(items[:4])}{'; ...' if len(items) > 4 else ''})")
    lines.append("  Nothing was loaded. Give the checkpoint that belongs to --model, or the --model that fits the file "
                 "(pretrain_weight/README.md has the table).")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------ finding keys

def unwrap(content: object, wrappers: tuple[str, ...] = WRAPPERS) -> State:
    """The state dict inside a checkpoint: flat, or under one of ``wrappers``, the first that is there (nested, too).

    Returns:
        The tensors by key; empty when there are none.
    """
    while isinstance(content, dict):
        tensors = {key: value for key, value in content.items()
                   if isinstance(key, str) and isinstance(value, torch.Tensor)}
        inner = [content[key] for key in wrappers if isinstance(content.get(key), dict) and content[key]]
        # a counter may lie beside the wrapper
        if not inner or (tensors and len(unwrap(inner[0], wrappers)) <= len(tensors)):
            return tensors
        content = inner[0]
    return {}


def best_prefix(state: State, target: State, rules: LoadRules) -> str:
    """The prefix, built of PREFIX_PARTS, under which most of the model's keys are found ("" when none is better)."""
    votes: dict[str, int] = {"": 0}
    for key in state:
        prefix, rest = "", key
        while True:
            if _rename(rest, rules, target) in target:
                votes[prefix] = votes.get(prefix, 0) + 1
            part = next((part for part in PREFIX_PARTS if rest.startswith(part)), None)
            if part is None:
                break
            prefix, rest = prefix + part, rest[len(part):]
    return max(votes, key=lambda prefix: votes[prefix])


def _rename(key: str, rules: LoadRules, target: State, present: Mapping[str, Any] | None = None) -> str:
    """Apply the model's renamings to a key that the model does not know as it stands, unless the new name is there."""
    if key in target:
        return key
    for old, new in rules.rename.items():
        if key.startswith(old) and new + key[len(old):] not in (present or {}):
            return new + key[len(old):]
    return key


def translate(state: State, target: State) -> State:
    """Bring DINOv2's published names to timm's: chunked blocks, register tokens, packed SwiGLU.

    ``blocks.0.3.norm1.weight`` (chunk 0, block 3) becomes ``blocks.3.norm1.weight``, unless the model itself has nested
    blocks. With registers, timm keeps the class token's position inside the class token.
    """
    nested = any(re.search(r"blocks\.\d+\.\d+\.", key) for key in target)
    if not nested:
        state = {re.sub(r"(^|\.)blocks\.\d+\.(\d+\.)", r"\1blocks.\2", key): value for key, value in state.items()}
    state = {re.sub(r"\.mlp\.w12\.", ".mlp.fc1.", re.sub(r"\.mlp\.w3\.", ".mlp.fc2.", key)): value
             for key, value in state.items()}
    for key in [key for key in state if key.endswith("register_tokens")]:
        prefix = key.removesuffix("register_tokens")
        state[prefix + "reg_token"] = state.pop(key)
        cls_token, positions = state.get(prefix + "cls_token"), state.get(prefix + "pos_embed")
        if cls_token is not None and positions is not None:
            state[prefix + "cls_token"] = cls_token + positions[:, :1]
            state[prefix + "pos_embed"] = positions[:, 1:]
    return state


# --------------------------------------------------------------------------------------------------------- positions

def resample_positions(state: State, model: nn.Module, target: State, *, grid: tuple[int, int] | None = None
                       ) -> tuple[State, list[str]]:
    """Bring position tables of another image size to the model's grid.

    Absolute tables are resized bicubically without antialiasing (as DINOv2 does), relative ones geometrically (timm).
    ``grid`` is the (rows, columns) of the absolute table; without it the table is of a square.

    Returns:
        The state and the keys that were resized. A table that is no square grid is left for the shape check.
    """
    state, resampled = dict(state), []
    key = "pos_embed"
    if key in state and key in target and state[key].ndim == 3 and hasattr(model, "patch_embed"):
        prefix = 0 if getattr(model, "no_embed_class", False) else getattr(model, "num_prefix_tokens", 1)
        side, new = math.isqrt(max(state[key].shape[1] - prefix, 0)), tuple(model.patch_embed.grid_size)
        old = (side, side) if grid is None else tuple(grid)
        fits = math.prod(old) + prefix == state[key].shape[1] and state[key].shape[2] == target[key].shape[2]
        if fits and (old != new or state[key].shape != target[key].shape):  # 14 x 14 and 7 x 28 have the same shape
            state[key] = resample_abs_positions(state[key], new, prefix, old)
            resampled.append(key)
    for key in [k for k in state if k.endswith("relative_position_bias_table") and k in target]:
        old, new = state[key], target[key]
        if old.shape != new.shape and old.ndim == 2 and old.shape[1] == new.shape[1]:
            window = (math.isqrt(old.shape[0] - 3) + 1) // 2
            if (2 * window - 1) ** 2 + 3 == old.shape[0]:
                state[key] = resize_rel_pos_bias_table(old, tuple(model.patch_embed.grid_size), tuple(new.shape))
                resampled.append(key)
    return state, resampled


def resample_abs_positions(table: torch.Tensor, grid: tuple[int, int], prefix: int,
                           old: tuple[int, int] | None = None, *, offset: float = 0.0) -> torch.Tensor:
    """Resize a table of absolute positions; one that has the wanted grid stays as it is.

    Args:
        table: (1, prefix + rows * columns, D).
        grid: rows and columns wanted.
        prefix: leading tokens without a place in the grid, kept as they are.
        old: rows and columns of the table; None: it is of a square.
        offset: place i of n reads the table of m at (i + 0.5) * m / (n + offset) - 0.5. DINOv2 resizes with 0.1 for
            crops of another size while it trains; 0 has the borders of both grids coincide.

    Returns:
        (1, prefix + grid[0] * grid[1], D) in the table's dtype.

    Source: Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", 2024 (bicubic, a = -0.75, no
    antialiasing).
    """
    first, patches = table[:, :prefix], table[:, prefix:]
    side, dim = math.isqrt(patches.shape[1]), patches.shape[2]
    old = tuple(old or (side, side))
    if old == tuple(grid):
        return table
    places = patches.float().reshape(1, *old, dim).permute(0, 3, 1, 2)  # (1, N, D) -> (1, D, h, w)
    how = {"scale_factor": [(new + offset) / was for new, was in zip(grid, old, strict=True)]} if offset else \
        {"size": tuple(grid)}
    resized = F.interpolate(places, mode="bicubic", antialias=False, align_corners=False, **how)
    if resized.shape[2:] != torch.Size(grid):
        raise ValueError(f"an offset of {offset} makes a grid of {tuple(resized.shape[2:])}, not {tuple(grid)}")
    return torch.cat([first, resized.flatten(2).transpose(1, 2).to(table.dtype)], dim=1)  # -> (1, prefix + N', D)


# ---------------------------------------------------------------------------------------------------- what is this?

def describe_state(state: State) -> str:
    """Name the architecture that a state dict (without its prefix) seems to be of, for messages."""
    keys = set(state)
    patch = state.get("patch_embed.proj.weight")
    depth = len({match[1] for key in keys if (match := re.match(r"blocks\.(\d+)\.", key))})
    if patch is not None and patch.ndim == 4 and depth:
        dim, side = patch.shape[0], patch.shape[-1]
        if "blocks.0.attn.q_bias" in keys:
            form = "_FT" if any(k.startswith("fc_norm.") or k.endswith("relative_position_bias_table")
                                for k in keys) else ""
            size = {(768, 12): "Base", (1024, 24): "Large"}.get((dim, depth))
            return f"PanDerm_{size}{form}" if size else f"a BEiT of width {dim} and depth {depth}"
        size = {(192, 12): "ViT-Ti", (384, 12): "ViT-S", (768, 12): "ViT-B", (1024, 24): "ViT-L",
                (1536, 40): "ViT-g"}.get((dim, depth), f"a ViT of width {dim} and depth {depth}")
        family = " (DINOv2-type, as DermINO)" if "blocks.0.ls1.gamma" in keys else ""
        registers = " with register tokens" if "reg_token" in keys else ""
        return f"{size}/{side}{family}{registers}"
    if "layer4.0.conv1.weight" in keys:
        return "a ResNet-50" if "layer3.5.conv3.weight" in keys and "layer3.6.conv1.weight" not in keys else "a ResNet"
    return f"a file of {len(keys)} tensors ({', '.join(sorted(keys)[:3])}, ...)" if keys else "no backbone"
