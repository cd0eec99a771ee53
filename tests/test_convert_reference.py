"""Every mapping of weights, proved against the libraries themselves: transformers' and timm's models on the CPU.

Their parameters are all random, norms, biases and layer scales too. Ours must give the same features and logits, at
the native and at an oblong size; and what we write, read by them, the same as before.
"""

import dataclasses
import functools
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import MeshFactory
from jax.sharding import get_mesh

from vit22b.errors import RecipeError
from vit22b.model import ViT, abstract_model, resample
from vit22b.model_config import LADDER, ModelConfig, size
from vit22b.names import named_leaves
from vit22b.sharding import concrete

NEEDED = "needs the libraries of requirements-reference.txt; `make test-reference` installs them"
torch = pytest.importorskip("torch", reason=NEEDED)
transformers = pytest.importorskip("transformers", reason=NEEDED)
timm = pytest.importorskip("timm", reason=NEEDED)

import safetensors.torch  # noqa: E402

from distill import convert, weights  # noqa: E402
from distill.layouts import LAYOUTS  # noqa: E402
from distill.layouts.tables import Published, their_shapes  # noqa: E402

TOLERANCE = 1e-5  # of values of up to about 5, in fp32; the largest difference seen is 2.4e-6
NATIVE, OBLONG = (32, 32), (48, 24)
SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = {"image_size": 32, "patch_size": 8}
INTERPOLATE = {"interpolate_pos_encoding": True}
FP32 = {"matmul": "fp32"}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of the library: how it is made, and the layout that must recognise it."""

    layout: str
    make: Callable[[], Any]
    arguments: dict = dataclasses.field(default_factory=dict)  # of its call, away from the native size
    info: dict = dataclasses.field(default_factory=dict)  # timm's description


def hf(layout: str, model: str, config: str, arguments: dict | None = None, **fields: Any) -> Case:
    def make() -> Any:
        return getattr(transformers, model)(getattr(transformers, config)(**SIZE, **fields))

    return Case(layout, make, arguments or {})


TRANSFORMERS = {
    "vit": hf(
        "hf-vit", "ViTForImageClassification", "ViTConfig", INTERPOLATE, **IMAGE, intermediate_size=64, num_labels=5
    ),
    "vit-features-no-qkv-bias": hf(
        "hf-vit", "ViTModel", "ViTConfig", INTERPOLATE, **IMAGE, intermediate_size=64, qkv_bias=False
    ),
    "dinov2": hf("hf-dinov2", "Dinov2Model", "Dinov2Config", **IMAGE, mlp_ratio=2),
    "dinov2-classifier": hf("hf-dinov2", "Dinov2ForImageClassification", "Dinov2Config", **IMAGE, num_labels=5),
    "dinov2-swiglu": hf("hf-dinov2", "Dinov2Model", "Dinov2Config", **IMAGE, use_swiglu_ffn=True),
    "dinov2-registers": hf(
        "hf-dinov2", "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", **IMAGE, num_register_tokens=3
    ),
    "dinov2-registers-classifier": hf(
        "hf-dinov2",
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        **IMAGE,
        num_register_tokens=3,
        num_labels=5,
    ),
    "dinov3": hf(
        "hf-dinov3", "DINOv3ViTModel", "DINOv3ViTConfig", **IMAGE, intermediate_size=64, num_register_tokens=3
    ),
    "dinov3-swiglu": hf(
        "hf-dinov3",
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        **IMAGE,
        intermediate_size=48,
        num_register_tokens=4,
        use_gated_mlp=True,
        hidden_act="silu",
        query_bias=False,
        value_bias=False,
    ),
    "siglip": hf("hf-siglip", "SiglipVisionModel", "SiglipVisionConfig", INTERPOLATE, **IMAGE, intermediate_size=64),
    "internvit": hf(
        "hf-internvl-vision",
        "InternVLVisionModel",
        "InternVLVisionConfig",
        image_size=[32, 32],
        patch_size=[8, 8],
        intermediate_size=64,
        use_qk_norm=True,
        norm_type="rms_norm",
        use_mean_pooling=True,
    ),
    "internvit-300m": hf(
        "hf-internvl-vision",
        "InternVLVisionModel",
        "InternVLVisionConfig",
        image_size=[32, 32],
        patch_size=[8, 8],
        intermediate_size=64,
        attention_bias=True,
        use_mean_pooling=True,
    ),
}


def of_timm(layout: str, kind: str, architecture: str = "", classes: dict | None = None, **arguments: Any) -> Case:
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4} | arguments
    arguments = {"num_classes": 5, "dynamic_img_size": True, "mlp_ratio": 2.0} | arguments
    description = {"class": kind, "model_args": arguments, "classes": classes or {}}
    # What timm publishes has a name and not always arguments; those that no tensor shows are given here.
    info = {"architecture": architecture, "model_args": arguments}
    return Case(layout, lambda: build(description), info=info)


VISION, EVA = "timm.models.vision_transformer.VisionTransformer", "timm.models.eva.Eva"
SWIGLU = {"mlp_layer": ["timm.layers.SwiGLUPacked", {}], "act_layer": ["torch.nn.SiLU", {}]}
RMS = {"norm_layer": ["timm.layers.RmsNorm", {"eps": 1e-6}]}
PARALLEL = RMS | {"block_fn": ["timm.models.vision_transformer.ParallelScalingBlock", {}]}
DINOV3 = {"rope_type": "dinov3", "rope_temperature": 100, "rope_rotate_half": True, "use_rot_pos_emb": True}
DINOV3 |= {"use_abs_pos_emb": False, "num_reg_tokens": 4, "use_fc_norm": False, "init_values": 1e-5}
EPSILON = {"norm_layer": ["timm.layers.LayerNorm", {"eps": 1e-5}]}
EVA02 = {"qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "use_rot_pos_emb": True, "ref_feat_shape": 5}
TIMM = {
    "vit": of_timm("timm-vit", VISION),
    "vit-registers-in-positions": of_timm("timm-vit", VISION, reg_tokens=3),
    "vit-mean": of_timm("timm-vit", VISION, global_pool="avg"),
    "vit-qk-norm": of_timm("timm-vit", VISION, qk_norm=True, qkv_bias=False, proj_bias=False),
    "deit3": of_timm("timm-vit", VISION, no_embed_class=True, init_values=1e-6),
    "dinov2-registers-swiglu": of_timm(
        "timm-vit", VISION, classes=SWIGLU, no_embed_class=True, init_values=1e-5, reg_tokens=4, num_classes=0
    ),
    "siglip": of_timm(
        "timm-vit", VISION, global_pool="map", class_token=False, act_layer="gelu_tanh", num_classes=0
    ),
    "parallel": of_timm(
        "timm-parallel", VISION, classes=PARALLEL, qkv_bias=False, qk_norm=True, act_layer="gelu_tanh",
        class_token=False, global_pool="avg",
    ),
    "parallel-layer-norm": of_timm(
        "timm-parallel", VISION, classes={"block_fn": PARALLEL["block_fn"]}, class_token=False, reg_tokens=1,
        no_embed_class=True, global_pool="avg",
    ),
    "dinov3": of_timm(
        "timm-eva", EVA, "vit_small_patch16_dinov3", EPSILON, qkv_bias=False, global_pool="token", **DINOV3
    ),
    "dinov3-swiglu-qkv-bias": of_timm(
        "timm-eva", EVA, "vit_7b_patch16_dinov3", EPSILON, swiglu_mlp=True, swiglu_align_to=8, **DINOV3
    ),
    "eva02-small": of_timm(
        "timm-eva", EVA, "eva02_small_patch14_336", swiglu_mlp=True, use_rot_pos_emb=True, ref_feat_shape=(5, 5)
    ),
    "eva02": of_timm("timm-eva", EVA, "eva02_large_patch14_448", **EVA02),
}  # fmt: skip


def build(description: dict) -> Any:
    """A model of timm's from what we write beside its weights."""

    def named(path: str) -> Any:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name)

    classes = {k: functools.partial(named(p), **a) if a else named(p) for k, (p, a) in description["classes"].items()}
    return named(description["class"])(**description["model_args"], **classes)


