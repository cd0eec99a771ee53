"""Published models of up to 7 billion parameters, by the names and shapes of their tensors alone."""

import numpy as np
import pytest

from distill import weights
from distill.layouts import LAYOUTS
from distill.layouts.tables import Published, check_tensors, their_shapes
from vit22b.errors import RecipeError

# Published config.json of models too large to build here, as far as it is read.
DINOV3_7B = {
    "model_type": "dinov3_vit", "hidden_size": 4096, "num_hidden_layers": 40, "num_attention_heads": 32,
    "intermediate_size": 8192, "image_size": 224, "patch_size": 16, "num_register_tokens": 4, "use_gated_mlp": True,
    "hidden_act": "silu", "layer_norm_eps": 1e-5, "layerscale_value": 1.0, "rope_theta": 100.0, "mlp_bias": True,
    "proj_bias": True, "query_bias": False, "key_bias": False, "value_bias": False,
}  # fmt: skip
INTERNVIT_6B = {
    "model_type": "intern_vit_6b", "hidden_size": 3200, "num_hidden_layers": 48, "num_attention_heads": 25,
    "intermediate_size": 12800, "image_size": 224, "patch_size": 14, "layer_norm_eps": 1e-6, "norm_type": "rms_norm",
    "hidden_act": "gelu", "initializer_factor": 0.1, "qk_normalization": True, "qkv_bias": False,
}  # fmt: skip
SIGLIP2_G = {
    "model_type": "siglip",
    "vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": 1536, "intermediate_size": 6144, "num_hidden_layers": 40,
        "num_attention_heads": 16, "image_size": 256, "patch_size": 16,
    },
}  # fmt: skip
EVA02_L = {"architecture": "eva02_large_patch14_448", "num_classes": 1000, "global_pool": "avg"}


def lines(text: str, depth: int, **sizes: int) -> dict[str, tuple[int, ...]]:
    """'NAME D,F' a line as names and shapes; 'i' in a name is each layer."""
    shapes: dict[str, tuple[int, ...]] = {}
    for line in text.split("\n"):
        if not line.strip():
            continue
        name, shape = line.split()
        values = tuple(sizes[s] if s in sizes else int(s) for s in shape.split(","))
        for i in range(depth) if ".i." in name else [0]:
            shapes[name.replace(".i.", f".{i}.")] = values
    return shapes


