"""Class prototypes for the label loss: one vector for each class, and the linear head that holds them.

DermINO gives each class of its ontology the text embedding of its name and keeps these vectors fixed, so that the label
loss shapes the backbone alone. Vectors may also come from a file, from the features of labelled images, or from random
numbers. They reach the backbone's width through ``project`` and become the weight of a ``PrototypeHead``; row k is
class k everywhere.
"""

import logging
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from furnace.runtime.files import DAMAGED, UserError, read_checkpoint
from furnace.runtime.seeding import seed_of

logger = logging.getLogger(__name__)

POOLINGS = ("mean", "pooler")
NAME_TOKENS = 32  # names are padded to this length, and cut there
NAMES_AT_ONCE = 64
MOVED = 1e-5  # a cosine or a relative norm that moved further was lost by a projection, not by rounding


# ---------------------------------------------------------------------------------------------------------- the vectors

def text_vectors(names: Sequence[str], *, encoder: str, pooling: str = "mean", device: str | torch.device = "cpu"
                 ) -> torch.Tensor:
    """Embed class names by a text encoder.

    ``mean`` averages the vectors of a name's own tokens, the encoder's start and end marks included, as sentence
    encoders are trained (Reimers & Gurevych, Sentence-BERT, 2019). ``pooler`` is the published choice of DermINO (with
    the encoder GanjinZero/coder_all): BERT's pooler output, a dense layer and tanh on the first token, computed
    without an attention mask, so that the name's padding is attended to as well.

    Args:
        names: K different names, in the order of the classes.
        encoder: a text encoder in Hugging Face's format: its name on the hub, or a folder.
        pooling: mean or pooler.
        device: where the encoder runs.

    Returns:
        (K, E) float32 on the CPU; rows have length 1.

    Raises:
        UserError: no transformers; the encoder is not found, no text encoder, or lacks weights; a name stands twice.
    """
    if pooling not in POOLINGS:
        raise UserError(f"pooling {pooling!r} of text embeddings is unknown: use {' or '.join(POOLINGS)}")
    if not names or not all(name.strip() for name in names):
        raise ValueError("text_vectors needs at least one name, and none of them empty")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"classes that have one name cannot be told apart by it: {_some(twice)}; give each class a "
                        "name of its own")
    tokenizer, model = _load_encoder(encoder, pooling=pooling)
    _warn_of_long_names(names, tokenizer)
    model = model.to(device).eval()
    rows = []
    for start in range(0, len(names), NAMES_AT_ONCE):
        tokens = tokenizer(list(names[start:start + NAMES_AT_ONCE]), padding="max_length", truncation=True,
                           max_length=NAME_TOKENS, return_tensors="pt").to(device)
        rows.append(_embed(model, tokens["input_ids"], tokens["attention_mask"], pooling=pooling).cpu())
    return _unit_rows(torch.cat(rows), source=f"the embeddings by {encoder}", names=names)


@torch.no_grad()
def _embed(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, *, pooling: str) -> torch.Tensor:
    """Tokens (B, T) and 1 where a token is no padding (B, T) -> (B, E)."""
    with torch.autocast(ids.device.type, enabled=False):
        if pooling == "pooler":  # a mask of ones is none, and does not let a model guess one from the padding
            return model(input_ids=ids, attention_mask=torch.ones_like(mask)).pooler_output.float()
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()  # (B, T, E)
    weight = mask[:, :, None].to(states.dtype)
    return (states * weight).sum(dim=1) / weight.sum(dim=1)


