"""Quantization and fp8 linear layers against NumPy and ml_dtypes, and on meshes."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import MeshFactory
from jax.sharding import NamedSharding

from vit22b import fp8
from vit22b.linear import KERNEL_IN, KERNEL_OUT
from vit22b.sharding import HIDDEN, RESIDUAL

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
# Of the format: largest value, largest relative error of a normal number (half a unit in the last of 3 or 2 bits of
# mantissa), half the distance of subnormal ones.
FORMATS = {E4M3: (448.0, 2.0**-4, 2.0**-10), E5M2: (57_344.0, 2.0**-3, 2.0**-17)}


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("size", [1e-25, 3e-5, 1.0, 1.7, 6e4, 1e30])
@pytest.mark.parametrize("source", [np.float32, ml_dtypes.bfloat16])
def test_values_are_ml_dtypes_roundings_at_a_scale_that_uses_the_range(dtype, size, source) -> None:
    rng = np.random.default_rng(0)
    x = (size * rng.normal(size=(64, 48)) * 2.0 ** rng.integers(-24, 1, (64, 48))).astype(source)
    q = jax.jit(functools.partial(fp8.quantize, dtype=dtype))(x)
    limit, relative, absolute = FORMATS[dtype]
    scale, exact = float(q.scale), x.astype(np.float64)
    assert np.frexp(scale)[0] == 0.5  # a power of two
    assert limit / 2 <= np.abs(exact).max() / scale < limit
    np.testing.assert_array_equal(np.asarray(q.values), (exact / scale).astype(np.float32).astype(dtype))
    error = np.abs(np.asarray(q.values).astype(np.float64) * scale - exact)
    assert (error <= np.maximum(relative * np.abs(exact), absolute * scale)).all()
    assert error.max() > 0


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("factor", [1 - 2**-23, 1.0, 1 + 2**-22, 1.03, 1.04, 1.5])
def test_nothing_overflows_at_the_edges_of_the_range(dtype, factor) -> None:
    """Without a margin 1.04 times the largest e4m3 value would become NaN, and 1.5 times that of e5m2 infinite."""
    x = np.float32(FORMATS[dtype][0] * factor) * 2.0 ** np.arange(-20, 21, dtype=np.float32)
    for largest in x:
        q = fp8.quantize(jnp.array([largest, -largest, 0.0]), dtype)
        assert np.isfinite(np.asarray(q.values).astype(np.float32)).all()
        assert float(q.values[0]) * float(q.scale) == pytest.approx(largest, rel=FORMATS[dtype][1])


def test_zeros_stay_zeros() -> None:
    q = fp8.quantize(jnp.zeros((4, 4)), E4M3)
    assert not np.asarray(q.values).astype(np.float32).any()
    assert np.isfinite(float(q.scale))


def operands(choose, shapes: tuple) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [choose(rng, shape).astype(np.float32) for shape in shapes]


def normal(rng, shape):
    return rng.normal(size=shape)


def powers(rng, shape):
    return rng.choice([-2.0, -1.0, -0.5, 0.5, 1.0, 2.0], shape)


def column_and_gradients(x, ws, dys, mesh: MeshFactory, shape=(1, 1, 1)) -> tuple:
    """`fp8.column` of bf16 x and fp32 kernels, and its gradients for bf16 dys: arrays on the host, in fp32."""
    with mesh(*shape) as m:
        put = lambda value, spec, dtype: jax.device_put(value.astype(dtype), NamedSharding(m, spec))  # noqa: E731
        x = put(x, RESIDUAL, ml_dtypes.bfloat16)
        ws = [put(w, KERNEL_IN, np.float32) for w in ws]
        dys = [put(dy, HIDDEN, ml_dtypes.bfloat16) for dy in dys]

        @jax.jit
        def run(x, ws, dys):
            ys, vjp = jax.vjp(lambda x, ws: fp8.column(x, ws, ("mlp",) * len(ws)), x, ws)
            return ys, vjp(dys)

        ys, (dx, dws) = run(x, ws, dys)
        assert {y.dtype for y in [*ys, dx]} == {jnp.dtype(jnp.bfloat16)}
        assert {dw.dtype for dw in dws} == {jnp.dtype(jnp.float32)}
        assert [jax.typeof(y).sharding.spec for y in [*ys, dx, *dws]] == [HIDDEN] * 2 + [RESIDUAL] + [KERNEL_IN] * 2
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float32), (ys, dx, dws))


def row_and_gradients(xs, ws, dy, mesh: MeshFactory, shape=(1, 1, 1)) -> tuple:
    """The same of `fp8.row`."""
    with mesh(*shape) as m:
        put = lambda value, spec, dtype: jax.device_put(value.astype(dtype), NamedSharding(m, spec))  # noqa: E731
        xs = [put(x, HIDDEN, ml_dtypes.bfloat16) for x in xs]
        ws = [put(w, KERNEL_OUT, np.float32) for w in ws]
        dy = put(dy, RESIDUAL, ml_dtypes.bfloat16)

        @jax.jit
        def run(xs, ws, dy):
            y, vjp = jax.vjp(lambda xs, ws: fp8.row(xs, ws, ("mlp",) * len(ws)), xs, ws)
            return y, vjp(dy)

        y, (dxs, dws) = run(xs, ws, dy)
        assert [jax.typeof(z).sharding.spec for z in [y, *dxs, *dws]] == [RESIDUAL] + [HIDDEN] * 2 + [KERNEL_OUT] * 2
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float32), (y, dxs, dws))


COLUMN_SHAPES = ((4, 8, 32), (32, 32), (32, 64), (4, 8, 32), (4, 8, 64))
ROW_SHAPES = ((4, 8, 32), (4, 8, 64), (32, 32), (64, 32), (4, 8, 32))


def products(x, ws, dys, xs, vs, dz) -> list[tuple]:
    """What column and row compute, with gradients, in the order of `all_results`: for each the pairs of matrices whose
    products it sums, by definition, and whether gradients are among them.
    """
    flat = lambda a: a.reshape(-1, a.shape[-1])  # noqa: E731
    x, dys, xs, dz = flat(x), [flat(a) for a in dys], [flat(a) for a in xs], flat(dz)
    column = [([(x, w)], False) for w in ws] + [([(dy, w.T) for dy, w in zip(dys, ws, strict=True)], True)]
    column += [([(x.T, dy)], True) for dy in dys]
    row = [(list(zip(xs, vs, strict=True)), False)] + [([(dz, v.T)], True) for v in vs]
    return column + row + [([(a.T, dz)], True) for a in xs]


def all_results(choose, mesh: MeshFactory, shape=(1, 1, 1)) -> tuple[list, list]:
    """Of `column` and `row`: results, and pairs of matrices that they are made of."""
    x, w, v, dy, dz = operands(choose, COLUMN_SHAPES)
    a, b, p, q, dc = operands(choose, ROW_SHAPES)
    column = column_and_gradients(x, [w, v], [dy, dz], mesh, shape)
    row = row_and_gradients([a, b], [p, q], dc, mesh, shape)
    return jax.tree.leaves((column, row)), products(x, [w, v], [dy, dz], [a, b], [p, q], dc)


def test_forward_and_gradients_are_fp32s_within_the_formats_rounding(mesh: MeshFactory) -> None:
    """Each element within the sum of its terms' largest errors, and all together as far off as rounding makes them.

    Relative errors of rounding are spread evenly up to 2^-4 or 2^-3 at the worst mantissa: 0.026 and 0.053 of root mean
    square, hence 0.037 for two e4m3 operands, 0.059 for one of either.
    """
    results, pairs = all_results(normal, mesh)
    for result, (factors, is_gradient) in zip(results, pairs, strict=True):
        exact = sum(a @ b for a, b in factors)
        left = FORMATS[E5M2][1] if is_gradient else FORMATS[E4M3][1]
        relative = (1 + left) * (1 + FORMATS[E4M3][1]) * (1 + 2**-7) - 1  # and bf16 before, after
        bound = relative * sum(np.abs(a) @ np.abs(b) for a, b in factors) + 0.01
        error = np.abs(result.reshape(exact.shape) - exact)
        assert (error <= bound).all()
        expected = 0.059 if is_gradient else 0.037
        assert 0.75 < np.sqrt(np.mean(error**2) / np.mean(exact**2)) / expected < 1.25


def test_powers_of_two_are_multiplied_exactly(mesh: MeshFactory) -> None:
    """Sums of up to 96 products from 1/4 to 4 in size: most fit into bf16's 8 bits, others are rounded once."""
    for result, (factors, _) in zip(*all_results(powers, mesh), strict=True):
        exact = [a @ b for a, b in factors]
        sums = [e.astype(ml_dtypes.bfloat16).astype(np.float32) for e in exact]
        assert all((s == e).mean() > 0.9 for s, e in zip(sums, exact, strict=True))
        total = functools.reduce(lambda a, b: (a + b).astype(ml_dtypes.bfloat16).astype(np.float32), sums)
        np.testing.assert_array_equal(result.reshape(total.shape), total)