def randomised(model: Any) -> Any:
    """All parameters random: scales of norms around one, matrices that keep size."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            scale = value.ndim == 1 and "norm" in name and name.endswith("weight")
            spread = 0.3 if value.ndim != 2 else value.shape[1] ** -0.5
            value.copy_(float(scale) + spread * torch.randn(value.shape, generator=generator))
    return model.eval()


def images(size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)


def outputs_of_transformers(model: Any, x: np.ndarray, arguments: dict) -> dict[str, np.ndarray]:
    with torch.no_grad():
        output = model(torch.from_numpy(x).permute(0, 3, 1, 2), output_hidden_states=True, **arguments)
    found = {"logits": getattr(output, "logits", None), "tokens": getattr(output, "last_hidden_state", None)}
    # ViTModel's pooler is a layer of its own, which no classifier reads.
    if "Dinov2" in type(model).__name__ or "Siglip" in type(model).__name__ or "DINOv3" in type(model).__name__:
        found["pooled"] = getattr(output, "pooler_output", None)
    return {name: value.numpy() for name, value in found.items() if value is not None}


def outputs_of_timm(model: Any, x: np.ndarray) -> dict[str, np.ndarray]:
    with torch.no_grad():
        tokens = model.forward_features(torch.from_numpy(x).permute(0, 3, 1, 2))
        found = {"tokens": tokens, "pooled": model.forward_head(tokens, pre_logits=True)}
        if model.num_classes:
            found["logits"] = model.forward_head(tokens)
    return {name: value.numpy() for name, value in found.items()}


def assert_same(actual: Any, expected: dict[str, np.ndarray], what: str) -> float:
    """Every output to TOLERANCE; returns the largest difference."""
    assert expected, what
    worst = 0.0
    for name, value in expected.items():
        ours = np.asarray(actual[name] if isinstance(actual, dict) else getattr(actual, name))
        assert ours.shape == value.shape, f"{what}: {name}"
        assert np.abs(value).max() > 0.1, f"{what}: {name} says nothing"
        difference = float(np.abs(ours - value).max())
        assert difference < TOLERANCE, f"{what}: {name} differs by {difference}"
        worst = max(worst, difference)
    return worst


def forward(model: ViT, x: np.ndarray) -> Any:
    return jax.jit(lambda model, x: model(x))(model, x)


def same_parameters(one: ViT, other: ViT) -> bool:
    assert one.config == other.config
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name: str, mesh: MeshFactory, tmp_path: Path, record_property: Callable) -> None:
    case = TRANSFORMERS[name]
    theirs = randomised(case.make())
    theirs.save_pretrained(tmp_path / "theirs")
    with mesh():
        source = weights.open_source(f"hf:{tmp_path / 'theirs'}", overrides=FP32)
        assert source.layout.name == case.layout
        ours = convert.load(source)
        expected = {}
        for size in (NATIVE, OBLONG):
            expected[size] = outputs_of_transformers(theirs, images(size), case.arguments if size != NATIVE else {})
            record_property(f"{size}", assert_same(forward(ours, images(size)), expected[size], f"{name} {size}"))
        convert.save(ours, "hf", tmp_path / "ours", layout_name=case.layout)
        written, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
        # ViTModel makes a pooler where there is none; no output that is compared reads it.
        assert not {key for key in report["missing_keys"] if not key.startswith("pooler.")}
        assert not any(report[key] for key in ("unexpected_keys", "mismatched_keys", "error_msgs"))
        for size in (NATIVE, OBLONG):
            arguments = case.arguments if size != NATIVE else {}
            again = outputs_of_transformers(written.eval(), images(size), arguments)
            assert_same(again, expected[size], f"{name} written, {size}")
        assert same_parameters(ours, convert.load(weights.open_source(f"hf:{tmp_path / 'ours'}")))


@pytest.mark.parametrize("grid", [(4, 4), (2, 8), (5, 3)], ids=str)
def test_siglip2_naflex_of_any_grid(grid: tuple[int, int], mesh: MeshFactory, tmp_path: Path) -> None:
    config = transformers.Siglip2VisionConfig(**SIZE, intermediate_size=64, patch_size=8, num_patches=16)
    theirs = randomised(transformers.Siglip2VisionModel(config))
    theirs.save_pretrained(tmp_path / "theirs")
    x = images((8 * grid[0], 8 * grid[1]))
    patches = x.reshape(2, grid[0], 8, grid[1], 8, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, -1, 8 * 8 * 3)

    def outputs(model: Any) -> dict[str, np.ndarray]:
        with torch.no_grad():
            output = model(
                pixel_values=torch.from_numpy(patches),
                pixel_attention_mask=torch.ones(2, patches.shape[1], dtype=torch.int64),
                spatial_shapes=torch.tensor([grid, grid]),
            )
        return {"tokens": output.last_hidden_state.numpy(), "pooled": output.pooler_output.numpy()}

    with mesh():
        source = weights.open_source(f"hf:{tmp_path / 'theirs'}", overrides=FP32)
        assert source.layout.name == "hf-siglip2-naflex"
        ours = convert.load(source)
        expected = outputs(theirs)
        assert_same(forward(ours, x), expected, f"{grid}")
        convert.save(ours, "hf", tmp_path / "ours", layout_name="hf-siglip2-naflex")
        written, report = type(theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not any(report.values())
        assert_same(outputs(written.eval()), expected, f"written, {grid}")


def test_siglip_is_found_within_the_model_of_both_towers(mesh: MeshFactory, tmp_path: Path) -> None:
    tower = {**SIZE, "intermediate_size": 64}
    config = transformers.SiglipConfig(
        vision_config={**tower, **IMAGE}, text_config={**tower, "vocab_size": 10, "max_position_embeddings": 4}
    )
    theirs = randomised(transformers.SiglipModel(config))
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        output = theirs.vision_model(torch.from_numpy(images(NATIVE)).permute(0, 3, 1, 2))
    with mesh():
        ours = convert.load(weights.open_source(f"hf:{tmp_path}", overrides=FP32))
        assert_same(forward(ours, images(NATIVE)), {"pooled": output.pooler_output.numpy()}, "image tower")


def test_internvit_of_opengvlab_is_that_of_transformers_by_other_names(mesh: MeshFactory, tmp_path: Path) -> None:
    """OpenGVLab's code is no library's; its parameters are transformers' renamed, queries, keys and values in one."""
    theirs = randomised(TRANSFORMERS["internvit"].make())
    state, layers = theirs.state_dict(), "encoder.layer."
    renamed = {
        "embeddings.class_embedding": state["embeddings.cls_token"],
        "embeddings.position_embedding": state["embeddings.position_embeddings"],
        "embeddings.patch_embedding.weight": state["embeddings.patch_embeddings.projection.weight"],
        "embeddings.patch_embedding.bias": state["embeddings.patch_embeddings.projection.bias"],
    }
    parts = {"layernorm_before": "norm1", "layernorm_after": "norm2", "lambda_1": "ls1", "lambda_2": "ls2"}
    parts |= {"attention.projection_layer": "attn.proj", "attention.q_norm": "attn.q_norm"}
    parts |= {"attention.k_norm": "attn.k_norm", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    for name, value in state.items():
        if name.startswith(layers) and "_proj." not in name:
            layer, _, rest = name.removeprefix(layers).partition(".")
            old = next(old for old in parts if rest == old or rest.startswith(old + "."))
            renamed[f"encoder.layers.{layer}.{parts[old]}{rest.removeprefix(old)}"] = value
    for i in range(2):
        fused = torch.cat([state[f"{layers}{i}.attention.{letter}_proj.weight"] for letter in "qkv"])
        renamed[f"encoder.layers.{i}.attn.qkv.weight"] = fused
    safetensors.torch.save_file(renamed, tmp_path / "model.safetensors")
    description = {"model_type": "intern_vit_6b", "intermediate_size": 64, "hidden_act": "gelu", **SIZE, **IMAGE}
    description |= {"layer_norm_eps": 1e-6, "qk_normalization": True, "qkv_bias": False, "initializer_factor": 0.1}
    (tmp_path / "config.json").write_text(json.dumps(description))
    with mesh():
        source = weights.open_source(f"hf:{tmp_path}", overrides=FP32)
        assert source.layout.name == "hf-internvit"
        ours = convert.load(source)
        for size in (NATIVE, OBLONG):
            assert_same(forward(ours, images(size)), outputs_of_transformers(theirs, images(size), {}), f"{size}")


@pytest.mark.parametrize("grid", [(4, 4), (7, 5), (3, 2), (12, 2), (1, 1)], ids=str)
@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("cubic", {"mode": "bicubic", "antialias": True}),
        ("cubic_plain", {"mode": "bicubic"}),
        ("linear", {"mode": "bilinear", "antialias": True}),
    ],
)
def test_positions_are_resampled_as_pytorch_does(method: str, arguments: dict, grid: tuple[int, int]) -> None:
    """But to one column of more rows than there were, which torch 2.13 antialiases wrongly."""
    table = np.random.default_rng(0).normal(size=(6, 5, 8)).astype(np.float32)
    planes = torch.from_numpy(table).permute(2, 0, 1)[None]
    expected = torch.nn.functional.interpolate(planes, size=grid, **arguments)[0].permute(1, 2, 0).numpy()
    np.testing.assert_allclose(np.asarray(resample(table, grid, method)), expected, rtol=0, atol=2e-6)