REAL = {
    "hf-dinov3": (
        DINOV3_7B,
        lines(
            """
            embeddings.cls_token 1,1,D
            embeddings.mask_token 1,1,D
            embeddings.register_tokens 1,4,D
            embeddings.patch_embeddings.weight D,3,16,16
            embeddings.patch_embeddings.bias D
            layer.i.norm1.weight D
            layer.i.norm1.bias D
            layer.i.attention.q_proj.weight D,D
            layer.i.attention.k_proj.weight D,D
            layer.i.attention.v_proj.weight D,D
            layer.i.attention.o_proj.weight D,D
            layer.i.attention.o_proj.bias D
            layer.i.layer_scale1.lambda1 D
            layer.i.norm2.weight D
            layer.i.norm2.bias D
            layer.i.mlp.gate_proj.weight F,D
            layer.i.mlp.gate_proj.bias F
            layer.i.mlp.up_proj.weight F,D
            layer.i.mlp.up_proj.bias F
            layer.i.mlp.down_proj.weight D,F
            layer.i.mlp.down_proj.bias D
            layer.i.layer_scale2.lambda1 D
            norm.weight D
            norm.bias D
            """,
            40,
            D=4096,
            F=8192,
        ),
        6716e6,  # [Simeoni 2025, table 2]
    ),
    "hf-internvit": (
        INTERNVIT_6B,
        lines(
            """
            embeddings.class_embedding 1,1,D
            embeddings.position_embedding 1,257,D
            embeddings.patch_embedding.weight D,3,14,14
            embeddings.patch_embedding.bias D
            encoder.layers.i.norm1.weight D
            encoder.layers.i.attn.qkv.weight Q,D
            encoder.layers.i.attn.q_norm.weight D
            encoder.layers.i.attn.k_norm.weight D
            encoder.layers.i.attn.proj.weight D,D
            encoder.layers.i.attn.proj.bias D
            encoder.layers.i.ls1 D
            encoder.layers.i.norm2.weight D
            encoder.layers.i.mlp.fc1.weight F,D
            encoder.layers.i.mlp.fc1.bias F
            encoder.layers.i.mlp.fc2.weight D,F
            encoder.layers.i.mlp.fc2.bias D
            encoder.layers.i.ls2 D
            """,
            48,
            D=3200,
            F=12800,
            Q=9600,
        ),
        5903e6,  # [Chen 2023, InternVL, table 1]
    ),
    "hf-siglip": (
        SIGLIP2_G,
        lines(
            """
            vision_model.embeddings.patch_embedding.weight D,3,16,16
            vision_model.embeddings.patch_embedding.bias D
            vision_model.embeddings.position_embedding.weight 256,D
            vision_model.encoder.layers.i.layer_norm1.weight D
            vision_model.encoder.layers.i.layer_norm1.bias D
            vision_model.encoder.layers.i.layer_norm2.weight D
            vision_model.encoder.layers.i.layer_norm2.bias D
            vision_model.encoder.layers.i.self_attn.q_proj.weight D,D
            vision_model.encoder.layers.i.self_attn.q_proj.bias D
            vision_model.encoder.layers.i.self_attn.k_proj.weight D,D
            vision_model.encoder.layers.i.self_attn.k_proj.bias D
            vision_model.encoder.layers.i.self_attn.v_proj.weight D,D
            vision_model.encoder.layers.i.self_attn.v_proj.bias D
            vision_model.encoder.layers.i.self_attn.out_proj.weight D,D
            vision_model.encoder.layers.i.self_attn.out_proj.bias D
            vision_model.encoder.layers.i.mlp.fc1.weight F,D
            vision_model.encoder.layers.i.mlp.fc1.bias F
            vision_model.encoder.layers.i.mlp.fc2.weight D,F
            vision_model.encoder.layers.i.mlp.fc2.bias D
            vision_model.post_layernorm.weight D
            vision_model.post_layernorm.bias D
            vision_model.head.probe 1,1,D
            vision_model.head.attention.in_proj_weight Q,D
            vision_model.head.attention.in_proj_bias Q
            vision_model.head.attention.out_proj.weight D,D
            vision_model.head.attention.out_proj.bias D
            vision_model.head.layernorm.weight D
            vision_model.head.layernorm.bias D
            vision_model.head.mlp.fc1.weight F,D
            vision_model.head.mlp.fc1.bias F
            vision_model.head.mlp.fc2.weight D,F
            vision_model.head.mlp.fc2.bias D
            """,
            40,
            D=1536,
            F=6144,
            Q=4608,
        ),
        1163e6,  # 1,132 M in the blocks [Alabdulmohsin 2023, g-opt], the pooling head, patches and positions
    ),
    "timm-eva": (
        EVA02_L,
        lines(
            """
            cls_token 1,1,D
            pos_embed 1,1025,D
            patch_embed.proj.weight D,3,14,14
            patch_embed.proj.bias D
            blocks.i.norm1.weight D
            blocks.i.norm1.bias D
            blocks.i.attn.q_proj.weight D,D
            blocks.i.attn.q_proj.bias D
            blocks.i.attn.k_proj.weight D,D
            blocks.i.attn.v_proj.weight D,D
            blocks.i.attn.v_proj.bias D
            blocks.i.attn.proj.weight D,D
            blocks.i.attn.proj.bias D
            blocks.i.norm2.weight D
            blocks.i.norm2.bias D
            blocks.i.mlp.fc1_g.weight F,D
            blocks.i.mlp.fc1_g.bias F
            blocks.i.mlp.fc1_x.weight F,D
            blocks.i.mlp.fc1_x.bias F
            blocks.i.mlp.norm.weight F
            blocks.i.mlp.norm.bias F
            blocks.i.mlp.fc2.weight D,F
            blocks.i.mlp.fc2.bias D
            fc_norm.weight D
            fc_norm.bias D
            head.weight 1000,D
            head.bias 1000
            """,
            24,
            D=1024,
            F=2730,
        ),
        305.1e6,  # timm's own table of EVA-02 L/14 at 448 px
    ),
}


@pytest.mark.parametrize("layout", REAL)
def test_models_of_billions_fit_by_shape(layout: str) -> None:
    info, shapes, parameters = REAL[layout]
    published = Published(info, shapes)
    assert weights.choose(layout.split("-")[0], published, None).name == layout
    config = weights.configuration(LAYOUTS[layout], published, {}, {})
    rules = weights.checked_rules(LAYOUTS[layout], config, published)  # raises where any name or shape is another
    ours = weights.our_shapes(config)
    assert sum(np.prod(shape, dtype=np.int64) for shape in shapes.values()) == pytest.approx(parameters, rel=3e-3)
    classifier = config.num_classes == 1
    count = sum(int(np.prod(s)) for name, s in ours.items() if not (classifier and name.startswith("head_")))
    assert count == pytest.approx(parameters, rel=3e-3)
    broken = dict(shapes)
    removed = sorted(broken)[len(broken) // 2]
    del broken[removed]
    with pytest.raises(RecipeError, match=f"missing: {removed}"):
        check_tensors(rules, their_shapes(rules, ours, config), broken, config)
