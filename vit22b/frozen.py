"""Models that only compute: teachers, and encoders that are probed."""

import dataclasses
from typing import Any

import jax
from jax.sharding import NamedSharding, get_mesh
from jax.sharding import PartitionSpec as P

from vit22b import sharding
from vit22b.config import ModelConfig
from vit22b.matmul import DTYPES
from vit22b.model import ViT
from vit22b.names import path_name
from vit22b.optim import MATRICES


def frozen_config(trained: ModelConfig, matmul: str) -> ModelConfig:
    """As it computes here. The image size stays that of its positions, which other grids are resampled from."""
    return dataclasses.replace(
        trained,
        matmul=matmul,
        attention="auto",
        kernels="auto",
        remat="none",
        overlap=False,
        stochastic_depth=0.0,
        scan_unroll=trained.depth,
    )


def placed(abstract: ViT, replicated: bool = False) -> ViT:
    """The abstract model, matrices in the dtype of its matmuls, on the mesh in force; `replicated`: not over 'data'."""

    def place_leaf(path: tuple, leaf: Any) -> jax.ShapeDtypeStruct:
        matrix = path_name(path).split("/")[-1] in MATRICES
        spec = sharding.spec_of(leaf)
        if replicated:
            spec = P(*(None if axis == "data" else axis for axis in spec))
        dtype = DTYPES[abstract.config.matmul] if matrix else leaf.dtype
        return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=NamedSharding(get_mesh(), spec))

    return jax.tree_util.tree_map_with_path(place_leaf, abstract)