def of_meta(make: Callable[[], Any]) -> list[tuple[int, ...]]:
    """The shapes of a model's parameters, none of which is allocated."""
    with torch.device("meta"):
        return sorted(tuple(value.shape) for value in make().parameters())


def of_config(model: str, config: str, **fields: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**fields))


def of_architecture(name: str, **fields: Any) -> Callable[[], Any]:
    return lambda: timm.create_model(name, **fields)


def wide(width: int, depth: int, mlp_dim: int, num_heads: int, **fields: Any) -> dict[str, Any]:
    sizes = {"width": width, "depth": depth, "mlp_dim": mlp_dim, "num_heads": num_heads, "num_classes": 1}
    return sizes | SEQUENTIAL | fields


CLASS: dict[str, Any] = {"class_token": True, "pool": "cls"}
BIASES: dict[str, Any] = {"norm_bias": True, "qkv_bias": True, "proj_bias": True}
SEQUENTIAL: dict[str, Any] = {"block": "sequential", "norm": "layer", "qk_norm": "none", **BIASES}
DINOV3_7B = wide(4096, 40, 8192, 32, patch_size=16, mlp="swiglu", position="rope", num_registers=4, layer_scale=1.0)
DINOV3_7B |= CLASS | {"qkv_bias": False}
# Models of up to 7 billion parameters by the library's own description: only shapes are compared.
REAL = {
    "DINOv3 7B, transformers": (
        "hf-dinov3",
        of_config(
            "DINOv3ViTModel", "DINOv3ViTConfig", hidden_size=4096, num_hidden_layers=40, num_attention_heads=32,
            intermediate_size=8192, use_gated_mlp=True, hidden_act="silu", num_register_tokens=4,
            query_bias=False, value_bias=False,
        ),
        DINOV3_7B,
    ),
    "DINOv3 7B, timm": (
        "timm-eva",
        of_architecture("vit_7b_patch16_dinov3", num_classes=0, qkv_fused=False),
        DINOV3_7B,
    ),
    "InternViT 6B, transformers": (
        "hf-internvl-vision",
        of_config(
            "InternVLVisionModel", "InternVLVisionConfig", hidden_size=3200, num_hidden_layers=48,
            num_attention_heads=25, intermediate_size=12800, image_size=[224, 224], patch_size=[14, 14],
            use_qk_norm=True, norm_type="rms_norm", use_mean_pooling=True,
        ),
        wide(3200, 48, 12800, 25, layer_scale=0.1, mlp="gelu", position_resampling="cubic_plain", **CLASS)
        | {"norm": "rms", "norm_bias": False, "qk_norm": "width", "qkv_bias": False, "final_norm": "none"},
    ),
    "SigLIP 2 g-opt, transformers": (
        "hf-siglip",
        of_config(
            "SiglipVisionModel", "SiglipVisionConfig", hidden_size=1536, num_hidden_layers=40, num_attention_heads=16,
            intermediate_size=6144, image_size=384, patch_size=16,
        ),
        wide(1536, 40, 6144, 16, image_size=384, patch_size=16, position_resampling="cubic_plain"),
    ),
    "SigLIP 2 g-opt, timm": (
        "timm-vit",
        of_architecture("vit_giantopt_patch16_siglip_384"),
        wide(1536, 40, 6144, 16, image_size=384, patch_size=16),
    ),
    "EVA-02 L, timm": (
        "timm-eva",
        of_architecture("eva02_large_patch14_448"),
        wide(1024, 24, 2730, 16, image_size=448, mlp="swiglu", mlp_sub_norm=True, position="learned_rope", rope_grid=16)
        | {"class_token": True, "pool": "gap", "final_norm": "pooled", "num_classes": 1000},
    ),
    "DINOv2 g with registers, timm": (
        "timm-vit",
        of_architecture("vit_giant_patch14_reg4_dinov2"),
        wide(1536, 40, 4096, 24, image_size=518, mlp="swiglu", num_registers=4, layer_scale=1e-5, **CLASS),
    ),
    "DeiT III H, timm": (
        "timm-vit",
        of_architecture("deit3_huge_patch14_224"),
        wide(1280, 32, 5120, 16, mlp="gelu", layer_scale=1e-6, **CLASS) | {"num_classes": 1000},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_models_of_billions_have_the_librarys_shapes(name: str) -> None:
    layout, make, fields = REAL[name]
    config = ModelConfig(**{"image_size": 224, "patch_size": 14} | fields)
    rules = LAYOUTS[layout].rules(config, None)
    LAYOUTS[layout].check_expresses(config)
    shapes = their_shapes(rules, weights.our_shapes(config), config)
    if layout == "timm-eva" and config.learns_positions:  # written without the class token's, published with it
        shapes["pos_embed"] = (1, config.grid**2 + 1, config.width)
    assert sorted(shapes.values()) == of_meta(make)


def architectures() -> list[str]:
    """Of timm, by name: the families that we read, and others that look like them."""
    found: dict[str, None] = {}
    for pattern in ("deit3_*", "vit_*dinov2", "vit_*dinov3*", "vit_*siglip*", "eva02_*", "vit_*_224", "vit_*_384"):
        found |= dict.fromkeys(timm.list_models(pattern))
    return list(found)


def test_what_an_architectures_name_must_tell_is_what_timm_builds() -> None:
    """Every architecture is either refused, or read with timm's heads, epsilon, activation, norms and pooling."""
    read = []
    for name in architectures():
        with torch.device("meta"):
            model = timm.create_model(name)
        info = {"architecture": name, "global_pool": model.global_pool, "pretrained_cfg": dict(model.pretrained_cfg)}
        published = Published(info, {key: tuple(value.shape) for key, value in model.state_dict().items()})
        try:
            layout = weights.choose("timm", published, None)
            config = weights.configuration(layout, published, {}, {})
            weights.checked_rules(layout, config, published)
        except RecipeError:
            continue
        block = model.blocks[0]
        activation = type(block.mlp.act).__name__
        norms = {"tokens": model.norm, "pooled": model.fc_norm}
        assert config.num_heads == block.attn.num_heads, name
        assert config.norm_epsilon == block.norm1.eps, name
        assert config.mlp == {"GELU": "gelu", "GELUTanh": "gelu_tanh", "SiLU": "swiglu"}[activation], name
        assert config.grid == model.patch_embed.grid_size[0], name
        assert {"avg": "gap", "token": "cls", "map": "map"}[model.global_pool] == config.pool, name
        for place, norm in norms.items():
            assert isinstance(norm, torch.nn.Identity) == (config.final_norm != place), name
        read.append(name)
    assert len(read) >= 85
    for family in ("deit3_base", "dinov2", "reg4_dinov2", "dinov3", "7b", "siglip_384", "giantopt", "eva02_large"):
        assert any(family in name for name in read), family


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str, mesh: MeshFactory, tmp_path: Path, record_property: Callable) -> None:
    case = TIMM[name]
    theirs = randomised(case.make())
    (tmp_path / "theirs").mkdir()
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "theirs" / "model.safetensors")
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(case.info))
    with mesh():
        source = weights.open_source(f"timm:{tmp_path / 'theirs'}", overrides=FP32)
        assert source.layout.name == case.layout
        ours = convert.load(source)
        expected = {}
        for size in (NATIVE, OBLONG):
            expected[size] = outputs_of_timm(theirs, images(size))
            record_property(f"{size}", assert_same(forward(ours, images(size)), expected[size], f"{name} {size}"))
        convert.save(ours, "timm", tmp_path / "ours.safetensors", layout_name=case.layout)
        written = build(json.loads((tmp_path / "ours.json").read_text()))
        written.load_state_dict(safetensors.torch.load_file(tmp_path / "ours.safetensors"), strict=True)
        for size in (NATIVE, OBLONG):
            assert_same(outputs_of_timm(written.eval(), images(size)), expected[size], f"{name} written, {size}")
        assert same_parameters(ours, convert.load(weights.open_source(f"timm:{tmp_path / 'ours.safetensors'}")))


