"""The Vision Transformer's forward pass in NumPy, float64: what the JAX model is compared with.

Written from the papers' formulas, one image and one head at a time. `w` maps a parameter's name, such as
'blocks/attention/query', to its value; a missing one is a KeyError. Letters: T tokens, D width, H head dim.
"""

import math
from typing import NamedTuple

import numpy as np

from vit22b.model_config import ModelConfig

Weights = dict[str, np.ndarray]
_erf = np.vectorize(math.erf)


class Result(NamedTuple):
    logits: np.ndarray  # B C
    pooled: np.ndarray  # B D
    tokens: np.ndarray  # B T D
    layers: np.ndarray  # L B T D: the residual stream after each block


def forward(config: ModelConfig, w: Weights, images: np.ndarray) -> Result:
    """The model's outputs for images (B, height, width, 3); learned positions at the native size only."""
    w = {name: np.asarray(value, np.float64) for name, value in w.items()}
    results = [_one_image(config, w, np.asarray(image, np.float64)) for image in images]
    logits, pooled, tokens, layers = (np.stack(outputs) for outputs in zip(*results, strict=True))
    return Result(logits, pooled, tokens, layers.swapaxes(0, 1))


def below(w: Weights, prefix: str) -> Weights:
    """The parameters under a module, by their names within it."""
    return {name.removeprefix(prefix + "/"): value for name, value in w.items() if name.startswith(prefix + "/")}


def _one_image(config: ModelConfig, w: Weights, image: np.ndarray) -> Result:
    p = config.patch_size
    grid = (image.shape[0] // p, image.shape[1] // p)
    places = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    patches = [image[p * r : p * (r + 1), p * c : p * (c + 1)].ravel() for r, c in places]
    x = np.stack(patches) @ w["patch_kernel"] + w["patch_bias"]
    if config.position in ("learned", "learned_rope"):
        assert grid == (config.grid, config.grid)
        x = x + w["position"]
    if config.position == "sincos":
        x = x + np.stack([sincos(config.width, row, column) for row, column in places])
    num_prefix, turns = config.class_token + config.num_registers, None
    if num_prefix:
        x = np.concatenate([w["prefix"], x])
    if config.position in ("rope", "learned_rope"):
        unturned = [np.ones(config.head_dim // 2)] * num_prefix
        turns = np.stack(unturned + [rope_turn(config, grid, place) for place in places])

    layers = []
    for i in range(config.depth):
        x = block(config, {name: value[i] for name, value in below(w, "blocks").items()}, x, turns)
        layers.append(x)
    tokens = norm(config, below(w, "norm"), x) if config.final_norm == "tokens" else x
    if config.pool == "cls":
        pooled = tokens[0]
    if config.pool == "cls_gap":
        pooled = np.concatenate([tokens[0], tokens[num_prefix:].mean(axis=0)])
    if config.pool == "gap":
        pooled = tokens[num_prefix:].mean(axis=0)
    if config.pool == "map":
        pooled = attention_pool(config, below(w, "map_head"), tokens)
    if config.final_norm == "pooled":
        pooled = norm(config, below(w, "norm"), pooled)
    return Result(pooled @ w["head_kernel"] + w["head_bias"], pooled, tokens, np.stack(layers))


def block(config: ModelConfig, w: Weights, x: np.ndarray, turns: np.ndarray | None = None) -> np.ndarray:
    """One layer on (T, D). Parallel: x + Attn(norm x) + MLP(norm x), one norm. Sequential: y = x + Attn(norm x), then
    y + MLP(norm' y). LayerScale multiplies each dimension of what is added."""
    y = norm(config, below(w, "norm"), x)
    attended = attention(config, below(w, "attention"), y, y, config.qk_norm, turns)
    x = x + (attended * w["attention/scale"] if config.layer_scale else attended)
    if config.block == "sequential":
        y = norm(config, below(w, "mlp_norm"), x)
    transformed = mlp(config, below(w, "mlp"), y)
    return x + (transformed * w["mlp/scale"] if config.layer_scale else transformed)


def norm(config: ModelConfig, w: Weights, x: np.ndarray) -> np.ndarray:
    """LayerNorm (x - mean) / sqrt(var + eps); RMSNorm is the same without the mean."""
    if config.norm == "layer":
        x = x - x.mean(axis=-1, keepdims=True)
    y = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + config.norm_epsilon) * w["scale"]
    return y + w["bias"] if config.norm_bias else y


def attention(
    config: ModelConfig, w: Weights, x: np.ndarray, context: np.ndarray, qk_norm: str, turns: np.ndarray | None
) -> np.ndarray:
    """softmax(q k^T / sqrt(H)) v per head, of x's tokens (T, D) over the context's (S, D)."""
    v = context @ w["value"] + (w["value_bias"] if config.qkv_bias else 0)
    weights = attention_weights(config, w, x, context, qk_norm, turns)
    heads = [weights[head] @ v[:, dims] for head, dims in enumerate(head_dims(config))]
    y = np.concatenate(heads, axis=1) @ w["out"]
    return y + w["out_bias"] if config.proj_bias else y


def attention_weights(
    config: ModelConfig, w: Weights, x: np.ndarray, context: np.ndarray, qk_norm: str, turns: np.ndarray | None = None
) -> np.ndarray:
    """softmax(q k^T / sqrt(H)): (N, T, S)."""
    q, k = x @ w["query"], context @ w["key"]
    if config.qkv_bias:
        q, k = q + w["query_bias"], k + w["key_bias"]
    if qk_norm == "width":
        q, k = norm(config, below(w, "query_norm"), q), norm(config, below(w, "key_norm"), k)
    heads = []
    for dims in head_dims(config):
        q_h, k_h = q[:, dims], k[:, dims]
        if qk_norm == "head":
            q_h, k_h = norm(config, below(w, "query_norm"), q_h), norm(config, below(w, "key_norm"), k_h)
        if turns is not None:
            q_h, k_h = turned(q_h, turns), turned(k_h, turns)
        weights = np.exp(q_h @ k_h.T / math.sqrt(config.head_dim))
        heads.append(weights / weights.sum(axis=1, keepdims=True))
    return np.stack(heads)


def head_dims(config: ModelConfig) -> list[slice]:
    """Heads are consecutive dims of queries, keys and values."""
    size = config.width // config.num_heads
    return [slice(i * size, (i + 1) * size) for i in range(config.num_heads)]


def mlp(config: ModelConfig, w: Weights, x: np.ndarray) -> np.ndarray:
    """act(x W + b) V + c; SwiGLU: (silu(x G + a) * (x W + b)) V + c."""
    bias = dict.fromkeys(("gate_bias", "up_bias", "out_bias"), 0.0) if not config.mlp_bias else w
    up = x @ w["up"] + bias["up_bias"]
    if config.mlp == "gelu":
        hidden = up * (1 + _erf(up / math.sqrt(2))) / 2
    if config.mlp == "gelu_tanh":
        hidden = up * (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3))) / 2
    if config.mlp == "swiglu":
        gate = x @ w["gate"] + bias["gate_bias"]
        hidden = gate / (1 + np.exp(-gate)) * up
    if config.mlp_sub_norm:
        hidden = norm(config, below(w, "sub_norm"), hidden)
    return hidden @ w["out"] + bias["out_bias"]


