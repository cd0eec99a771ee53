"""Rows of features, in memory or on disk, on the devices of the mesh in force: in batches, or all at once."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Protocol

import jax
import numpy as np
from jax.sharding import get_mesh

from vit22b.train import place


class Column(Protocol):
    """One feature of every image of a set: (N, D), bf16 or fp32. NumPy's arrays are columns."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Rows by their numbers, (M,) int, in this order: (M, D)."""
        ...


@dataclasses.dataclass(frozen=True)
class Features:
    """A set of images as an encoder sees it."""

    columns: Mapping[str, Column]  # by the feature's name
    labels: np.ndarray  # (N,) int32
    num_classes: int

    def __len__(self) -> int:
        return len(self.labels)


def batches(columns: Mapping[str, Column], rows: np.ndarray, batch_size: int) -> Iterator[dict[str, jax.Array]]:
    """The columns' rows, in this order: each batch has the columns by name, (B, D), and 'mask', fp32 (B,).

    B is `batch_size` made a multiple of the devices. The last batch is filled up with rows of zeros, where the mask
    is 0, and 1 elsewhere. Each process reads its part.
    """
    size = padded(batch_size)
    for start in range(0, len(rows), size):
        yield place(part(columns, rows[start : start + size], size))


def all_rows(column: Column, rows: np.ndarray, dtype: np.dtype) -> jax.Array:
    """These rows on all devices together, (M, D): M is `len(rows)`, made a multiple of the devices with zeros."""
    return place(part({"x": column}, rows, padded(len(rows))))["x"].astype(dtype)


def padded(count: int) -> int:
    """The next multiple of the mesh's devices, which share rows evenly."""
    return -(-count // get_mesh().size) * get_mesh().size


def part(columns: Mapping[str, Column], rows: np.ndarray, size: int) -> dict[str, np.ndarray]:
    """This process's part of a batch of `size`, still on the host."""
    share = size // jax.process_count()
    mine = rows[jax.process_index() * share :][:share]
    mask = np.zeros(share, np.float32)
    mask[: len(mine)] = 1
    found = {"mask": mask}
    for name, column in columns.items():
        found[name] = np.zeros((share, *column.shape[1:]), column.dtype)
        found[name][: len(mine)] = column[mine]
    return found