@pytest.mark.parametrize("rung", LADDER)
def test_the_whole_ladder_up_to_22b_has_the_shapes_of_timms_parallel_block(rung: str) -> None:
    config = ModelConfig(**size(rung, LADDER), num_classes=1000)
    layout = convert.writable_layout("timm", config)
    shapes = their_shapes(layout.rules(config, None), weights.our_shapes(config), config)
    with torch.device("meta"):
        theirs = build(layout.describe(config))
    assert shapes == {name: tuple(value.shape) for name, value in theirs.state_dict().items()}


OURS: dict[str, dict[str, Any]] = {
    "ViT-22B": {},  # the defaults are its architecture
    "ViT-22B with class token and registers": {"class_token": True, "num_registers": 2, "pool": "cls"},
    "parallel, centred norms": {"norm": "layer", "qk_norm": "none", "qkv_bias": True, "pool": "gap"},
    "student": SEQUENTIAL | {"mlp": "gelu", "layer_scale": 0.1, "class_token": True, "pool": "cls"},
    "student without biases": {"block": "sequential", "norm": "layer", "mlp": "gelu", "pool": "gap"},
    "gated student": {"block": "sequential", "mlp": "swiglu", "position": "none", "num_registers": 1, "pool": "gap"},
    "features alone": {"num_classes": 1},
}


