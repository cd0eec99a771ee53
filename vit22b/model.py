"""The Vision Transformer: ViT-22B's parallel block, the sequential block, poolings and head.

Letters as in layers.py, and: C classes, L layers, I pixels of a patch. A model is a pytree: raw
`jax.jit`, `jax.grad`, `jax.lax.scan` apply to it. Blocks are stored stacked, with a leading L.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.sharding import reshard

from vit22b import init
from vit22b.halves import Halves, split, take_turns
from vit22b.layers import (
    MLP,
    Attention,
    Norm,
    Sublayer,
    add_bias,
    rope_angles,
    vector,
)
from vit22b.linear import column_parallel, gathered, read_as, residual, row_parallel, sum_replicas_later
from vit22b.matmul import DTYPES, matmul
from vit22b.model_config import ModelConfig
from vit22b.sharding import BATCH, COLUMN, ROW

# What a layer keeps for its backward pass; the rest is computed again.
REMAT = {
    "none": None,  # keeps everything
    "full": jax.checkpoint_policies.nothing_saveable,  # only the layer's input
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # matmul outputs, not attention scores
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),  # input and attention output
}


class Output(NamedTuple):
    """What a forward pass gives. Whatever a jitted caller does not use is not computed."""

    logits: jax.Array  # B C, fp32
    pooled: jax.Array  # B D, fp32: the classifier's input; B 2D where class token and mean of patches are both pooled
    tokens: jax.Array  # B T D: after the final norm, where that comes before pooling; class token and registers first
    layers: jax.Array | None  # R B T D: the residual stream after each requested layer


class Block(nnx.Module):
    """A layer. Parallel [Dehghani 2023, section 2]: x + Attn(norm x) + MLP(norm x); sequential: in turn."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        attention_key, mlp_key = jax.random.split(key)
        self.config = config
        self.norm = Norm(config.width, config)
        self.attention = Attention(config, attention_key, config.qk_norm, config.layer_scale)
        self.mlp_norm = Norm(config.width, config) if config.block == "sequential" else None
        self.mlp = MLP(config, mlp_key, config.layer_scale)

    @property
    def num_sums(self) -> int:
        """How often a layer adds to the residual stream."""
        return 1 if self.mlp_norm is None else 2

    def sublayers(self, rope: tuple | None, keep_SB11: jax.Array | None) -> list[Sublayer]:
        """What takes (B, T, D) through the layer. `keep_SB11` multiplies what each of S adds: stochastic depth."""
        norms, branches = [self.norm], [[self.attention, self.mlp]]
        if self.mlp_norm is not None:
            norms, branches = [self.norm, self.mlp_norm], [[self.attention], [self.mlp]]
        keeps = [None] * len(norms) if keep_SB11 is None else list(keep_SB11)
        return [Sublayer(n, b, self.config, rope, k) for n, b, k in zip(norms, branches, keeps, strict=True)]

    def __call__(self, x_BTD: jax.Array, rope: tuple | None, keep_SB11: jax.Array | None) -> jax.Array:
        """(B, T, D) to (B, T, D)."""
        for sublayer in self.sublayers(rope, keep_SB11):
            x_BTD = sublayer(x_BTD)
        return x_BTD


