"""timm's VisionTransformer (ViT, DeiT III, DINOv2, SigLIP), with its block or ViT-22B's, and its Eva (EVA-02, DINOv3).

A description holds 'class', 'model_args', its arguments, and 'classes': those whose value is a class again, by name and
with arguments of its own. It is built by

    def named(path): module, _, name = path.rpartition("."); return getattr(importlib.import_module(module), name)
    classes = {key: functools.partial(named(path), **args) for key, (path, args) in description["classes"].items()}
    model = named(description["class"])(**description["model_args"], **classes)
    model.load_state_dict(safetensors.torch.load_file(FILE))
"""

import math
from typing import Any

from distill.layouts.tables import CONVOLUTION, SAME, TRANSPOSE, Layout, Published, Rule, Shape, Table
from vit22b.config import ModelConfig

POOLS = {"gap": "avg", "cls": "token", "map": "map"}
# Heads by the size in an architecture's name, as 'vit_base_patch16_224'; they show in no tensor's shape.
HEADS = {"tiny": 3, "small": 6, "base": 12, "large": 16, "so400m": 16, "huge": 16, "gigantic": 16, "giantopt": 16}
INTERLEAVED = "(n h two) i -> i (n two h)"  # EVA-02 turns neighbours among a head's dims, we the two halves
PATTERN = {True: INTERLEAVED, False: TRANSPOSE}
SIDE = {True: "(n h two) -> (n two h)", False: SAME}


def embedding(table: Table) -> None:
    """Patches, prefix and positions. Written, positions are those of patches alone ('no_embed_class')."""
    config, published = table.config, table.published
    table.add("patch_embed.proj.weight", "patch_kernel", CONVOLUTION)
    table.bias("patch_embed.proj.bias", "patch_bias", True, config.width)
    table.class_token("cls_token", "reg_token")
    if config.learns_positions:
        table.positions("pos_embed", 0 if published is None else published.shapes["pos_embed"][1] - config.grid**2)


def final_norm(table: Table) -> None:
    if table.config.final_norm != "none":
        table.norm("norm" if table.config.final_norm == "tokens" else "fc_norm", "norm", table.config.width)


def map_head(table: Table) -> None:
    config = table.config
    d, f, ours = config.width, config.mlp_dim, "map_head/attention/"
    table.add("attn_pool.latent", "map_head/probe", "1 t d -> t d")
    table.linear("attn_pool.q", ours + "query", config.qkv_bias, d)
    table.packed("attn_pool.kv.weight", [(ours + "key", d), (ours + "value", d)], TRANSPOSE)
    packed_bias(table, "attn_pool.kv.bias", [(ours + "key", d), (ours + "value", d)], config.qkv_bias)
    table.linear("attn_pool.proj", ours + "out", config.proj_bias, d)
    table.norm("attn_pool.norm", "map_head/norm", d)
    table.linear("attn_pool.mlp.fc1", "map_head/mlp/up", config.mlp_bias, f)
    table.linear("attn_pool.mlp.fc2", "map_head/mlp/out", config.mlp_bias, d)


def packed_bias(table: Table, theirs: str, parts: list[tuple[str, int]], has: bool) -> None:
    """The bias of several layers of ours, '_bias' behind each name; zero where we have none."""
    if has:
        table.packed(theirs, [(f"{ours}_bias", size) for ours, size in parts])
    else:
        table.bias(theirs, "", False, sum(size for _, size in parts))


QKV = ("blocks/attention/query", "blocks/attention/key", "blocks/attention/value")


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


def ending(table: Table) -> None:
    final_norm(table)
    if table.config.pool == "map":
        map_head(table)
    table.classifier("head")


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


def arguments(info: dict[str, Any]) -> dict[str, Any]:
    return dict(info.get("model_args") or {})