def attention_pool(config: ModelConfig, w: Weights, tokens: np.ndarray) -> np.ndarray:
    """Zhai et al. 2022: y = Attn(probe, tokens); y + MLP(norm(y)). No QK-norm, positions or LayerScale."""
    y = attention(config, below(w, "attention"), w["probe"], tokens, qk_norm="none", turns=None)
    return (y + mlp(config, below(w, "mlp"), norm(config, below(w, "norm"), y)))[0]


def sincos(width: int, row: int, column: int) -> np.ndarray:
    """MoCo v3: sin and cos of the column, then of the row, at frequencies 10000^(-j / (D/4)), j < D/4."""
    values = []
    for place in (column, row):
        for function in (math.sin, math.cos):
            values += [function(place / 10_000 ** (j / (width / 4))) for j in range(width // 4)]
    return np.array(values)


def rope_turn(config: ModelConfig, grid: tuple[int, int], place: tuple[int, int]) -> np.ndarray:
    """The unit complex numbers (H/2,) by which a patch's pairs of dims turn: by its row, then by its column.

    DINOv3 turns by a patch's centre in [-1, 1], EVA-02 by its index in a grid of `rope_grid` rows and columns.
    """
    angles = []
    for i, n in zip(place, grid, strict=True):
        turn = i / n * config.rope_grid if config.rope_grid else 2 * math.pi * ((i + 0.5) / n * 2 - 1)
        for j in range(config.head_dim // 4):
            angles.append(turn / config.rope_base ** (2 * j / (config.head_dim / 2)))
    return np.exp(1j * np.array(angles))


def turned(x: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """(T, H) with each pair of dims (d, d + H/2), read as a complex number, multiplied by its turn."""
    half = x.shape[1] // 2
    z = (x[:, :half] + 1j * x[:, half:]) * turns
    return np.concatenate([z.real, z.imag], axis=1)
