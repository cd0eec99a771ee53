"""timm's Eva: EVA-02 and DINOv3."""

from typing import Any

from distill.layouts.tables import SAME, TRANSPOSE, Layout, Published, Rule, Table
from distill.layouts.timm import QKV, arguments, description, embedding, fields, final_norm, is_eva, packed_bias, ratio
from vit22b.model_config import ModelConfig

INTERLEAVED = "(n h two) i -> i (n two h)"  # EVA-02 turns neighbours among a head's dims, we the two halves
PATTERN = {True: INTERLEAVED, False: TRANSPOSE}
SIDE = {True: "(n h two) -> (n two h)", False: SAME}


def eva_rules(config: ModelConfig, published: Published | None) -> list[Rule]:
    table, d, f, block = Table(config, published), config.width, config.mlp_dim, "blocks.{}."
    turned = bool(config.rope_grid)
    embedding(table)
    table.norm(block + "norm1", "blocks/norm", d)
    attention = block + "attn."
    fused = published is not None and table.stores(attention + "qkv.weight")
    for i, (letter, ours) in enumerate(zip("qkv", QKV, strict=True)):
        theirs, part = (
            (f"{attention}qkv.weight", (0, i * d, (i + 1) * d)) if fused else (f"{attention}{letter}_proj.weight", None)
        )
        table.add(theirs, ours, PATTERN[turned and letter != "v"], part=part)
    query, value = ("q_bias", "v_bias") if fused else ("q_proj.bias", "v_proj.bias")
    if config.qkv_bias:
        table.add(attention + query, "blocks/attention/query_bias", SIDE[turned])
        table.add(attention + value, "blocks/attention/value_bias")
        table.absent("blocks/attention/key_bias")
    out = "blocks/attention/out"
    table.linear(attention + "proj", out, config.proj_bias, d)
    table.norm(block + "norm2", "blocks/mlp_norm", d)
    if config.mlp == "swiglu" and published is not None and table.stores(block + "mlp.fc1.weight"):
        parts = [("blocks/mlp/gate", f), ("blocks/mlp/up", f)]
        table.packed(block + "mlp.fc1.weight", parts, TRANSPOSE)
        packed_bias(table, block + "mlp.fc1.bias", parts, config.mlp_bias)
    elif config.mlp == "swiglu":
        table.linear(block + "mlp.fc1_g", "blocks/mlp/gate", config.mlp_bias, f)
        table.linear(block + "mlp.fc1_x", "blocks/mlp/up", config.mlp_bias, f)
    else:
        table.linear(block + "mlp.fc1", "blocks/mlp/up", config.mlp_bias, f)
    if config.mlp_sub_norm:
        table.norm(block + "mlp.norm", "blocks/mlp/sub_norm", f)
    table.linear(block + "mlp.fc2", "blocks/mlp/out", config.mlp_bias, d)
    if config.layer_scale:
        table.add(block + "gamma_1", "blocks/attention/scale")
        table.add(block + "gamma_2", "blocks/mlp/scale")
    if published is not None and "rope.periods" in published.shapes:
        table.ignored("rope.periods", published.shapes["rope.periods"])
    final_norm(table)
    table.classifier("head")
    return table.rules


def eva_config(published: Published) -> dict[str, Any]:
    shapes, known, args = published.shapes, fields(published), arguments(published.info)
    hidden, absolute = shapes["blocks.0.mlp.fc2.weight"][1], "pos_embed" in shapes
    packed = shapes.get("blocks.0.mlp.fc1.weight", (0,))[0] == 2 * hidden
    gated = packed or "blocks.0.mlp.fc1_g.weight" in shapes
    return known | {
        "block": "sequential",
        "mlp_dim": hidden,
        "mlp": "swiglu" if gated else known["mlp"],
        "mlp_bias": "blocks.0.mlp.fc2.bias" in shapes,
        "norm_epsilon": 1e-6 if absolute else 1e-5,  # EVA-02's and DINOv3's
        "qk_norm": "none",
        "qkv_bias": bool({"blocks.0.attn.q_bias", "blocks.0.attn.q_proj.bias"} & set(shapes)),
        "proj_bias": "blocks.0.attn.proj.bias" in shapes,
        "position": "learned_rope" if absolute else "rope",
        "rope_base": float(args.get("rope_temperature", 10_000 if absolute else 100)),
        # EVA-02 was pre-trained at 224 px with patches of 14.
        "rope_grid": _one(args.get("ref_feat_shape", 16)) if absolute else 0,
        "pool": known["pool"] if "global_pool" in published.info | args else "gap",  # as timm's class has it
    }


def _one(shape: int | list[int]) -> int:
    return shape if isinstance(shape, int) else shape[0]


def eva_description(config: ModelConfig) -> dict[str, Any]:
    extra = {
        "mlp_ratio": ratio(config),
        "num_reg_tokens": config.num_registers,
        "qkv_fused": False,
        "swiglu_mlp": config.mlp == "swiglu",
        "swiglu_align_to": 1 if config.mlp == "swiglu" else 0,  # one kernel for each of the two, as we write them
        "scale_mlp": config.mlp_sub_norm,
        "use_abs_pos_emb": config.learns_positions,
        "use_rot_pos_emb": True,
        "rope_type": "cat" if config.rope_grid else "dinov3",
        "rope_temperature": config.rope_base,
        "rope_rotate_half": not config.rope_grid,
        "ref_feat_shape": config.rope_grid or None,
        "use_post_transformer_norm": config.final_norm == "tokens",
        "use_fc_norm": config.final_norm == "pooled",
        "init_values": config.layer_scale or None,
    }
    return description(config, "timm.models.eva.Eva", extra, {})


EVA = Layout(
    name="timm-eva",
    rules=eva_rules,
    recognises=is_eva,
    config=eva_config,
    describe=eva_description,
    needs={"block": ("sequential",), "qk_norm": ("none",), "position": ("rope", "learned_rope")}
    | {"position_resampling": ("cubic",), "mlp": ("gelu", "swiglu"), "pool": ("gap", "cls"), "proj_bias": (True,)}
    | {"mlp_bias": (True,), "norm": ("layer",)},
)