def heads(published: Published, width: int) -> dict[str, int]:
    """The number of heads, where a description or an architecture's name tells it."""
    info, args = published.info, arguments(published.info)
    if "num_heads" in args:
        return {"num_heads": args["num_heads"]}
    if "blocks.0.attn.q_norm.weight" in published.shapes:
        return {"num_heads": width // published.shapes["blocks.0.attn.q_norm.weight"][0]}
    name = info.get("architecture", "")
    for size, count in HEADS.items():
        if f"_{size}_" in name and "dinov3" not in name:
            return {"num_heads": count}
    if "_giant_" in name:
        return {"num_heads": 24 if "dinov2" in name else 16}
    dinov3 = {"small": 6, "small_plus": 6, "base": 12, "large": 16, "huge_plus": 20, "7b": 32}
    return next(({"num_heads": n} for size, n in dinov3.items() if f"vit_{size}_patch16_dinov3" in name), {})


def fields(published: Published) -> dict[str, Any]:
    """What the tensors' names and shapes tell of every model of timm's."""
    shapes, args, name = published.shapes, arguments(published.info), published.info.get("architecture", "")
    width, _, patch, _ = shapes["patch_embed.proj.weight"]
    prefix = int("cls_token" in shapes)
    registers = shapes.get("reg_token", (1, 0))[1]
    known: dict[str, Any] = {
        "width": width,
        "depth": 1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("blocks.")),
        "patch_size": patch,
        "num_classes": shapes.get("head.weight", (1,))[0],
        "class_token": bool(prefix),
        "num_registers": registers,
        "norm": "layer" if any(key.endswith(("norm1.bias", "in_norm.bias")) for key in shapes) else "rms",
        "norm_epsilon": 1e-5 if "dinov3" in name else 1e-6,
        "position_resampling": "cubic",
        "layer_scale": 1e-5 if {"blocks.0.ls1.gamma", "blocks.0.gamma_1"} & set(shapes) else 0.0,
        "mlp_sub_norm": "blocks.0.mlp.norm.weight" in shapes,
        **heads(published, width),
        **image_size(published, patch, prefix + registers),
    }
    known["norm_bias"] = known["norm"] == "layer"
    pool = published.info.get("global_pool") or args.get("global_pool")
    pools = {theirs: ours for ours, theirs in POOLS.items()}
    if "attn_pool.latent" in shapes:
        known["pool"] = "map"
    elif pool in pools:
        known["pool"] = pools[pool]
    else:
        known["pool"] = "cls" if prefix and "fc_norm.weight" not in shapes else "gap"
    known["final_norm"] = "tokens" if "norm.weight" in shapes else "pooled" if "fc_norm.weight" in shapes else "none"
    known["mlp"] = "gelu_tanh" if args.get("act_layer") == "gelu_tanh" or tanh(name) else "gelu"
    return known


def tanh(name: str) -> bool:
    """Whether the architecture of that name has the approximate GELU: SigLIP's, but for its first sizes in timm."""
    exact = ("base_patch16_siglip", "large_patch16_siglip_256", "large_patch16_siglip_384", "so400m_patch14_siglip")
    return "siglip" in name and not any(part in name for part in exact)


def image_size(published: Published, patch: int, num_prefix: int) -> dict[str, int]:
    """From the number of positions, or without any from the description."""
    args, cfg = arguments(published.info), published.info.get("pretrained_cfg") or {}
    if "pos_embed" in published.shapes:
        for count in (published.shapes["pos_embed"][1], published.shapes["pos_embed"][1] - num_prefix):
            if math.isqrt(count) ** 2 == count:
                return {"image_size": math.isqrt(count) * patch}
    if "img_size" in args:
        return {"image_size": args["img_size"]}
    return {"image_size": cfg["input_size"][1]} if "input_size" in cfg else {}


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


def description(config: ModelConfig, kind: str, extra: dict[str, Any], classes: dict[str, Any]) -> dict[str, Any]:
    norm = "timm.layers.RmsNorm" if config.norm == "rms" else "timm.layers.LayerNorm"
    return {
        "class": kind,
        "model_args": {
            "img_size": config.image_size,
            "patch_size": config.patch_size,
            "num_classes": config.num_classes if config.num_classes > 1 else 0,
            "global_pool": POOLS[config.pool],
            "embed_dim": config.width,
            "depth": config.depth,
            "num_heads": config.num_heads,
            "qkv_bias": config.qkv_bias,
            "class_token": config.class_token,
            "no_embed_class": True,
            "dynamic_img_size": True,
        }
        | extra,
        "classes": {"norm_layer": [norm, {"eps": config.norm_epsilon}], **classes},
    }


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


def ratio(config: ModelConfig, packed: int = 1) -> float:
    """An MLP ratio from which the library computes exactly our hidden width, rounding down."""
    value = packed * config.mlp_dim / config.width
    return value if int(config.width * value) == packed * config.mlp_dim else math.nextafter(value, math.inf)


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


NEEDS: dict[str, tuple] = {"mlp_sub_norm": (False,), "position": ("learned", "none"), "rope_grid": (0,)}
NEEDS |= {"position_resampling": ("cubic",), "pool": tuple(POOLS)}

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


def is_eva(published: Published) -> bool:
    """Whether queries and keys are turned: then timm has no bias of keys, or a file names rotations or DINOv3."""
    marks = {"blocks.0.attn.q_bias", "blocks.0.attn.q_proj.weight", "blocks.0.gamma_1", "rope.periods"}
    return bool(marks & set(published.shapes))


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
