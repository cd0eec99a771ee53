"""ViT, DINOv2 (with registers) and DINOv3 as Hugging Face's transformers stores them."""

from typing import Any

from distill.layouts.tables import CONVOLUTION, TRANSPOSE, Layout, Published, Rule, Table
from vit22b.errors import RecipeError
from vit22b.model_config import ModelConfig

STANDARD: dict[str, tuple] = {"block": ("sequential",), "norm": ("layer",), "qk_norm": ("none",), "rope_grid": (0,)}
LEARNED: dict[str, tuple] = {**STANDARD, "position": ("learned",), "position_resampling": ("cubic_plain",)}
ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
GELUS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def root(published: Published | None, written: str, *roots: str) -> str:
    """What their names begin with: '' for a bare backbone, 'vit.' below a classifier. `written`: of what is written."""
    if published is None:
        return written
    return next((r for r in roots if any(name.startswith(r) for name in published.shapes)), "")


def side(value: int | list[int], name: str) -> int:
    """One side of a square that a description may give as two numbers."""
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) != 1:
        raise RecipeError(f"{name}={value}: only squares can be read")
    return sides.pop()


def activation(info: dict[str, Any]) -> str:
    if info["hidden_act"] not in ACTIVATIONS:
        raise RecipeError(f"hidden_act={info['hidden_act']!r}: choose one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[info["hidden_act"]]


def common(published: Published) -> dict[str, Any]:
    """The fields that these families describe alike."""
    info = published.info
    return {
        "width": info["hidden_size"],
        "depth": info["num_hidden_layers"],
        "num_heads": info["num_attention_heads"],
        "image_size": side(info["image_size"], "image_size"),
        "patch_size": side(info["patch_size"], "patch_size"),
        "num_classes": num_classes(published),
        "norm_epsilon": info["layer_norm_eps"],
        "block": "sequential",
        "norm": "layer",
        "norm_bias": True,
        "qk_norm": "none",
        "proj_bias": True,
        "position_resampling": "cubic_plain",
    }


def num_classes(published: Published) -> int:
    return published.shapes.get("classifier.weight", (1,))[0]


def described(config: ModelConfig, model: str, classifier: str, kind: str) -> dict[str, Any]:
    """The fields that all these families describe alike, to be written. `kind`: 'model_type'."""
    labels = {str(i): f"LABEL_{i}" for i in range(config.num_classes)} if config.num_classes > 1 else {}
    return {
        "architectures": [classifier if labels else model],
        "model_type": kind,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "layer_norm_eps": config.norm_epsilon,
        "dtype": "float32",
    } | ({"id2label": labels, "label2id": {name: int(i) for i, name in labels.items()}} if labels else {})


def vit_rules(config: ModelConfig, published: Published | None) -> list[Rule]:
    table, d, f = Table(config, published), config.width, config.mlp_dim
    at = root(published, "vit." if config.num_classes > 1 else "", "vit.")
    embed_and_norm(table, at, "layernorm")
    block = at + "encoder.layer.{}."
    table.norm(block + "layernorm_before", "blocks/norm", d)
    attention(table, block, config.qkv_bias)
    table.norm(block + "layernorm_after", "blocks/mlp_norm", d)
    table.linear(block + "intermediate.dense", "blocks/mlp/up", config.mlp_bias, f)
    table.linear(block + "output.dense", "blocks/mlp/out", config.mlp_bias, d)
    table.classifier("classifier")
    return table.rules


def embed_and_norm(table: Table, at: str, norm: str) -> None:
    """Everything outside the blocks that ViT and DINOv2 name alike. Registers have no positions."""
    table.add(at + "embeddings.patch_embeddings.projection.weight", "patch_kernel", CONVOLUTION)
    table.add(at + "embeddings.patch_embeddings.projection.bias", "patch_bias")
    table.class_token(at + "embeddings.cls_token", at + "embeddings.register_tokens")
    table.positions(at + "embeddings.position_embeddings", 1)
    table.norm(at + norm, "norm", table.config.width)


def attention(table: Table, block: str, qkv_bias: bool) -> None:
    """Attention as ViT and DINOv2 name it in published files."""
    config = table.config
    for part in ("query", "key", "value"):
        ours = f"blocks/attention/{part}"
        table.projection(f"{block}attention.attention.{part}", ours, qkv_bias)
    out = f"{block}attention.output.dense"
    table.linear(out, "blocks/attention/out", config.proj_bias, config.width)


def vit_config(published: Published) -> dict[str, Any]:
    return common(published) | {
        "mlp_dim": published.info["intermediate_size"],
        "mlp": activation(published.info),
        "qkv_bias": published.info["qkv_bias"],
        "class_token": True,
        "pool": "cls",
    }


VIT = Layout(
    name="hf-vit",
    rules=vit_rules,
    recognises=lambda published: published.info.get("model_type") == "vit",
    config=vit_config,
    describe=lambda config: (
        described(config, "ViTModel", "ViTForImageClassification", "vit")
        | {"intermediate_size": config.mlp_dim, "hidden_act": GELUS[config.mlp], "qkv_bias": config.qkv_bias}
    ),
    needs={**LEARNED, "mlp": ("gelu", "gelu_tanh"), "mlp_sub_norm": (False,), "layer_scale": (0.0,), "pool": ("cls",)}
    | {"class_token": (True,), "num_registers": (0,), "final_norm": ("tokens",)},
    others=("vit.pooler.", "pooler."),
)


def dinov2_rules(config: ModelConfig, published: Published | None) -> list[Rule]:
    table, d, f = Table(config, published), config.width, config.mlp_dim
    family = "dinov2_with_registers." if config.num_registers else "dinov2."
    at = root(published, family if config.num_classes > 1 else "", "dinov2_with_registers.", "dinov2.")
    embed_and_norm(table, at, "layernorm")
    table.ignored(at + "embeddings.mask_token", (1, d))
    block = at + "encoder.layer.{}."
    table.norm(block + "norm1", "blocks/norm", d)
    attention(table, block, config.qkv_bias)
    table.add(block + "layer_scale1.lambda1", "blocks/attention/scale")
    table.norm(block + "norm2", "blocks/mlp_norm", d)
    if config.mlp == "swiglu":
        table.packed(block + "mlp.weights_in.weight", [("blocks/mlp/gate", f), ("blocks/mlp/up", f)], TRANSPOSE)
        table.packed(block + "mlp.weights_in.bias", [("blocks/mlp/gate_bias", f), ("blocks/mlp/up_bias", f)])
        table.linear(block + "mlp.weights_out", "blocks/mlp/out", True, d)
    else:
        table.linear(block + "mlp.fc1", "blocks/mlp/up", True, f)
        table.linear(block + "mlp.fc2", "blocks/mlp/out", True, d)
    table.add(block + "layer_scale2.lambda1", "blocks/mlp/scale")
    table.classifier("classifier")
    return table.rules


def swiglu_hidden(hidden: int) -> int:
    """DINOv2's width of SwiGLU in place of an MLP that wide."""
    return (int(hidden * 2 / 3) + 7) // 8 * 8


def dinov2_config(published: Published) -> dict[str, Any]:
    info, gated = published.info, published.info["use_swiglu_ffn"]
    hidden = int(info["hidden_size"] * info["mlp_ratio"])
    return common(published) | {
        "mlp_dim": swiglu_hidden(hidden) if gated else hidden,
        "mlp": "swiglu" if gated else activation(info),
        "qkv_bias": info["qkv_bias"],
        "layer_scale": info["layerscale_value"],
        "class_token": True,
        "num_registers": info.get("num_register_tokens", 0),  # DINOv2 without registers does not name them
        "position_resampling": "cubic" if "num_register_tokens" in info else "cubic_plain",
        "pool": "cls_gap" if num_classes(published) > 1 else "cls",
    }


def dinov2_description(config: ModelConfig) -> dict[str, Any]:
    name, kind = "Dinov2", "dinov2"
    resampling = "cubic" if config.num_registers else "cubic_plain"
    if config.position_resampling != resampling:
        raise RecipeError(f"model.position_resampling={config.position_resampling!r}: {kind}'s is {resampling!r}")
    if config.num_classes > 1 and config.pool != "cls_gap":
        raise RecipeError(f"model.pool={config.pool!r}: {kind}'s classifier reads class token and mean, 'cls_gap'")
    if config.num_registers:
        name, kind = "Dinov2WithRegisters", "dinov2_with_registers"
    hidden = swiglu_hidden if config.mlp == "swiglu" else int
    ratio = next((n for n in range(1, 33) if hidden(n * config.width) == config.mlp_dim), None)
    if ratio is None:  # transformers takes whole numbers alone
        raise RecipeError(f"model.mlp_dim={config.mlp_dim}: no whole mlp_ratio of DINOv2's gives it")
    return (
        described(config, f"{name}Model", f"{name}ForImageClassification", kind)
        | {"mlp_ratio": ratio, "use_swiglu_ffn": config.mlp == "swiglu", "qkv_bias": config.qkv_bias}
        | {"hidden_act": GELUS.get(config.mlp, "gelu"), "layerscale_value": config.layer_scale}
        | ({"num_register_tokens": config.num_registers} if config.num_registers else {})
    )


DINOV2 = Layout(
    name="hf-dinov2",
    rules=dinov2_rules,
    recognises=lambda published: published.info.get("model_type") in ("dinov2", "dinov2_with_registers"),
    config=dinov2_config,
    describe=dinov2_description,
    needs={**LEARNED, "position_resampling": ("cubic_plain", "cubic"), "mlp_sub_norm": (False,), "mlp_bias": (True,)}
    | {"class_token": (True,), "pool": ("cls", "cls_gap"), "final_norm": ("tokens",)},
)


def dinov3_rules(config: ModelConfig, published: Published | None) -> list[Rule]:
    table, d = Table(config, published), config.width
    table.add("embeddings.patch_embeddings.weight", "patch_kernel", CONVOLUTION)
    table.add("embeddings.patch_embeddings.bias", "patch_bias")
    table.class_token("embeddings.cls_token", "embeddings.register_tokens")
    table.ignored("embeddings.mask_token", (1, 1, d))
    table.norm("norm", "norm", d)
    block = "layer.{}."
    table.norm(block + "norm1", "blocks/norm", d)
    for letter, part in (("q", "query"), ("k", "key"), ("v", "value")):
        ours = f"blocks/attention/{part}"
        # Keys have no bias in what Meta published.
        table.projection(f"{block}attention.{letter}_proj", ours, config.qkv_bias, optional=True)
    out = f"{block}attention.o_proj"
    table.projection(out, "blocks/attention/out", config.proj_bias)
    table.add(block + "layer_scale1.lambda1", "blocks/attention/scale")
    table.norm(block + "norm2", "blocks/mlp_norm", d)
    gated = [("gate", "gate")] if config.mlp == "swiglu" else []
    for theirs, part in [*gated, ("up", "up"), ("down", "out")]:
        table.projection(f"{block}mlp.{theirs}_proj", f"blocks/mlp/{part}", config.mlp_bias)
    table.add(block + "layer_scale2.lambda1", "blocks/mlp/scale")
    table.absent("head_kernel", "head_bias")
    return table.rules


def dinov3_config(published: Published) -> dict[str, Any]:
    info = published.info
    if info["use_gated_mlp"] and info["hidden_act"] != "silu":
        raise RecipeError(f"hidden_act={info['hidden_act']!r}: a gated MLP needs 'silu'")
    return common(published) | {
        "mlp_dim": info["intermediate_size"],
        "mlp": "swiglu" if info["use_gated_mlp"] else activation(info),
        "mlp_bias": info["mlp_bias"],
        "qkv_bias": info["query_bias"] or info["key_bias"] or info["value_bias"],
        "proj_bias": info["proj_bias"],
        "layer_scale": info["layerscale_value"],
        "position": "rope",
        "position_resampling": "cubic",
        "rope_base": info["rope_theta"],
        "class_token": True,
        "num_registers": info["num_register_tokens"],
        "pool": "cls",
    }


def dinov3_description(config: ModelConfig) -> dict[str, Any]:
    biases = dict.fromkeys(("query_bias", "key_bias", "value_bias"), config.qkv_bias)
    return (
        described(config, "DINOv3ViTModel", "", "dinov3_vit")
        | biases
        | {"intermediate_size": config.mlp_dim, "use_gated_mlp": config.mlp == "swiglu", "mlp_bias": config.mlp_bias}
        | {"hidden_act": GELUS.get(config.mlp, "silu"), "proj_bias": config.proj_bias, "rope_theta": config.rope_base}
        | {"layerscale_value": config.layer_scale, "num_register_tokens": config.num_registers}
    )


DINOV3 = Layout(
    name="hf-dinov3",
    rules=dinov3_rules,
    recognises=lambda published: published.info.get("model_type") == "dinov3_vit",
    config=dinov3_config,
    describe=dinov3_description,
    needs={**STANDARD, "position": ("rope",), "mlp_sub_norm": (False,), "class_token": (True,), "pool": ("cls",)}
    | {"final_norm": ("tokens",), "num_classes": (1,)},
)
