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
from vit22b.activations import ACTIVATIONS, STEEPEST
from vit22b.layers import Norm
from vit22b.linear import KERNEL_IN, KERNEL_OUT
from vit22b.model_config import ModelConfig
from vit22b.sharding import HIDDEN, RESIDUAL, SPLIT

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


def column_and_gradients(x, ws, dys, mesh: MeshFactory, shape=(1, 1, 1), pallas: bool = False) -> tuple:
    """`fp8.column` of bf16 x and fp32 kernels, and its gradients for bf16 dys: arrays on the host, in fp32."""
    with mesh(*shape) as m:
        put = lambda value, spec, dtype: jax.device_put(value.astype(dtype), NamedSharding(m, spec))  # noqa: E731
        x = put(x, RESIDUAL, ml_dtypes.bfloat16)
        ws = [put(w, KERNEL_IN, np.float32) for w in ws]
        dys = [put(dy, HIDDEN, ml_dtypes.bfloat16) for dy in dys]

        @jax.jit
        def run(x, ws, dys):
            ys, vjp = jax.vjp(lambda x, ws: fp8.column(x, fp8.largest(x), ws, ("mlp",) * len(ws), pallas), x, ws)
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
            y, vjp = jax.vjp(lambda xs, ws: fp8.row(xs, ws, ("mlp",) * len(ws), False), xs, ws)
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


# An MLP between norm and residual stream: x, kernel up, bias, kernel down, gradient of the result.
MLP_SHAPES = ((8, 20, 256), (256, 512), (512,), (512, 256), (8, 20, 256))
NAMES = ("value", "x", "up", "bias", "down")


def mlp_operands(outliers: bool) -> list[np.ndarray]:
    """x as a norm gives it, kernels of a trained size; with `outliers` some channels and rows are far larger."""
    x, up, bias, down, dz = operands(normal, MLP_SHAPES)
    up, down = up / 16, down / 22
    if outliers:
        up[:, 3] *= 30
        down[7] *= 30
        x[..., 5] *= 20
        dz[3] *= 100
    x = x / np.sqrt(np.mean(x**2, -1, keepdims=True))
    return [x, up, 0.1 * bias, down, dz]


def mlp_and_gradients(arrays, length, mesh: MeshFactory, shape=(1, 1, 1), name="gelu_tanh", pallas=False) -> list:
    """`fp8.mlp` and its gradients, or, without a `length`, the same of layers that scale by largest magnitudes."""
    specs = (RESIDUAL, KERNEL_IN, SPLIT, KERNEL_OUT, RESIDUAL)
    dtypes = (ml_dtypes.bfloat16, np.float32, np.float32, np.float32, ml_dtypes.bfloat16)
    with mesh(*shape) as m:
        put = zip(arrays, specs, dtypes, strict=True)
        x, up, bias, down, dz = (jax.device_put(a.astype(d), NamedSharding(m, spec)) for a, spec, d in put)

        def current(x, up, bias, down):
            (y,) = fp8.column(x, fp8.largest(x), [up], ("mlp",), pallas)
            hidden = ACTIVATIONS[name](y.astype(jnp.float32) + bias).astype(jnp.bfloat16)
            return fp8.row([hidden], [down], ("mlp",), pallas)

        def bounded(x, up, bias, down):
            return fp8.mlp(x, jnp.float32(length), up, bias, down, name, pallas)

        @jax.jit
        def run(x, up, bias, down, dz):
            z, vjp = jax.vjp(current if length is None else bounded, x, up, bias, down)
            return [z, *vjp(dz)]

        found = run(x, up, bias, down, dz)
        assert [jax.typeof(a).sharding.spec for a in found] == [RESIDUAL, *specs[:4]]
        assert [a.dtype for a in found] == [jnp.bfloat16, *dtypes[:4]]
        return [np.asarray(a).astype(np.float64) for a in found]


def exact_mlp(x, up, bias, down, dz, name="gelu_tanh") -> list[np.ndarray]:
    """In fp32 by autodiff of the plain formula, from the bf16 values that the layers read."""
    x, dz = (a.astype(ml_dtypes.bfloat16).astype(np.float32) for a in (x, dz))
    with jax.default_matmul_precision("highest"):
        z, vjp = jax.vjp(lambda x, up, b, down: ACTIVATIONS[name](x @ up + b) @ down, x, up, bias, down)
        return [np.asarray(a, np.float64) for a in (z, *vjp(dz))]


