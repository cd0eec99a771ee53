"""What timm's models have in common: the parts outside the blocks, descriptions, and what tensors tell.

A description holds 'class', 'model_args', its arguments, and 'classes': those whose value is a class again, by name and
with arguments of its own. It is built by

    def named(path): module, _, name = path.rpartition("."); return getattr(importlib.import_module(module), name)
    classes = {key: functools.partial(named(path), **args) for key, (path, args) in description["classes"].items()}
    model = named(description["class"])(**description["model_args"], **classes)
    model.load_state_dict(safetensors.torch.load_file(FILE))
"""

import math
import re
from typing import Any

from distill.layouts.tables import CONVOLUTION, TRANSPOSE, Published, Table
from vit22b.errors import RecipeError
from vit22b.model_config import ModelConfig

POOLS = {"gap": "avg", "cls": "token", "map": "map"}
# Heads by the size in an architecture's name, as 'vit_base_patch16_224'; they show in no tensor's shape.
HEADS = {"tiny": 3, "small": 6, "base": 12, "large": 16, "so400m": 16, "huge": 16, "giant": 16, "gigantic": 16}
HEADS |= {"giantopt": 16, "small_plus": 6, "huge_plus": 20, "7b": 32}
FAMILIES = re.compile(
    r"(?:vit|deit3|eva02)_(\w+)_patch\d+_(\d+|(?:reg4_)?dinov2|dinov3(?:_qkvb)?|siglip(?:_gap)?_\d+)$"
)
UNLIKE = re.compile(
    r"rpn|quickgelu"
)  # in names of architectures whose tensors look the same, but not what they compute


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


def ending(table: Table) -> None:
    final_norm(table)
    if table.config.pool == "map":
        map_head(table)
    table.classifier("head")


def arguments(info: dict[str, Any]) -> dict[str, Any]:
    return dict(info.get("model_args") or {})


def heads(published: Published, width: int) -> dict[str, int]:
    """The number of heads, where a description or an architecture's name tells it."""
    info, args = published.info, arguments(published.info)
    if "num_heads" in args:
        return {"num_heads": args["num_heads"]}
    if "blocks.0.attn.q_norm.weight" in published.shapes:
        return {"num_heads": width // published.shapes["blocks.0.attn.q_norm.weight"][0]}
    found = FAMILIES.match(info.get("architecture", ""))
    if not found or found[1] not in HEADS:
        return {}
    size, family = found.groups()
    return {"num_heads": 24 if (size, family[-6:]) == ("giant", "dinov2") else HEADS[size]}


def fields(published: Published) -> dict[str, Any]:
    """What the tensors' names and shapes tell of every model of timm's."""
    shapes, args, name = published.shapes, arguments(published.info), published.info.get("architecture", "")
    if UNLIKE.search(name):
        raise RecipeError(f"architecture={name!r}: has a block or an activation that we do not")
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
        "norm_epsilon": 1e-6,
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
    known["mlp"] = activation(published)
    return known


def activation(published: Published) -> str | None:
    """An MLP's; None where it must be asked for: beside attention pooling, without a name, it may be either GELU."""
    args, name = arguments(published.info), published.info.get("architecture", "")
    given = args.get("act_layer")
    if given is not None and given not in ("gelu", "gelu_tanh"):
        raise RecipeError(f"act_layer={given!r}: only 'gelu' and 'gelu_tanh' can be read")
    if given is None and not name and "attn_pool.latent" in published.shapes:
        return None
    return given or ("gelu_tanh" if has_approximate_gelu(name) else "gelu")


def has_approximate_gelu(name: str) -> bool:
    """Whether the architecture of that name does: SigLIP's do, but for its first sizes in timm."""
    exact = ("base_patch16_siglip", "large_patch16_siglip_256", "large_patch16_siglip_384", "so400m_patch14_siglip")
    return "siglip" in name and not any(part in name.replace("_gap", "") for part in exact)


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


def ratio(config: ModelConfig, packed: int = 1) -> float:
    """An MLP ratio from which the library computes exactly our hidden width, rounding down."""
    value = packed * config.mlp_dim / config.width
    return value if int(config.width * value) == packed * config.mlp_dim else math.nextafter(value, math.inf)


NEEDS: dict[str, tuple] = {"mlp_sub_norm": (False,), "position": ("learned", "none"), "rope_grid": (0,)}
NEEDS |= {"position_resampling": ("cubic",), "pool": tuple(POOLS)}


def is_eva(published: Published) -> bool:
    """Whether queries and keys are turned: then timm has no bias of keys, or a file names rotations or DINOv3."""
    marks = {"blocks.0.attn.q_bias", "blocks.0.attn.q_proj.weight", "blocks.0.gamma_1", "rope.periods"}
    return bool(marks & set(published.shapes))
