"""timm's VisionTransformer (ViT, DeiT III, DINOv2, SigLIP), with its own block or ViT-22B's."""

from typing import Any

from distill.layouts.tables import TRANSPOSE, Layout, Published, Rule, Shape, Table
from distill.layouts.timm import NEEDS, QKV, description, embedding, ending, fields, is_eva, packed_bias, ratio
from vit22b.model_config import ModelConfig


def qk_norms(table: Table, attention: str) -> None:
    if table.config.qk_norm == "head":
        table.norm(f"{attention}q_norm", "blocks/attention/query_norm", table.config.head_dim)
        table.norm(f"{attention}k_norm", "blocks/attention/key_norm", table.config.head_dim)


def vit_rules(config: ModelConfig, published: Published | None) -> list[Rule]:
    table, d, f, block = Table(config, published), config.width, config.mlp_dim, "blocks.{}."
    embedding(table)
    table.norm(block + "norm1", "blocks/norm", d)
    table.packed(block + "attn.qkv.weight", [(ours, d) for ours in QKV], TRANSPOSE)
    if config.qkv_bias:
        packed_bias(table, block + "attn.qkv.bias", [(ours, d) for ours in QKV], True)
    qk_norms(table, block + "attn.")
    out = "blocks/attention/out"
    table.linear(block + "attn.proj", out, config.proj_bias, d)
    table.norm(block + "norm2", "blocks/mlp_norm", d)
    if config.mlp == "swiglu":
        parts = [("blocks/mlp/gate", f), ("blocks/mlp/up", f)]
        table.packed(block + "mlp.fc1.weight", parts, TRANSPOSE)
        packed_bias(table, block + "mlp.fc1.bias", parts, config.mlp_bias)
    else:
        table.linear(block + "mlp.fc1", "blocks/mlp/up", config.mlp_bias, f)
    table.linear(block + "mlp.fc2", "blocks/mlp/out", config.mlp_bias, d)
    if config.layer_scale:
        table.add(block + "ls1.gamma", "blocks/attention/scale")
        table.add(block + "ls2.gamma", "blocks/mlp/scale")
    ending(table)
    return table.rules


def parallel_rules(config: ModelConfig, published: Published | None) -> list[Rule]:
    table, d, f, block = Table(config, published), config.width, config.mlp_dim, "blocks.{}."
    embedding(table)
    table.norm(block + "in_norm", "blocks/norm", d)
    parts = [("blocks/mlp/up", f), *((ours, d) for ours in QKV)]
    table.packed(block + "in_proj.weight", parts, TRANSPOSE)
    if config.qkv_bias:  # in one vector with the MLP's, which otherwise stands alone
        table.packed(block + "in_proj.bias", [(f"{ours}_bias", size) for ours, size in parts])
    else:
        table.bias(block + "mlp_bias", "blocks/mlp/up_bias", config.mlp_bias, f)
    qk_norms(table, block)
    out = "blocks/attention/out"
    table.linear(block + "attn_out_proj", out, config.proj_bias, d)
    table.linear(block + "mlp_out_proj", "blocks/mlp/out", config.mlp_bias, d)
    ending(table)
    return table.rules


def vit_config(published: Published) -> dict[str, Any]:
    shapes, known = published.shapes, fields(published)
    hidden, out = shapes["blocks.0.mlp.fc1.weight"][0], shapes["blocks.0.mlp.fc2.weight"][1]
    return known | {
        "block": "sequential",
        "mlp_dim": out,
        "mlp": "swiglu" if hidden == 2 * out else known["mlp"],
        "mlp_bias": "blocks.0.mlp.fc1.bias" in shapes,
        "qk_norm": "head" if "blocks.0.attn.q_norm.weight" in shapes else "none",
        "qkv_bias": "blocks.0.attn.qkv.bias" in shapes,
        "proj_bias": "blocks.0.attn.proj.bias" in shapes,
        "position": "learned" if "pos_embed" in shapes else "none",
    }


def parallel_config(published: Published) -> dict[str, Any]:
    shapes, known = published.shapes, fields(published)
    norm: Shape = shapes.get("blocks.0.q_norm.weight", ())
    return (
        known
        | {
            "block": "parallel",
            "mlp_dim": shapes["blocks.0.in_proj.weight"][0] - 3 * known["width"],
            "mlp_bias": True,
            "qk_norm": "head" if norm else "none",
            "qkv_bias": "blocks.0.in_proj.bias" in shapes,
            "proj_bias": "blocks.0.attn_out_proj.bias" in shapes,
            "position": "learned" if "pos_embed" in shapes else "none",
        }
        | ({"num_heads": known["width"] // norm[0]} if norm else {})
    )


def vit_description(config: ModelConfig) -> dict[str, Any]:
    """Of both blocks. Their linear layers outside the in-projection all have biases, ours or zeros."""
    packed = 2 if config.mlp == "swiglu" else 1
    extra: dict[str, Any] = {
        "mlp_ratio": ratio(config, packed),
        "qk_norm": config.qk_norm == "head",
        "reg_tokens": config.num_registers,
        "pos_embed": "learn" if config.position == "learned" else "none",
        "final_norm": config.final_norm != "none",
        "fc_norm": config.final_norm == "pooled",
    } | ({"init_values": config.layer_scale} if config.layer_scale else {})
    classes: dict[str, Any] = {}
    if config.mlp == "swiglu":
        classes = {"mlp_layer": ["timm.layers.SwiGLUPacked", {}], "act_layer": ["torch.nn.SiLU", {}]}
    else:
        extra["act_layer"] = config.mlp
    if config.block == "parallel":
        classes["block_fn"] = ["timm.models.vision_transformer.ParallelScalingBlock", {}]
    return description(config, "timm.models.vision_transformer.VisionTransformer", extra, classes)


VIT = Layout(
    name="timm-vit",
    rules=vit_rules,
    recognises=lambda published: "blocks.0.attn.qkv.weight" in published.shapes and not is_eva(published),
    config=vit_config,
    describe=vit_description,
    needs={**NEEDS, "block": ("sequential",), "qk_norm": ("none", "head")},
    others=("mask_token",),
)
PARALLEL = Layout(
    name="timm-parallel",
    rules=parallel_rules,
    recognises=lambda published: "blocks.0.in_proj.weight" in published.shapes,
    config=parallel_config,
    describe=vit_description,
    needs={**NEEDS, "block": ("parallel",), "qk_norm": ("none", "head"), "mlp": ("gelu", "gelu_tanh")}
    | {"layer_scale": (0.0,), "mlp_bias": (True,)},
)
