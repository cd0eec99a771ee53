"""InternViT, with queries and keys normed over the full width: transformers' InternVLVisionModel, and OpenGVLab's own.

OpenGVLab publishes the image tower alone with its own code and names (`intern_vit_6b`), and within InternVL models.
"""

from typing import Any

from distill.layouts.huggingface import GELUS, STANDARD, activation, described, root, side
from distill.layouts.tables import CONVOLUTION, TRANSPOSE, Layout, Published, Rule, Table
from vit22b.errors import RecipeError
from vit22b.model_config import ModelConfig

NEEDS: dict[str, tuple] = {**STANDARD, "norm": ("rms", "layer"), "qk_norm": ("none", "width"), "position": ("learned",)}
NEEDS |= {"position_resampling": ("cubic_plain",), "mlp": ("gelu", "gelu_tanh"), "mlp_sub_norm": (False,)}
NEEDS |= {"mlp_bias": (True,), "proj_bias": (True,), "class_token": (True,), "num_registers": (0,), "pool": ("cls",)}
NEEDS |= {"final_norm": ("none",), "num_classes": (1,)}
QK_EPSILON = 1e-6  # of transformers' norms of queries and keys, whatever that of the others


def block_rules(table: Table, block: str, names: dict[str, str]) -> None:
    """What the two layouts share but for `names`: their name of each part."""
    d, f = table.config.width, table.config.mlp_dim
    table.norm(block + names["norm"], "blocks/norm", d)
    table.norm(block + names["mlp_norm"], "blocks/mlp_norm", d)
    attention = block + names["attention"]
    if table.config.qk_norm == "width":
        table.add(f"{attention}.q_norm.weight", "blocks/attention/query_norm/scale")
        table.add(f"{attention}.k_norm.weight", "blocks/attention/key_norm/scale")
    table.linear(f"{attention}.{names['out']}", "blocks/attention/out", True, d)
    table.add(block + names["scale"], "blocks/attention/scale")
    table.linear(block + "mlp.fc1", "blocks/mlp/up", True, f)
    table.linear(block + "mlp.fc2", "blocks/mlp/out", True, d)
    table.add(block + names["mlp_scale"], "blocks/mlp/scale")
    table.absent("head_kernel", "head_bias")


def transformers_rules(config: ModelConfig, published: Published | None) -> list[Rule]:
    table = Table(config, published)
    at = root(published, "", "model.vision_tower.", "vision_tower.")
    table.add(at + "embeddings.patch_embeddings.projection.weight", "patch_kernel", CONVOLUTION)
    table.add(at + "embeddings.patch_embeddings.projection.bias", "patch_bias")
    table.class_token(at + "embeddings.cls_token", "")
    table.positions(at + "embeddings.position_embeddings", 1)
    block = at + "encoder.layer.{}."
    for letter, part in (("q", "query"), ("k", "key"), ("v", "value")):
        ours = f"blocks/attention/{part}"
        table.projection(f"{block}attention.{letter}_proj", ours, config.qkv_bias)
    names = {"norm": "layernorm_before", "mlp_norm": "layernorm_after", "attention": "attention"}
    names |= {"out": "projection_layer", "scale": "lambda_1", "mlp_scale": "lambda_2"}
    block_rules(table, block, names)
    return table.rules


def own_rules(config: ModelConfig, published: Published | None) -> list[Rule]:
    table, d = Table(config, published), config.width
    at = root(published, "", "vision_model.")
    table.add(at + "embeddings.patch_embedding.weight", "patch_kernel", CONVOLUTION)
    table.add(at + "embeddings.patch_embedding.bias", "patch_bias")
    table.class_token(at + "embeddings.class_embedding", "")
    table.positions(at + "embeddings.position_embedding", 1)
    block, parts = at + "encoder.layers.{}.", ("query", "key", "value")
    table.packed(block + "attn.qkv.weight", [(f"blocks/attention/{part}", d) for part in parts], TRANSPOSE)
    if config.qkv_bias:
        table.packed(block + "attn.qkv.bias", [(f"blocks/attention/{part}_bias", d) for part in parts])
    names = {"norm": "norm1", "mlp_norm": "norm2", "attention": "attn", "out": "proj", "scale": "ls1"}
    block_rules(table, block, names | {"mlp_scale": "ls2"})
    return table.rules


