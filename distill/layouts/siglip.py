"""SigLIP and SigLIP 2's image tower as Hugging Face's transformers stores it: of fixed size, and NaFlex."""

from typing import Any

from distill.layouts.huggingface import GELUS, STANDARD, activation, root
from distill.layouts.tables import CONVOLUTION, TRANSPOSE, Layout, Published, Rule, Table
from vit22b.model_config import ModelConfig

NEEDS: dict[str, tuple] = {**STANDARD, "position": ("learned",), "mlp": ("gelu", "gelu_tanh"), "mlp_sub_norm": (False,)}
NEEDS |= {"layer_scale": (0.0,), "class_token": (False,), "num_registers": (0,), "pool": ("map",), "qkv_bias": (True,)}
NEEDS |= {"proj_bias": (True,), "mlp_bias": (True,), "final_norm": ("tokens",), "num_classes": (1,)}
DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "patch_size": 16,
    "image_size": 224,
    "num_patches": 256,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu_pytorch_tanh",
}
OTHERS = ("text_model.", "logit_scale", "logit_bias")


def rules(patches: str, config: ModelConfig, published: Published | None) -> list[Rule]:
    table, d, f = Table(config, published), config.width, config.mlp_dim
    at = root(published, "", "vision_model.")
    table.add(at + "embeddings.patch_embedding.weight", "patch_kernel", patches)
    table.add(at + "embeddings.patch_embedding.bias", "patch_bias")
    table.add(at + "embeddings.position_embedding.weight", "position")
    block = at + "encoder.layers.{}."
    table.norm(block + "layer_norm1", "blocks/norm", d)
    for theirs, part in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "out")):
        ours = f"blocks/attention/{part}"
        table.linear(f"{block}self_attn.{theirs}", ours, True, d)
    table.norm(block + "layer_norm2", "blocks/mlp_norm", d)
    table.linear(block + "mlp.fc1", "blocks/mlp/up", True, f)
    table.linear(block + "mlp.fc2", "blocks/mlp/out", True, d)
    table.norm(at + "post_layernorm", "norm", d)
    head, ours = at + "head.", "map_head/attention/"
    table.add(head + "probe", "map_head/probe", "1 t d -> t d")
    parts = ("query", "key", "value")
    table.packed(head + "attention.in_proj_weight", [(ours + part, d) for part in parts], TRANSPOSE)
    table.packed(head + "attention.in_proj_bias", [(f"{ours}{part}_bias", d) for part in parts])
    table.linear(head + "attention.out_proj", ours + "out", True, d)
    table.norm(head + "layernorm", "map_head/norm", d)
    table.linear(head + "mlp.fc1", "map_head/mlp/up", True, f)
    table.linear(head + "mlp.fc2", "map_head/mlp/out", True, d)
    table.absent("head_kernel", "head_bias")
    return table.rules


def tower(published: Published) -> dict[str, Any]:
    """The image tower's part of a description. Google's leaves out what has the library's default: that of B/16."""
    info = published.info.get("vision_config", published.info)
    return DEFAULTS | {name: value for name, value in info.items() if value is not None}


def base_config(published: Published) -> dict[str, Any]:
    info = tower(published)
    return {
        "width": info["hidden_size"],
        "depth": info["num_hidden_layers"],
        "num_heads": info["num_attention_heads"],
        "mlp_dim": info["intermediate_size"],
        "patch_size": info["patch_size"],
        "num_classes": 1,
        "norm_epsilon": info["layer_norm_eps"],
        "block": "sequential",
        "norm": "layer",
        "norm_bias": True,
        "qk_norm": "none",
        "qkv_bias": True,
        "proj_bias": True,
        "mlp": activation(info),
        "pool": "map",
    }


def description(kind: str, config: ModelConfig) -> dict[str, Any]:
    return {
        "architectures": ["SiglipVisionModel" if kind == "siglip_vision_model" else "Siglip2VisionModel"],
        "model_type": kind,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_dim,
        "patch_size": config.patch_size,
        "num_channels": 3,
        "layer_norm_eps": config.norm_epsilon,
        "hidden_act": GELUS[config.mlp],
        "vision_use_head": True,
        "dtype": "float32",
    }


FIXED = Layout(
    name="hf-siglip",
    rules=lambda config, published: rules(CONVOLUTION, config, published),
    recognises=lambda published: published.info.get("model_type") in ("siglip", "siglip_vision_model"),
    config=lambda published: (
        base_config(published) | {"image_size": tower(published)["image_size"], "position_resampling": "cubic_plain"}
    ),
    describe=lambda config: description("siglip_vision_model", config) | {"image_size": config.image_size},
    needs={**NEEDS, "position_resampling": ("cubic_plain",)},
    others=OTHERS,
)

NAFLEX = Layout(
    name="hf-siglip2-naflex",
    rules=lambda config, published: rules(TRANSPOSE, config, published),
    recognises=lambda published: published.info.get("model_type") in ("siglip2", "siglip2_vision_model"),
    config=lambda published: (
        base_config(published)
        | {"image_size": round(tower(published)["num_patches"] ** 0.5) * tower(published)["patch_size"]}
        | {"position_resampling": "linear"}
    ),
    describe=lambda config: description("siglip2_vision_model", config) | {"num_patches": config.grid**2},
    needs={**NEEDS, "position_resampling": ("linear",)},
    others=OTHERS,
)