def _load_encoder(encoder: str, *, pooling: str) -> tuple[Any, nn.Module]:
    """The tokenizer and the model, in float32; never runs code that comes with it."""
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise UserError("text embeddings of class names need transformers: pip install -e '.[text]' (or pip install "
                        "transformers)") from error
    from safetensors import SafetensorError

    folder = Path(encoder).expanduser()
    place = str(folder) if folder.is_dir() else encoder.removeprefix("hf-hub:")
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        model, report = AutoModel.from_pretrained(place, trust_remote_code=False, output_loading_info=True)
    except (*DAMAGED, OSError, pickle.UnpicklingError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        if isinstance(error, pickle.UnpicklingError):  # PyTorch's text tells how to run the code in the file
            reason = "its weights are damaged, or hold Python objects beside tensors, which are not loaded"
        raise UserError(f"cannot load the text encoder {encoder!r} ({reason}): check the name and the network, or "
                        "download it and pass its folder, with config.json, weights and tokenizer files") from error
    if getattr(model.config, "is_encoder_decoder", False) or model.config.get_text_config() is not model.config:
        raise UserError(f"{encoder!r} is a {type(model).__name__}, not an encoder of text alone: take a BERT-like one")
    if tokenizer.pad_token is None:
        raise UserError(f"the tokenizer of {encoder!r} has no padding token: take a BERT-like text encoder")
    missing = sorted(report["missing_keys"])  # transformers gives these random numbers
    untrained = [key for key in missing if key.startswith("pooler.")]
    if pooling == "pooler" and (untrained or getattr(model, "pooler", None) is None):
        raise UserError(f"the text encoder {encoder!r} has no trained pooler: take the pooling mean")
    if len(missing) > len(untrained):
        raise UserError(f"the text encoder {encoder!r} lacks {len(missing)} weights of a {type(model).__name__} "
                        f"({_some(missing)}): its files are damaged or of another model; download it again")
    return tokenizer, model.float()


def _warn_of_long_names(names: Sequence[str], tokenizer: Any) -> None:
    ids = tokenizer(list(names))["input_ids"]
    long = [name for name, row in zip(names, ids, strict=True) if len(row) > NAME_TOKENS]
    if long:
        logger.warning("%d class names have more than %d tokens and are cut: %s", len(long), NAME_TOKENS, _some(long))


def read_vectors(path: str | Path, *, classes: int) -> torch.Tensor:
    """Read prototypes from a file; they need no text encoder then.

    Args:
        path: ``.npy``, or ``.safetensors`` with one matrix: K rows in the order of the classes.
        classes: K.

    Returns:
        (K, E) float32; rows scaled to length 1.

    Raises:
        UserError: the file is absent, damaged or of another kind, or its numbers are no K directions.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() == ".npy":
        vectors = _read_npy(path)
    elif path.suffix.lower() == ".safetensors":
        content = read_checkpoint(path).content
        matrices = [name for name, value in content.items() if value.ndim == 2]
        if len(matrices) != 1:
            raise UserError(f"{path} has {len(matrices)} matrices ({_some(matrices or list(content))}): the file of "
                            "prototypes must have one, a row for each class")
        vectors = content[matrices[0]]
    else:
        raise UserError(f"{path} is no file of prototypes: save them as .npy or .safetensors, a row for each class")
    if vectors.ndim != 2 or len(vectors) != classes or not vectors.shape[1]:
        raise UserError(f"{path} has the shape {tuple(vectors.shape)}, not ({classes}, width): the file of prototypes "
                        f"needs a row for each of the {classes} classes, in their order")
    return _unit_rows(vectors, source=str(path))


def _read_npy(path: Path) -> torch.Tensor:
    try:
        array = np.load(path, allow_pickle=False)
    except OSError as error:
        raise UserError(f"the prototypes {path} cannot be read: {error.strerror or error}; check the path") from error
    except (ValueError, EOFError) as error:
        raise UserError(f"{path} is damaged or not an array of numbers ({error}): save the prototypes by numpy.save "
                        "as one matrix") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise UserError(f"{path} is not one array of real numbers: save the prototypes by numpy.save as one matrix")
    return torch.from_numpy(array.astype(np.float64))


def class_mean_vectors(features: np.ndarray, targets: np.ndarray, known: np.ndarray, *, centre: bool = True
                       ) -> tuple[torch.Tensor, list[int]]:
    """The mean feature of the images that show a class.

    All features of a backbone share a large common part, so that every class mean has a large product with every image,
    of its class or not. ``centre`` takes that part away: the direction is that from the mean of the class means to the
    mean of the class.

    Args:
        features: (N, D) of labelled images, by the backbone that will be trained.
        targets: (N, K), above 0 where the image shows the class.
        known: (N, K) bool, where the target counts.
        centre: take the mean of the class means away.

    Returns:
        (K, D) float32; rows have length 1, or are 0 for classes without a direction; and the numbers of these: classes
        without an image, or whose mean is that of all classes (as with one class alone). Give them vectors of another
        kind.

    Raises:
        ValueError: shapes that do not belong together, or features that are not finite.
    """
    if features.ndim != 2 or len(features) != len(targets) or known.shape != targets.shape or known.dtype != bool:
        raise ValueError(f"features {features.shape}, targets {targets.shape} and known {known.shape} of {known.dtype} "
                         "are not (N, D), (N, K) and (N, K) bool")
    if not np.isfinite(features).all():
        raise ValueError("features that are not finite have no mean")
    total, count = np.zeros((targets.shape[1], features.shape[1])), np.zeros(targets.shape[1])
    for start in range(0, len(targets), 4096):  # not all images at once in float64
        at = slice(start, start + 4096)
        present = ((targets[at] > 0) & known[at]).astype(np.float64)  # (n, K)
        total += present.T @ features[at].astype(np.float64)
        count += present.sum(axis=0)
    found = count > 0
    mean = total[found] / count[found, None]
    scale = np.linalg.norm(mean, axis=1)
    if centre and len(mean):
        mean = mean - mean.mean(axis=0)
    length = np.linalg.norm(mean, axis=1)
    usable = length > 1e-6 * scale  # else what is left is rounding
    vectors = np.zeros_like(total)
    vectors[np.flatnonzero(found)[usable]] = mean[usable] / length[usable, None]
    return torch.from_numpy(vectors).float(), np.flatnonzero(~vectors.any(axis=1)).tolist()


def orthogonal_vectors(classes: int, width: int, *, seed: int) -> torch.Tensor:
    """Random directions at right angles, (classes, width) float32: every class equally far from every other.

    Raises:
        UserError: more classes than the width has directions.
    """
    if classes > width:
        raise UserError(f"{classes} classes cannot be at right angles in {width} dimensions: take random prototypes, "
                        "or a wider backbone")
    return _orthonormal_rows(classes, width, seed=seed).float()


def random_vectors(classes: int, width: int, *, seed: int) -> torch.Tensor:
    """Random directions, spread evenly over the sphere: (classes, width) float32; rows have length 1."""
    return F.normalize(_normal(classes, width, "random prototypes", seed=seed), dim=1).float()


def _normal(rows: int, columns: int, purpose: str, *, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed_of(seed, purpose))
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def _orthonormal_rows(rows: int, columns: int, *, seed: int) -> torch.Tensor:
    """(rows, columns) float64, rows <= columns; evenly distributed, for the signs are those of R's diagonal."""
    q, r = torch.linalg.qr(_normal(rows, columns, "orthonormal", seed=seed).T)
    return (q * r.diagonal().sign()).T.contiguous()


def project(vectors: torch.Tensor, width: int, *, seed: int) -> torch.Tensor:
    """Bring prototypes to another width by one fixed linear map, which keeps their norms and cosines where any can.

    Wider, or as narrow as the number of directions that the vectors take up: a seeded rotation of these directions
    into the new space; norms and cosines stay, to float32's rounding. Narrower than that: the ``width`` leading
    directions (of the singular value decomposition), rows scaled back to their norms; a warning says how far the
    cosines moved.

    Args:
        vectors: (K, E).
        width: D.
        seed: of the map.

    Returns:
        (K, D) float32; the same numbers where E is D.

    Raises:
        UserError: a vector of which nothing is left in the leading directions.
    """
    if vectors.shape[1] == width:
        return vectors.float()
    x = y = vectors.detach().cpu().double()
    if x.shape[1] > width:
        basis = torch.linalg.svd(x, full_matrices=False).Vh[:width]  # (min(K, D), E), orthonormal rows
        y = x @ basis.T
    y = y @ _orthonormal_rows(y.shape[1], width, seed=seed)
    if x.shape[1] > width:
        y = _mend(y, x)
    return y.float().to(vectors.device)


def _mend(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Give rows (K, D) the norms of the rows (K, E) that they come from, and warn, where not all of these fitted in."""
    norm, left = x.norm(dim=1), y.norm(dim=1)
    kept = torch.where(norm > 0, left / norm, 1.0)
    lost = torch.nonzero(kept < 1e-3).flatten().tolist()
    if lost:
        raise UserError(f"prototypes of {x.shape[1]} numbers do not fit into {y.shape[1]}: nothing is left of those of "
                        f"the classes {_some(lost)}; take random prototypes, or a wider backbone")
    a, b = F.normalize(x, dim=1), F.normalize(y, dim=1)
    moved = float((a @ a.T - b @ b.T).abs().max())
    if moved <= MOVED and float((1 - kept).abs().max()) <= MOVED:
        return y
    logger.warning("%d prototypes of %d numbers do not fit into %d without loss: a row kept at least %.1f %% of its "
                   "norm (scaled back), a cosine between two moved by %.3f at most",
                   len(x), x.shape[1], y.shape[1], 100 * float(kept.min()), moved)
    return b * norm[:, None]


# ------------------------------------------------------------------------------------------------------------- the head

class PrototypeHead(nn.Module):
    """A linear layer: ``weight`` (K, D) is the prototypes; for ``ssl_losses.masked_bce``.

    Computed in float32 whatever comes in, also under autocast.
    """

    def __init__(self, vectors: torch.Tensor, *, trainable: bool, temperature: float | None,
                 bias: torch.Tensor | None = None) -> None:
        """
        Args:
            vectors: (K, D), rows of length 1, D the width of the features; copied.
            trainable: False keeps weight and bias as they are, as published.
            temperature: None: the logit is x . w + b, as published, x as long as it is. A number: the cosine of x and w
                divided by it, + b.
            bias: (K,) its start; None: 0, as published.

        Raises:
            ValueError: no such rows, no temperature above 0, or a bias that is not a finite number for each class.
        """
        super().__init__()
        if vectors.ndim != 2 or not (vectors.float().norm(dim=1) - 1).abs().le(1e-3).all():  # NaN is not, either
            raise ValueError(f"prototypes {tuple(vectors.shape)} are not (classes, width) with rows of length 1")
        if temperature is not None and not temperature > 0:
            raise ValueError(f"a temperature is above 0, or None for plain products; not {temperature}")
        self.temperature = temperature
        weight = vectors.detach().to(torch.float32, copy=True).contiguous()
        self.weight = nn.Parameter(weight, requires_grad=trainable)
        start = weight.new_zeros(len(weight)) if bias is None else bias.detach().to(torch.float32, copy=True)
        if start.shape != (len(weight),) or not start.isfinite().all():
            raise ValueError(f"a bias of shape {tuple(start.shape)} is not a finite number for each of {len(weight)} "
                             "classes")
        self.bias = nn.Parameter(start, requires_grad=trainable)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features (..., D) -> logits (..., K) float32."""
        if x.shape[-1] != self.weight.shape[1]:
            raise ValueError(f"features of width {x.shape[-1]} do not fit prototypes of {self.weight.shape[1]}: bring "
                             "these to the backbone's width by project()")
        with torch.autocast(x.device.type, enabled=False):
            x, weight, bias = x.float(), self.weight.float(), self.bias.float()
            if self.temperature is None:
                return F.linear(x, weight, bias)
            return F.linear(F.normalize(x, dim=-1), F.normalize(weight, dim=-1)) / self.temperature + bias


def _unit_rows(vectors: torch.Tensor, *, source: str, names: Sequence[str] | None = None) -> torch.Tensor:
    """Rows scaled to length 1, (K, E) float32; refuses rows without a direction and warns of equal ones."""
    x = vectors.detach().cpu().double()
    bad = torch.nonzero(~(x.isfinite().all(dim=1) & (x.norm(dim=1) > 0))).flatten().tolist()
    if bad:
        raise UserError(f"{source}: {len(bad)} rows are 0 or not finite and point nowhere ({_some(bad)}, counted from "
                        "0): make these vectors again")
    unit = (x / x.norm(dim=1, keepdim=True)).float()
    _, group, size = torch.unique(unit, dim=0, return_inverse=True, return_counts=True)
    equal = torch.nonzero(size[group] > 1).flatten().tolist()
    if equal:
        logger.warning("%s: %d classes share their vector with another and cannot be told apart by it: %s", source,
                       len(equal), _some([names[k] for k in equal] if names else equal))
    return unit


def _some(items: Sequence[Any], most: int = 5) -> str:
    return ", ".join(map(str, items[:most])) + (f" and {len(items) - most} more" if len(items) > most else "")
