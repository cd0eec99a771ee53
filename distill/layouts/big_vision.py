"""big_vision's ViT, as .npz files hold it: alone, or as the image tower of SigLIP; layers apart, or stacked."""

import math
from typing import Any

from distill.layouts.tables import SAME, Layout, Published, Rule, Table
from vit22b.errors import RecipeError
from vit22b.model_config import ModelConfig

ROOTS = ("params/img/", "params/", "img/", "")


def root(published: Published | None) -> str:
    if published is None:
        return "params/"
    return next((at for at in ROOTS if at + "embedding/kernel" in published.shapes), "")


def attention(table: Table, theirs: str, ours: str, layers: str) -> None:
    """Multi-head attention. `layers`: 'l ' where theirs is stacked as ours is."""
    config = table.config
    for part in ("query", "key", "value"):
        pattern = f"{layers}d n h -> {layers}d (n h)"
        table.add(f"{theirs}{part}/kernel", f"{ours}{part}", pattern)
        bias = f"{layers}n h -> {layers}(n h)"
        table.bias(f"{theirs}{part}/bias", f"{ours}{part}_bias", config.qkv_bias, config.width, bias)
    table.add(f"{theirs}out/kernel", f"{ours}out", f"{layers}n h d -> {layers}(n h) d")
    table.bias(f"{theirs}out/bias", f"{ours}out_bias", config.proj_bias, config.width)


def mlp(table: Table, theirs: str, ours: str) -> None:
    for i, part in enumerate(("up", "out")):
        table.add(f"{theirs}Dense_{i}/kernel", f"{ours}{part}")
        table.bias(f"{theirs}Dense_{i}/bias", f"{ours}{part}_bias", True, 0)


def norm(table: Table, theirs: str, ours: str) -> None:
    table.add(f"{theirs}/scale", f"{ours}/scale")
    table.add(f"{theirs}/bias", f"{ours}/bias")


def rules(config: ModelConfig, published: Published | None) -> list[Rule]:
    table, at = Table(config, published), root(published)
    table.add(at + "embedding/kernel", "patch_kernel", "p q c d -> (p q c) d")
    table.add(at + "embedding/bias", "patch_bias")
    if config.class_token:
        table.add(at + "cls", "prefix", "1 t d -> t d")
    if config.position == "learned":
        table.positions(at + "pos_embedding", 0)
    stacked = published is not None and at + "Transformer/encoderblock/LayerNorm_0/scale" in published.shapes
    block = at + ("Transformer/encoderblock/" if stacked else "Transformer/encoderblock_{}/")
    layers = "l " if stacked else ""
    norm(table, block + "LayerNorm_0", "blocks/norm")
    attention(table, block + "MultiHeadDotProductAttention_0/", "blocks/attention/", layers)
    norm(table, block + "LayerNorm_1", "blocks/mlp_norm")
    mlp(table, block + "MlpBlock_0/", "blocks/mlp/")
    norm(table, at + "Transformer/encoder_norm", "norm")
    if config.pool == "map":
        table.add(at + "MAPHead_0/probe", "map_head/probe", "1 t d -> t d")
        attention(table, at + "MAPHead_0/MultiHeadDotProductAttention_0/", "map_head/attention/", "")
        norm(table, at + "MAPHead_0/LayerNorm_0", "map_head/norm")
        mlp(table, at + "MAPHead_0/MlpBlock_0/", "map_head/mlp/")
    if config.num_classes > 1:
        table.add(at + "head/kernel", "head_kernel", SAME)
        table.add(at + "head/bias", "head_bias")
    else:
        table.absent("head_kernel", "head_bias")
    return table.rules


def config_of(published: Published) -> dict[str, Any]:
    shapes, at = published.shapes, root(published)
    patch, _, _, width = shapes[at + "embedding/kernel"]
    stacked = at + "Transformer/encoderblock/"
    if stacked + "LayerNorm_0/scale" in shapes:
        block, depth, skip = stacked, shapes[stacked + "LayerNorm_0/scale"][0], 1
    else:
        block, skip = at + "Transformer/encoderblock_0/", 0
        depth = sum(key.endswith("/LayerNorm_0/scale") and "/encoderblock_" in key for key in shapes)
    positions = shapes.get(at + "pos_embedding")
    if positions is None:
        raise RecipeError(f"{at}pos_embedding: not there; models without learned positions cannot be read")
    side = math.isqrt(positions[1])
    return {
        "width": width,
        "depth": depth,
        "num_heads": shapes[block + "MultiHeadDotProductAttention_0/query/kernel"][1 + skip],
        "mlp_dim": shapes[block + "MlpBlock_0/Dense_0/kernel"][1 + skip],
        "image_size": side * patch,
        "patch_size": patch,
        "num_classes": shapes.get(at + "head/kernel", (0, 1))[1],
        "block": "sequential",
        "norm": "layer",
        "norm_bias": True,
        "qk_norm": "none",
        "qkv_bias": True,
        "proj_bias": True,
        "mlp": "gelu_tanh",
        "class_token": at + "cls" in shapes,
        "pool": "map" if at + "MAPHead_0/probe" in shapes else "cls" if at + "cls" in shapes else "gap",
    }


BIG_VISION = Layout(
    name="npz-big-vision",
    rules=rules,
    recognises=lambda published: root(published) + "embedding/kernel" in published.shapes,
    config=config_of,
    describe=lambda config: {},
    needs={"block": ("sequential",), "norm": ("layer",), "norm_bias": (True,), "norm_epsilon": (1e-6,)}
    | {"qk_norm": ("none",), "qkv_bias": (True,), "proj_bias": (True,), "mlp": ("gelu_tanh",), "mlp_bias": (True,)}
    | {"mlp_sub_norm": (False,), "layer_scale": (0.0,), "position": ("learned",), "num_registers": (0,)}
    | {"pool": ("map", "gap", "cls"), "final_norm": ("tokens",), "position_resampling": ("cubic",)},
    others=("params/txt/", "txt/", "params/t", "params/b", "opt/"),
)
