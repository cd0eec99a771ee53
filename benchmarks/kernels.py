"""Checks and times the GPU kernels of vit22b/kernels against what XLA and cuDNN make of the same, at a recipe's shapes.

    python benchmarks/kernels.py [--config recipes/bench.py:L16] [--config.FIELD=VALUE ...] [--json FILE]

Needs an NVIDIA GPU. A line per kernel: microseconds of the kernel and of the other, errors of both against fp32 (norm
of the difference over norm, the largest of all results), and the microseconds that it takes to read all arguments and
write all results once at the memory bandwidth of vit22b/hardware.py. Calls are queued in twenties; the median of three.
--json appends the lines to a file. Exit status: 0; 1, if a kernel errs more than bf16 or fp8 explains; 2, a mistake.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp

from launch.command_line import flag_parser, parse
from vit22b.activations import ACTIVATIONS
from vit22b.errors import RecipeError, check
from vit22b.hardware import CHIPS, is_hopper, runs_triton
from vit22b.kernels import activations, attention, norms
from vit22b.model_config import ModelConfig

CALLS = 20
BF16, FP8 = 0.01, 0.08  # largest errors: of some roundings to bf16, and of one to e5m2

Function = Callable[..., Any]


def microseconds(fn: Function, *arguments: jax.Array) -> float:
    """Of one call of a compiled function."""
    jax.block_until_ready(fn(*arguments))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(CALLS):
            out = fn(*arguments)
        jax.block_until_ready(out)
        times.append(1e6 * (time.perf_counter() - start) / CALLS)
    return statistics.median(times)


def error(found: Any, exact: Any) -> float:
    """The largest relative error of any of some arrays."""

    def relative(f: jax.Array, e: jax.Array) -> float:
        return float(jnp.linalg.norm((f.astype(jnp.float32) - e).ravel()) / jnp.linalg.norm(e.ravel()))

    return max(relative(*pair) for pair in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True))


def gradient(fn: Function, count: int) -> Function:
    """Gradients of the first `count` arguments, given those and the gradient of the result."""
    return lambda *arguments: jax.vjp(fn, *arguments[:count])[1](arguments[count])


def in_fp32(fn: Function) -> Function:
    """The same of arguments, and with matmuls, in fp32."""

    def exact(*arguments):
        with jax.default_matmul_precision("highest"):
            return fn(*(a.astype(jnp.float32) for a in arguments))

    return exact


@dataclasses.dataclass
class Case:
    """A kernel, what does the same, their arguments, the largest error, and what is exact in fp32: `other` if None."""

    name: str
    kernel: Function
    other: Function
    inputs: list[jax.Array]
    limit: float = BF16
    exact: Function | None = None


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)


def rms_norms(epsilon: float) -> tuple[Function, Function]:
    """By the kernel, and by XLA: of x and scale."""

    def kernel(x, scale):
        return norms.norm(x, scale, None, False, epsilon)

    def other(x, scale):
        y = x.astype(jnp.float32)
        return (y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + epsilon) * scale).astype(x.dtype)

    return kernel, other


def norm_cases(config: ModelConfig, batch: int) -> list[Case]:
    found, (kernel, other) = [], rms_norms(config.norm_epsilon)
    for name, dims in (("norm", (config.width,)), ("query-key norm", (config.num_heads, config.head_dim))):
        x, grad = (normal(seed, batch, config.num_tokens, *dims) for seed in (0, 1))
        inputs = [x, jnp.ones(dims[-1]), grad]
        found.append(Case(name, kernel, other, inputs[:2]))
        found.append(Case(f"{name}, backward", gradient(kernel, 2), gradient(other, 2), inputs))
    return found


def activation_cases(config: ModelConfig, batch: int) -> list[Case]:
    name, scale = config.mlp, jnp.float32(16)
    if name not in activations.SLOPES:
        return []
    x, grad = (normal(seed, batch, config.num_tokens, config.mlp_dim) for seed in (2, 3))
    inputs = [x, jnp.zeros(config.mlp_dim), grad]

    def kernel(x, bias):
        return activations.activate(x, bias, name)

    def other(x, bias):
        return ACTIVATIONS[name](x.astype(jnp.float32) + bias).astype(x.dtype)

    def kernel_fp8(x, bias):
        return activations.activate_to_fp8(x, bias, scale, name, jnp.float8_e4m3fn)

    def kernel_fp8_backward(x, bias, grad):
        return activations.slope_to_fp8(x, bias, grad, scale, name, jnp.float8_e5m2)

    def twice(fn, dtype):
        """The first result scaled, in `dtype`, in both layouts; then the second, if there is one."""

        def run(*arguments):
            y, *rest = jax.tree.leaves(fn(*arguments))
            y = (y * scale).astype(dtype)
            return [y, jnp.moveaxis(y, -1, 0), *(r[None] for r in rest)]

        return run

    backward = gradient(other, 2)
    forward_fp8, backward_fp8 = twice(other, jnp.float8_e4m3fn), twice(backward, jnp.float8_e5m2)
    exact, exact_backward = (in_fp32(twice(fn, jnp.float32)) for fn in (other, backward))
    return [
        Case("activation", kernel, other, inputs[:2]),
        Case("activation, backward", gradient(kernel, 2), backward, inputs),
        Case("activation to fp8", kernel_fp8, forward_fp8, inputs[:2], FP8, exact),
        Case("activation to fp8, backward", kernel_fp8_backward, backward_fp8, inputs, FP8, exact_backward),
    ]


def attention_cases(config: ModelConfig, batch: int) -> list[Case]:
    shape = (batch, config.num_tokens, config.num_heads, config.head_dim)
    if not (is_hopper(jax.devices()[0]) and attention.fits(shape)):
        return []
    inputs = [normal(seed, *shape) for seed in (4, 5, 6, 7)]
    fused = "cudnn" if config.num_tokens % 2 == 0 else "xla"
    other, exact = (functools.partial(jax.nn.dot_product_attention, implementation=i) for i in (fused, "xla"))

    def both(fn: Function) -> Function:
        def run(*arguments):
            y, vjp = jax.vjp(fn, *arguments[:-1])
            return y, vjp(arguments[-1])

        return run

    def with_norm(attend: Function, norm: Function) -> Function:
        return lambda q, k, v, query_scale, key_scale: attend(norm(q, query_scale), norm(k, key_scale), v)

    norm, plain_norm = rms_norms(config.norm_epsilon)
    kernel, normed = attention.attention, functools.partial(attention.normed_attention, epsilon=config.norm_epsilon)
    # Against the norm kernel and the same attention.
    apart, normed_exact = with_norm(kernel, norm), with_norm(exact, plain_norm)
    scales = [1 + jax.random.normal(jax.random.key(seed), (config.head_dim,)) / 4 for seed in (8, 9)]
    more = [*inputs[:3], *scales, inputs[3]]
    cases = [
        Case("attention", kernel, other, inputs[:3], exact=in_fp32(exact)),
        Case("attention, both ways", both(kernel), both(other), inputs, exact=in_fp32(both(exact))),
    ]
    if not attention.fits_norms(shape):
        return cases
    return [
        *cases,
        Case("normed attention", normed, apart, more[:5], exact=in_fp32(normed_exact)),
        Case("normed attention, both ways", both(normed), both(apart), more, exact=in_fp32(both(normed_exact))),
    ]


def main() -> int:
    parser = flag_parser(__doc__)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    try:
        arguments, rest = parser.parse_known_args()
        recipe, _ = parse([sys.argv[0], *(rest or ["--config", "recipes/bench.py:L16"])])
        device = jax.devices()[0]
        check(runs_triton(device), "device", device.device_kind, "runs no Triton kernels; use an NVIDIA GPU")
    except (RecipeError, argparse.ArgumentError) as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    bandwidth = CHIPS[device.device_kind].memory_bandwidth if device.device_kind in CHIPS else None
    good = True
    makers = (norm_cases, activation_cases, attention_cases)
    for case in (case for make in makers for case in make(recipe.model, recipe.batch_size)):
        ours, theirs, inputs = jax.jit(case.kernel), jax.jit(case.other), case.inputs
        outs = jax.block_until_ready(ours(*inputs))
        size = sum(x.size * x.dtype.itemsize for x in (*inputs, *jax.tree.leaves(outs)))
        line: dict[str, object] = {
            "recipe": recipe.name,
            "kernel": case.name,
            "us": round(microseconds(ours, *inputs), 1),
            "other_us": round(microseconds(theirs, *inputs), 1),
            "floor_us": None if bandwidth is None else round(1e6 * size / bandwidth, 1),
        }
        # Some examples are enough, and all may not fit in fp32; sums over the batch are compared over those alone.
        few = [x[:8] if x.ndim > 1 else x for x in inputs]
        right = jax.jit(case.exact or in_fp32(case.other))(*few)
        line |= {"error": error(ours(*few), right), "other_error": error(theirs(*few), right), "limit": case.limit}
        good &= line["error"] <= case.limit  # type: ignore[operator]
        line |= {"device": device.device_kind, "jax": jax.__version__}
        print(json.dumps(line), flush=True)
        if arguments.json is not None:
            with arguments.json.open("a") as file:
                file.write(json.dumps(line) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