class MAPHead(nnx.Module):
    """Multi-head attention pooling: one learned query attends to all tokens, an MLP follows [Zhai 2022, appendix]."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        probe_key, attention_key, mlp_key = jax.random.split(key, 3)
        # Once a step: not worth rings, nor the rounding of fp8.
        matmul = "bf16" if config.matmul == "fp8" else config.matmul
        self.config = dataclasses.replace(config, overlap="none", matmul=matmul)
        self.probe = nnx.Param(init.xavier(probe_key, (1, config.width), P()))
        # The probe attends to tokens, not tokens to one another: mimetic initialization says nothing about that.
        config = dataclasses.replace(config, init="xavier" if config.init == "mimetic" else config.init)
        self.attention = Attention(config, attention_key, qk_norm="none", layer_scale=0.0)
        self.norm = Norm(config.width, config)
        self.mlp = MLP(config, mlp_key, layer_scale=0.0)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """(B, T, D) to (B, D)."""
        probe = self.probe[...].astype(x_BTD.dtype)
        query_B1D = jnp.broadcast_to(probe, (x_BTD.shape[0], *probe.shape), out_sharding=BATCH)
        attention, region = self.attention, self.attention.region
        query, *key_value = gathered([w[...] for w in attention.inputs], COLUMN, self.config)
        projected = column_parallel([query_B1D], [query], [region], self.config, None, False)
        projected += column_parallel(
            [reshard(x_BTD, read_as(self.config))], key_value, [region] * 2, self.config, None, False
        )
        with jax.named_scope(region):
            hidden = attention.hidden(projected, rope=None)
        out = gathered([attention.out[...]], ROW, self.config)
        y_B1D = row_parallel([hidden], out, [region], self.config, False)
        y_B1D = add_bias(y_B1D, attention.out_bias)
        return Sublayer(self.norm, [self.mlp], self.config)(y_B1D)[:, 0]


class ViT(nnx.Module):
    """A Vision Transformer classifier. Parameters fp32, created sharded on the mesh in force (`jax.set_mesh`)."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        patch_key, position_key, token_key, block_key, pool_key = jax.random.split(key, 5)
        width, num_inputs = config.width, 3 * config.patch_size**2
        self.config = config
        self.patch_kernel = nnx.Param(
            init.truncated_normal(patch_key, (num_inputs, width), COLUMN, 1 / math.sqrt(num_inputs))
        )
        self.patch_bias = vector(width)
        self.position = (
            nnx.Param(init.normal(position_key, (config.grid**2, width), COLUMN, 1 / math.sqrt(width)))
            if config.learns_positions
            else None
        )
        num_prefix = config.class_token + config.num_registers
        self.prefix = nnx.Param(init.normal(token_key, (num_prefix, width), P(), 0.02)) if num_prefix else None
        # One block after another, since mimetic initialization takes a full SVD per head.
        self.blocks = jax.lax.map(lambda k: Block(config, k), jax.random.split(block_key, config.depth))
        self.norm = None if config.final_norm == "none" else Norm(width, config)
        self.map_head = MAPHead(config, pool_key) if config.pool == "map" else None
        # Not split over 'model': next to the blocks' work on all tokens, one product per image is nothing.
        shape = (config.pooled_width, config.num_classes)
        self.head_kernel = nnx.Param(jnp.zeros(shape, jnp.float32, out_sharding=P("data", None)))
        self.head_bias = vector(config.num_classes, config.head_bias)

    def __call__(self, images: jax.Array, *, key: jax.Array | None = None, layers: tuple[int, ...] = ()) -> Output:
        """Features and logits of images (B, S, S, 3), normalised floats; S any multiple of the patch size.

        `key` turns stochastic depth on. `layers` names the blocks (0-based) whose output is returned too.
        """
        with jax.named_scope("embed"):
            x_BTD, grid = self.embed(images)
        x_BTD, kept = self.run_blocks(x_BTD, grid, key, layers)
        with jax.named_scope("norm"):
            tokens_BTD = self.norm(x_BTD) if self.norm is not None and self.config.final_norm == "tokens" else x_BTD
        with jax.named_scope("head"):
            pooled_BD = reshard(self.pool(tokens_BTD).astype(jnp.float32), BATCH)
            if self.norm is not None and self.config.final_norm == "pooled":
                pooled_BD = self.norm(pooled_BD)
            kernel_DC = reshard(self.head_kernel[...], P(None, None))
            logits_BC = matmul("bd,dc->bc", pooled_BD, kernel_DC, BATCH) + self.head_bias[...]
        return Output(logits_BC, pooled_BD, tokens_BTD, kept)

    def embed(self, images: jax.Array) -> tuple[jax.Array, tuple[int, int]]:
        """Patches with positions behind class token and registers, (B, T, D), and the grid (rows, columns)."""
        dtype, p = DTYPES[self.config.matmul], self.config.patch_size
        batch, height, width, _ = images.shape
        if height % p or width % p:
            raise ValueError(f"image of {height}x{width}: sides must be multiples of the patch size {p}")
        grid = (height // p, width // p)
        x = jax.lax.reshape(images.astype(dtype), (batch, grid[0], p, grid[1], p, 3), out_sharding=BATCH)
        x_BTI = jax.lax.reshape(
            x.transpose(0, 1, 3, 2, 4, 5), (batch, grid[0] * grid[1], p * p * 3), out_sharding=BATCH
        )
        spec = residual(batch, self.config)
        by_column = P(None, *spec[2:])
        kernel_ID = reshard(self.patch_kernel[...].astype(dtype), by_column)
        x_BTD = matmul("bti,id->btd", reshard(x_BTI, P(spec[0])), kernel_ID, spec)
        x_BTD = x_BTD + self.patch_bias[...].astype(dtype)
        position_TD = self.positions(grid)
        if position_TD is not None:
            x_BTD = x_BTD + reshard(position_TD.astype(dtype), by_column)
        if self.prefix is not None:
            shape = (batch, *self.prefix.shape)
            prefix = jnp.broadcast_to(self.prefix[...].astype(dtype), shape, out_sharding=BATCH)
            x_BTD = jnp.concatenate([reshard(prefix, spec), x_BTD], axis=1)
        return x_BTD, grid

    def positions(self, grid: tuple[int, int]) -> jax.Array | None:
        """What is added to patches, (T, D), for any grid: learned embeddings are resampled."""
        config = self.config
        if config.position == "sincos":
            return sincos_positions(grid, config.width)
        if self.position is None:
            return None
        if grid == (config.grid, config.grid):
            return self.position[...]
        table = reshard(self.position[...], P()).reshape(config.grid, config.grid, config.width)
        table = resample(table, grid, config.position_resampling)
        return reshard(table.reshape(grid[0] * grid[1], config.width), COLUMN)

    def run_blocks(
        self, x_BTD: jax.Array, grid: tuple[int, int], key: jax.Array | None, layers: tuple[int, ...]
    ) -> tuple[jax.Array, jax.Array | None]:
        """The residual stream after all blocks, and after each of `layers` (R, B, T, D)."""
        config, depth = self.config, self.config.depth
        if len(set(layers)) < len(layers) or not set(layers) <= set(range(depth)):
            raise ValueError(f"layers={layers}: give distinct numbers from 0 to {depth - 1}")
        num_prefix = x_BTD.shape[1] - grid[0] * grid[1]
        rope = rope_angles(grid, num_prefix, config) if config.rotates else None
        rates = jnp.linspace(0, config.stochastic_depth, depth)
        keys = None if key is None or config.stochastic_depth == 0 else jax.random.split(key, depth)
        # Every layer writes its output into a slot of one buffer; those not asked for share the last slot.
        slots = jnp.array([layers.index(i) if i in layers else len(layers) for i in range(depth)])
        kept = jnp.stack([jnp.zeros_like(x_BTD)] * (len(layers) + 1)) if layers else None

        # Where each layer is a program of its own, or its output is asked for, nothing waits for the next one.
        settles = not config.unrolled or config.remat != "none" or bool(layers)

        def layer(carry, inputs):
            x, kept = carry
            block, rate, slot, layer_key = inputs
            keep_SB11 = None
            if layer_key is not None:
                shape, spec = (block.num_sums, x_BTD.shape[0], 1, 1), P(None, jax.typeof(x_BTD).sharding.spec[0])
                keep_SB11 = jax.random.bernoulli(layer_key, 1 - rate, shape, out_sharding=spec).astype(jnp.float32)
                keep_SB11 = (keep_SB11 / (1 - rate)).astype(x_BTD.dtype)
            if isinstance(x, Halves):
                keeps = [None] * 2 if keep_SB11 is None else split(keep_SB11, 1)
                x.through(*(block.sublayers(rope, keep) for keep in keeps))
                if settles:
                    x.settle()
            else:
                x = block(x, rope, keep_SB11)
            if kept is not None:
                kept = jax.lax.dynamic_update_index_in_dim(kept, x.joined() if isinstance(x, Halves) else x, slot, 0)
            return (x, kept), None

        if config.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT[config.remat], prevent_cse=config.unrolled)
        blocks = sum_replicas_later(self.blocks) if config.overlap == "rings" else self.blocks
        x = Halves(split(x_BTD)) if take_turns(config, x_BTD.shape[0]) else x_BTD
        carry, inputs = (x, kept), (blocks, rates, slots, keys)
        if config.unrolled:
            for each in unstack(inputs, depth):
                carry, _ = layer(carry, each)
        else:
            carry, _ = jax.lax.scan(layer, carry, inputs, unroll=config.scan_unroll)
        x, kept = carry
        return x.joined() if isinstance(x, Halves) else x, None if kept is None else kept[:-1]

    def pool(self, tokens_BTD: jax.Array) -> jax.Array:
        """(B, T, D) to (B, D) by `config.pool`; (B, 2D) where that is two."""
        if self.map_head is not None:
            return self.map_head(tokens_BTD)
        if self.config.pool == "cls":
            return tokens_BTD[:, 0]
        num_prefix = 0 if self.prefix is None else self.prefix.shape[0]
        mean_BD = jnp.mean(tokens_BTD[:, num_prefix:].astype(jnp.float32), axis=1)
        if self.config.pool == "gap":
            return mean_BD
        both = [reshard(x_BD, BATCH) for x_BD in (tokens_BTD[:, 0].astype(jnp.float32), mean_BD)]
        return jnp.concatenate(both, axis=1)