@pytest.mark.parametrize("name", OURS)
def test_timm_computes_what_our_own_models_do(name: str, mesh: MeshFactory, tmp_path: Path) -> None:
    config = ours_like(OURS[name])
    with mesh():
        ours = random_ours(config)
        convert.save(ours, "timm", tmp_path / "ours.safetensors")
        theirs = build(json.loads((tmp_path / "ours.json").read_text()))
        theirs.load_state_dict(safetensors.torch.load_file(tmp_path / "ours.safetensors"), strict=True)
        for size in (NATIVE, OBLONG):
            assert_same(forward(ours, images(size)), outputs_of_timm(theirs.eval(), images(size)), f"{name} {size}")
        assert same_parameters(ours, convert.load(weights.open_source(f"timm:{tmp_path / 'ours.safetensors'}")))


@pytest.mark.parametrize("pool", ["map", "gap", "cls"])
def test_timm_reads_the_npz_that_we_write_as_big_visions(pool: str, mesh: MeshFactory, tmp_path: Path) -> None:
    head = {"num_classes": 0 if pool == "map" else 5, "class_token": pool == "cls", "no_embed_class": True}
    head |= {"global_pool": {"map": "map", "gap": "avg", "cls": "token"}[pool], "act_layer": "gelu_tanh"}
    theirs = of_timm("timm-vit", VISION, **head, fc_norm=False).make()
    fields = {"pool": pool, "class_token": pool == "cls", "num_classes": head["num_classes"] or 1}
    config = ours_like(SEQUENTIAL | fields)
    with mesh():
        ours = random_ours(config)
        convert.save(ours, "npz", tmp_path / "ours.npz")
        theirs.load_pretrained(str(tmp_path / "ours.npz"))
        expected = outputs_of_timm(theirs.eval(), images(NATIVE))
        assert_same(forward(ours, images(NATIVE)), expected, pool)
        loaded = convert.load(weights.open_source(f"npz:{tmp_path / 'ours.npz'}", overrides=FP32))
        assert same_parameters(ours, loaded)


def ours_like(fields: dict[str, Any]) -> ModelConfig:
    shape = {"width": 32, "depth": 2, "mlp_dim": 64, "num_heads": 4, "num_classes": 5, "image_size": 32}
    return ModelConfig(**shape | {"patch_size": 8, "matmul": "fp32"} | fields)


def random_ours(config: ModelConfig) -> ViT:
    """Our model with random parameters; a classifier of one class is none."""
    abstract, rng = concrete(abstract_model(config), get_mesh()), np.random.default_rng(0)
    values = []
    for name, leaf in named_leaves(abstract).items():
        spread = 0.3 if name.endswith(("bias", "scale")) else leaf.shape[-2] ** -0.5
        spread *= not (name.startswith("head_") and config.num_classes == 1)
        value = name.endswith("scale") + spread * rng.normal(size=leaf.shape)
        values.append(jax.device_put(value.astype(np.float32), leaf.sharding))
    return jax.tree.unflatten(jax.tree.structure(abstract), values)