def relative_errors(found: list, exact: list) -> dict[str, float]:
    pairs = zip(NAMES, found, exact, strict=True)
    return {name: float(np.linalg.norm(f - e) / np.linalg.norm(e)) for name, f, e in pairs}


@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("name", STEEPEST)
def test_an_mlp_scaled_by_bounds_errs_as_much_as_one_scaled_by_largest_magnitudes(outliers, name, mesh) -> None:
    arrays = mlp_operands(outliers)
    exact = exact_mlp(*arrays, name)
    bounded = relative_errors(mlp_and_gradients(arrays, 16.0, mesh, name=name), exact)
    current = relative_errors(mlp_and_gradients(arrays, None, mesh, name=name), exact)
    for key in NAMES:
        assert 0.01 < bounded[key] < 1.1 * current[key] < 0.2, key
    # 40 times the bound, 5 binades more than needed, change next to nothing.
    loose = relative_errors(mlp_and_gradients(arrays, 40 * 16.0, mesh, name=name), exact)
    assert all(loose[key] < 1.2 * current[key] for key in NAMES)


def test_bounds_hold_where_rows_and_columns_point_the_same_way(mesh: MeshFactory) -> None:
    """The worst case of Cauchy's and Schwarz's inequality, at which a tighter scale would give NaN or infinity."""
    x, up, bias, down, dz = mlp_operands(outliers=False)
    column, row = up[:, 11], down[11]
    x[2, 3] = 16 * column / np.linalg.norm(column)
    dz[2, 3] = 8 * np.sign(row)
    down[11] = np.abs(row).max() * np.sign(row)
    arrays = [x, up, bias, down, dz]
    found = mlp_and_gradients(arrays, 16.0, mesh)
    assert all(np.isfinite(f).all() for f in found)
    errors = relative_errors(found, exact_mlp(*arrays))
    assert max(errors.values()) < 0.15


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_kernels_round_an_mlp_to_fp8_as_xla_does(shape: tuple, mesh: MeshFactory) -> None:
    """Interpreted on a CPU. On meshes partial sums are rounded to bf16, in either form to the same."""
    arrays = mlp_operands(outliers=True)
    plain = mlp_and_gradients(arrays, 16.0, mesh, shape)
    kernels = mlp_and_gradients(arrays, 16.0, mesh, shape, pallas=True)
    assert max(relative_errors(kernels, plain).values()) < 1e-3
    column = [column_and_gradients(*split_operands(), mesh, shape, pallas) for pallas in (False, True)]
    for a, b in zip(*map(jax.tree.leaves, column), strict=True):
        np.testing.assert_array_equal(a, b)


def split_operands() -> tuple:
    x, w, v, dy, dz = operands(lambda rng, s: normal(rng, (8, *s[1:]) if len(s) == 3 else s), COLUMN_SHAPES)
    return x, [w, v], [dy, dz]


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_no_row_of_a_norm_is_longer_than_its_length(kind: str, mesh: MeshFactory) -> None:
    config = ModelConfig(
        width=64, depth=1, mlp_dim=64, num_heads=2, num_classes=2, norm=kind, norm_bias=kind == "layer"
    )
    rng = np.random.default_rng(4)
    with mesh():
        norm = Norm(64, config)
        norm.scale[...] = jnp.asarray(rng.normal(size=64), jnp.float32)
        largest = np.abs(np.asarray(norm.scale[...]))
        if norm.bias is not None:
            norm.bias[...] = jnp.asarray(rng.normal(size=64), jnp.float32)
        x = rng.normal(size=(500, 64)) * 10.0 ** rng.integers(-3, 4, (500, 1))
        x[0] = 1e3 * (largest == largest.max())  # all in the channel that is scaled most
        rows = np.linalg.norm(np.asarray(norm(jnp.asarray(x, jnp.bfloat16)), np.float64), axis=1)
        length = float(norm.length())
    assert (rows <= length).all()
    if kind == "rms":
        assert rows[0] > 0.98 * length  # and not much longer than need be