def abstract_model(config: ModelConfig) -> ViT:
    """Shapes and shardings of a model on the mesh in force, which may be abstract; allocates nothing."""
    return jax.eval_shape(lambda: ViT(config, jax.random.key(0)))


def unstack(tree, count: int) -> list:
    """The `count` slices of each array along its first dimension, in trees like `tree`.

    Not by indexing: then each slice's gradient is padded with zeros to the whole, and all are added, for every element
    of every parameter.
    """
    leaves, treedef = jax.tree.flatten(tree)
    slices = [[part.squeeze(0) for part in jax.lax.split(leaf, [1] * count)] for leaf in leaves]
    return [jax.tree.unflatten(treedef, each) for each in zip(*slices, strict=True)]


def resample(table: jax.Array, grid: tuple[int, int], method: str) -> jax.Array:
    """Positions (rows, columns, D), replicated, on another grid; `method` as in `ModelConfig.position_resampling`."""
    if method != "cubic_plain":
        return jax.image.resize(table, (*grid, table.shape[2]), method, antialias=True)
    rows, columns = (plain_cubic_weights(new, old) for new, old in zip(grid, table.shape[:2], strict=True))
    return jnp.einsum("rh,cw,hwd->rcd", rows, columns, table, precision=jax.lax.Precision.HIGHEST)