def test_a_tensors_scale_is_that_of_all_its_shards(mesh: MeshFactory) -> None:
    x = np.random.default_rng(2).normal(size=(8, 3, 16)).astype(np.float32)
    x[5, 1, 13] = 100.0  # on one device alone
    with mesh(2, 2, 2) as m:
        q = jax.jit(lambda x: fp8.quantize(x, E4M3))(jax.device_put(x, NamedSharding(m, RESIDUAL)))
        assert jax.typeof(q.values).sharding.spec == RESIDUAL
    assert float(q.scale) == 0.25  # 448 / 4 = 112 > 100 >= 448 / 8
    np.testing.assert_array_equal(np.asarray(q.values), (x / 0.25).astype(E4M3))


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 8, 1), (1, 1, 8)])
def test_layers_on_a_mesh_equal_those_on_one_device(shape: tuple, mesh: MeshFactory) -> None:
    """The fp8 values are the same, so that what is left is bf16's rounding of partial sums."""
    choose = lambda rng, shape: normal(rng, (8, *shape[1:]) if len(shape) == 3 else shape)  # noqa: E731
    expected, _ = all_results(choose, mesh)
    for result, one in zip(all_results(choose, mesh, shape)[0], expected, strict=True):
        np.testing.assert_allclose(result, one, rtol=0, atol=2**-7 * np.abs(one).max())


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_stays_so(poison: float, mesh: MeshFactory) -> None:
    x, w, v, dy, dz = operands(normal, COLUMN_SHAPES)
    dz[1, 2, 3] = poison
    _, dx, (dw, dv) = column_and_gradients(x, [w, v], [dy, dz], mesh)
    assert not np.isfinite(dx).any()
    assert np.isfinite(dw).all()  # a tensor of its own
    assert not np.isfinite(dv).any()