def fields(info: dict[str, Any], norm: str, qk_norm: bool, qkv_bias: bool) -> dict[str, Any]:
    return {
        "width": info["hidden_size"],
        "depth": info["num_hidden_layers"],
        "num_heads": info["num_attention_heads"],
        "mlp_dim": info["intermediate_size"],
        "image_size": side(info["image_size"], "image_size"),
        "patch_size": side(info["patch_size"], "patch_size"),
        "num_classes": 1,
        "norm_epsilon": info["layer_norm_eps"],
        "block": "sequential",
        "norm": "rms" if norm == "rms_norm" else "layer",
        "norm_bias": norm != "rms_norm",
        "qk_norm": "width" if qk_norm else "none",
        "qkv_bias": qkv_bias,
        "proj_bias": True,
        "mlp": activation(info),
        "position_resampling": "cubic_plain",
        "class_token": True,
        "pool": "cls",
        "final_norm": "none",
    }


def transformers_config(published: Published) -> dict[str, Any]:
    info = published.info.get("vision_config", published.info)
    if not info["use_mean_pooling"]:
        raise RecipeError("use_mean_pooling=false: a final norm of another kind than the blocks' cannot be read")
    if info["use_qk_norm"] and info["layer_norm_eps"] != QK_EPSILON:
        raise RecipeError(f"layer_norm_eps={info['layer_norm_eps']}: queries and keys are normed with {QK_EPSILON}")
    scale = {"layer_scale": info["layer_scale_init_value"]}
    return fields(info, info["norm_type"], info["use_qk_norm"], info["attention_bias"]) | scale


def own_config(published: Published) -> dict[str, Any]:
    info = published.info.get("vision_config", published.info)
    norm = info.get("norm_type", "rms_norm")  # the 6B's first description has no other
    return fields(info, norm, info["qk_normalization"], info["qkv_bias"]) | {"layer_scale": info["initializer_factor"]}


def check_qk_norm(config: ModelConfig) -> None:
    biased = config.qk_norm == "width" and (config.norm != "rms" or config.norm_bias)
    if biased or (config.qk_norm == "width" and config.norm_epsilon != QK_EPSILON):
        raise RecipeError(f"model.qk_norm='width': InternViT's is an RMSNorm without bias, epsilon {QK_EPSILON}")


def transformers_description(config: ModelConfig) -> dict[str, Any]:
    check_qk_norm(config)
    return described(config, "InternVLVisionModel", "", "internvl_vision") | {
        "intermediate_size": config.mlp_dim,
        "image_size": [config.image_size] * 2,
        "patch_size": [config.patch_size] * 2,
        "hidden_act": GELUS[config.mlp],
        "attention_bias": config.qkv_bias,
        "use_qk_norm": config.qk_norm == "width",
        "norm_type": "rms_norm" if config.norm == "rms" else "layer_norm",
        "layer_scale_init_value": config.layer_scale,
        "use_mean_pooling": True,
    }


def own_description(config: ModelConfig) -> dict[str, Any]:
    check_qk_norm(config)
    return described(config, "InternVisionModel", "", "intern_vit_6b") | {
        "intermediate_size": config.mlp_dim,
        "hidden_act": GELUS[config.mlp],
        "qkv_bias": config.qkv_bias,
        "qk_normalization": config.qk_norm == "width",
        "norm_type": "rms_norm" if config.norm == "rms" else "layer_norm",
        "initializer_factor": config.layer_scale,
    }


def kind(published: Published) -> str:
    info = published.info
    return str(info.get("vision_config", info).get("model_type"))


TRANSFORMERS = Layout(
    name="hf-internvl-vision",
    rules=transformers_rules,
    recognises=lambda published: kind(published) == "internvl_vision",
    config=transformers_config,
    describe=transformers_description,
    needs=NEEDS,
    others=("model.language_model.", "model.multi_modal_projector.", "language_model.", "multi_modal_projector."),
)

OWN = Layout(
    name="hf-internvit",
    rules=own_rules,
    recognises=lambda published: kind(published) == "intern_vit_6b",
    config=own_config,
    describe=own_description,
    needs=NEEDS,
    others=("language_model.", "mlp1."),
)