def plain_cubic_weights(new: int, old: int) -> np.ndarray:
    """Cubic convolution [Keys 1981] with a = -0.75 along one axis: (new, old) fp32, borders repeated.

    What torch.nn.functional.interpolate(mode='bicubic') computes; its samples are the four nearest, also where the
    new grid is coarser.
    """
    a, weights = -0.75, np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * old / new - 0.5
        first = math.floor(centre) - 1
        for j in range(first, first + 4):
            x = abs(centre - j)
            near = (a + 2) * x**3 - (a + 3) * x**2 + 1
            far = a * (x**3 - 5 * x**2 + 8 * x - 4)
            weights[i, min(max(j, 0), old - 1)] += near if x <= 1 else far
    return weights.astype(np.float32)


def sincos_positions(grid: tuple[int, int], width: int) -> jax.Array:
    """Fixed 2-D sine-cosine embeddings (T, D), fp32, of patch indices, base 10,000 [Chen 2021, MoCo v3]."""
    frequencies = 10_000.0 ** -(jnp.arange(width // 4, dtype=jnp.float32) / (width / 4))
    rows, columns = jnp.meshgrid(*(jnp.arange(n, dtype=jnp.float32) for n in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequencies for axis in (columns, rows)]
    return jnp.concatenate([f(a) for a in angles for f in (jnp.sin, jnp.cos)], axis=1)
