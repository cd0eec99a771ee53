"""What a train step takes, by hand from shapes alone: memory, FLOPs, bytes and a time. Nothing is compiled.

Exact are parameters, optimizer state, matmul FLOPs and what the mesh communicates. Between the matmuls a pass over a
layer is counted as one fused kernel each for norm, QK-norm, activation and residual sum, the backward pass as two
passes, like the matmuls. Left out: embedding, pooling and loss but for their matmuls, latencies, hosts and input.

GPUs: a prediction, by constants fitted to benchmarks/h200_steps.jsonl. All 15 steps recorded there, and those in bf16
of benchmarks/h200.jsonl, are met within 6 % in time and 11 % in memory (tests/test_analytic.py); none was on more than
two GPUs, and none left a server. TPUs: the same sums at full rates, hence a bound that is only good for ranking.
"""

import dataclasses
import functools
import math

from vit22b.config import DataConfig, OptimConfig, Recipe
from vit22b.flops import forward_flops
from vit22b.hardware import Chip
from vit22b.memory import state_memory
from vit22b.model_config import ModelConfig

# Fitted by least squares of the relative error to four steps on one H200: one_w6_full (wide: matmuls decide), one_1B,
# one_100M_full (narrow: memory does) and one without rematerialisation, by code that kept more and is gone.
MATMUL_EFFICIENCY = 0.73
ATTENTION_EFFICIENCY = 0.23  # of peak; in cuDNN's kernels, at 256 tokens
BANDWIDTH_EFFICIENCY = 0.52
# Layers unrolled, which do without a loop's copies: fitted to the rows of recipes/bench.py in benchmarks/h200.jsonl.
UNROLLED_BANDWIDTH_EFFICIENCY = 0.7
# Two H200s, tensor parallel without overlap; b_tp_plain alone would have 0.97, w_tp_plain 0.47.
LINK_EFFICIENCY = 0.7
# TPUs: of a ring's hops, what the compiled order of instructions left exposed in ViT-22B on 1,024 v4 chips, whose model
# axis was 2, 4 or 8: 15, 18 and 25 %. All other collectives block there, since XLA starts them early only if told to.
RING_EXPOSED = 0.2
FP32_SLOWDOWN = 15.0  # of matmuls against bf16: 67 of 989 TFLOP/s in H200's data sheet

# Values per hidden unit that the activations keep for their gradients where nothing is recomputed, and the output.
ACTIVATION_SAVES = {"gelu_tanh": 2, "gelu": 2, "swiglu": 4}
NORM_SAVES = 12  # bytes per element: three fp32 values; the kernels of vit22b/kernels keep their input alone


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """One kind of collective, as used by one purpose."""

    kind: str  # 'all-gather', 'reduce-scatter', 'all-reduce', 'collective-permute'
    per_layer: int  # how many in one layer, forward and backward together; 0: outside the layers
    total: int  # in one step
    bytes: float  # that one device receives in one step, all of them
    seconds: float
    hidden: bool  # runs beside compute
    exposed: float = 0.0  # seconds of a hidden one that compute still waits for


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    memory: dict[str, int]  # bytes per device: 'parameters', 'optimizer', 'batch', 'gradients', 'activations'
    flops: float  # matmul FLOPs that one device executes in a step, rematerialised ones included
    compute_s: float
    traffic: list[Traffic]

    @property
    def communication_s(self) -> float:
        return sum(t.seconds for t in self.traffic)

    @property
    def exposed_s(self) -> float:
        """Communication that compute waits for: what runs alone, and what is hidden but longer than compute."""
        alone = sum(t.exposed if t.hidden else t.seconds for t in self.traffic)
        return alone + max(0.0, self.communication_s - alone - self.compute_s)

    @property
    def step_s(self) -> float:
        return self.compute_s + self.exposed_s


def estimate(recipe: Recipe, chip: Chip, shape: tuple[int, int, int], devices_per_node: int) -> Estimate:
    """A step of the recipe on a mesh (replica, data, model); `devices_per_node`: GPUs of a server, joined by NVLink."""
    layer = Layer(recipe, shape, fused_attention(recipe.model, chip), gpu_kernels(recipe.model, chip))
    state = _state_memory(recipe, shape)
    flops, compute_s = _compute(recipe, chip, layer, state)
    batch = layer.images * recipe.optim.accumulate_steps * (3 * recipe.model.image_size**2 + 4)
    memory = {
        "parameters": state["parameters"],
        "optimizer": state["optimizer"],
        "batch": batch,
        "gradients": _gradients(recipe, layer, state["gradients"]),
        "activations": int(_activations(recipe, chip, layer)),
    }
    traffic = _communication(recipe, chip, layer, devices_per_node)
    return Estimate(memory=memory, flops=flops, compute_s=compute_s, traffic=traffic)


def _gradients(recipe: Recipe, layer: "Layer", whole: int) -> int:
    """Bytes of gradients at the peak, of which `whole` are those of all parameters in fp32."""
    if recipe.optim.accumulate_steps > 1:
        return 2 * whole  # the microbatches' sum, and the one that is added to it
    # In one program the optimizer reads each layer's gradients as the matmuls wrote them.
    return whole * layer.item // 4 if layer.unrolled else whole


def is_tpu(chip: Chip) -> bool:
    return chip.network_bandwidth == 0


def fused_attention(config: ModelConfig, chip: Chip) -> bool:
    """Whether a fused kernel applies, which keeps no scores; as `layers.fastest_attention` decides.

    But odd lengths count as XLA's here, as on a GPU that is no Hopper.
    """
    fits = config.matmul != "fp32" and config.head_dim % 8 == 0 and config.head_dim <= 128
    return not is_tpu(chip) and config.attention != "xla" and fits and config.num_tokens % 2 == 0


def gpu_kernels(config: ModelConfig, chip: Chip) -> bool:
    """Whether Pallas kernels compute norms and activations; as `layers.wants_kernels` decides."""
    return not is_tpu(chip) and config.kernels != "xla" and config.matmul != "fp32"


class Layer:
    """One layer's sizes on one device, for one microbatch."""

    def __init__(self, recipe: Recipe, shape: tuple[int, int, int], fused_attention: bool, kernels: bool):
        config = recipe.model
        self.replica, self.data, self.model = shape
        self.fused_attention = fused_attention
        self.remat = config.remat
        self.unrolled = config.unrolled
        self.images = recipe.batch_size // (self.replica * self.data * recipe.optim.accumulate_steps)
        self.tokens = self.images * config.num_tokens
        self.item = 4 if config.matmul == "fp32" else 2  # fp8, which no plan takes so far, would count as bf16
        self.norm_saves = self.item if kernels else NORM_SAVES
        self.gates = 2 if config.mlp == "swiglu" else 1
        self.sums = 1 if config.block == "parallel" else 2  # norms, and sums into the residual stream
        self.qk_norms = 0 if config.qk_norm == "none" else 2
        # Matrices' elements on all devices: into heads and MLP, back from attention, all.
        self.inward = (3 * config.width + self.gates * config.mlp_dim) * config.width
        self.attention_out = config.width**2
        self.matrices = self.inward + self.attention_out + config.mlp_dim * config.width
        # Values per token: the stream (split over 'model', and whole as matmuls read it), heads, MLP, scores.
        self.stream, self.whole = config.width / self.model, float(config.width)
        self.heads, self.hidden = config.width / self.model, config.mlp_dim / self.model
        self.scores = 0.0 if fused_attention else config.num_heads * config.num_tokens / self.model

    def recomputed(self) -> tuple[int, float]:
        """Matrices' elements, and passes of attention, that the backward pass computes once more."""
        if self.remat in ("none", "dots"):
            return 0, float(self.remat == "dots")
        # Not the last projections: nothing but the next layer reads them. A saved attention output spares the product
        # with the values, and cuDNN's kernel nothing, since its own gradient needs more than that.
        attention = 0.5 if self.remat == "attention" and not self.fused_attention else 1.0
        return self.inward + (self.attention_out if self.sums == 2 else 0), attention

    def saved(self, config: ModelConfig) -> float:
        """Bytes that one layer keeps for its backward pass; tests/test_analytic.py has JAX count them."""
        if self.remat != "none":
            more = {"full": 0.0, "attention": self.heads, "dots": 3 * self.heads + self.gates * self.hidden}
            streams = self.sums if self.remat == "dots" else 1
            return self.item * self.tokens * (streams * self.stream + more[self.remat])
        if self.unrolled:  # one program: XLA keeps what matmuls read, fuses the rest, and casts weights again
            return self.tokens * self.inner()
        weights = self.item * self.matrices / self.model  # cast, and gathered over 'data'
        # Rings keep their shard of what they gather, and gather again.
        read = self.item * (self.stream if config.overlap == "rings" else self.whole)
        normed = self.sums * (self.norm_saves * self.stream + read)
        attention = (self.norm_saves * self.qk_norms + 4 * self.item) * self.heads + (4 + self.item) * self.scores
        mlp = ACTIVATION_SAVES[config.mlp] * self.item * self.hidden
        return self.tokens * (normed + attention + mlp) + weights

    def inner(self) -> float:
        """Bytes per token of what a layer's kernels, each fused as far as it goes, write and read."""
        values = self.sums * (self.stream + self.whole) + (4 + self.qk_norms) * self.heads
        return self.item * (values + (1 + self.gates) * self.hidden) + (4 + self.item) * self.scores


def _activations(recipe: Recipe, chip: Chip, layer: Layer) -> float:
    """Bytes of all that lies beside state, batch and gradients at the peak, which is in the last layer's gradient."""
    config = recipe.model
    gradients = layer.item * layer.tokens * (3 * layer.heads + layer.gates * layer.hidden)
    working = layer.tokens * layer.inner() + gradients + 2 * layer.item * layer.matrices / layer.model
    # XLA for TPUs casts the weights of all layers before the loop.
    cast = layer.item * config.depth * layer.matrices / (layer.data * layer.model) if is_tpu(chip) else 0.0
    logits = 4 * (3 * layer.images * config.num_classes + 2 * config.width * config.num_classes * (layer.data > 1))
    return config.depth * layer.saved(config) + working + cast + logits


def _compute(recipe: Recipe, chip: Chip, layer: Layer, state: dict[str, int]) -> tuple[float, float]:
    """Matmul FLOPs of one device, and the seconds that they and all work on memory take."""
    config, optim, count = recipe.model, recipe.optim, recipe.optim.accumulate_steps
    remat, attention_remat = layer.recomputed()
    dense = count * config.depth * 2 * layer.tokens * (3 * layer.matrices + remat) / layer.model
    # cuDNN's backward pass computes the scores again: half a pass more.
    passes = 3 + attention_remat + 0.5 * layer.fused_attention
    attention = count * config.depth * passes * 4 * layer.tokens * config.num_tokens * config.width / layer.model
    head = 2 * config.width * config.num_classes  # the one matmul that is not split over 'model'
    embedding = 2 * config.grid**2 * 3 * config.patch_size**2 * config.width
    outside = 3 * (forward_flops(dataclasses.replace(config, depth=0)) - head)
    dense += count * layer.images * ((outside - embedding) / layer.model + 3 * head)  # images need no gradient
    if optim.name == "muon":  # five rounds of X X^T, its square, and their product with X, as if split evenly
        long = 4 * config.mlp_dim + 2 * config.width
        rounds = 4 * 6 * config.width**3 + (1 + layer.gates) * config.width**2 * long
        dense += 5 * config.depth * rounds / (layer.data * layer.model)

    # Values that one pass reads and writes: norms, QK-norms, activation, sums. Backward like two; recomputed like one.
    between = layer.sums * 2 * layer.stream + 2 * layer.qk_norms * layer.heads + (layer.gates + 1) * layer.hidden
    between += layer.sums * 2 * layer.stream + 2 * layer.stream + 4 * layer.scores
    moved = layer.tokens * layer.item * between * (3 if config.remat == "none" else 4)
    # Each chunk's product is added to those before; TPUs' matmuls do that.
    if config.overlap == "rings" and not is_tpu(chip):
        wide, narrow = 3 * layer.heads + layer.gates * layer.hidden, layer.heads + layer.hidden
        sums = (1 if config.remat == "none" else 2) * wide + narrow + 2 * layer.sums * layer.stream
        moved += 3 * (layer.model - 1) * layer.tokens * layer.item * sums
    if not config.unrolled:  # a loop's saved values go into stacked buffers, and back
        moved += 2 * layer.saved(config)
    # Weights are read in fp32 and written in bf16, once or twice; gradients the other way round.
    casts = (1 if config.remat == "none" else 2) * (4 + layer.item) + 2 * layer.item + 4
    moved += casts * layer.matrices / (layer.data * layer.model)
    moved = count * (config.depth * moved + (3 * state["gradients"] if count > 1 else 0))
    # Norm; gradients and parameters; twice more for the factored moments' sums; the state itself, in and out.
    moved += (4 + 2 * (optim.name == "adafactor")) * state["parameters"] + 2 * state["optimizer"]

    slow = FP32_SLOWDOWN if config.matmul == "fp32" else 1.0
    from_memory = UNROLLED_BANDWIDTH_EFFICIENCY if config.unrolled else BANDWIDTH_EFFICIENCY
    rates = (1.0, 1.0, 1.0) if is_tpu(chip) else (MATMUL_EFFICIENCY, ATTENTION_EFFICIENCY, from_memory)
    seconds = slow * (dense / rates[0] + attention / rates[1]) / chip.peak_flops
    return dense + attention, seconds + moved / (rates[2] * chip.memory_bandwidth)


def _communication(recipe: Recipe, chip: Chip, layer: Layer, devices_per_node: int) -> list[Traffic]:
    """Every collective of a step that moves activations, weights or gradients; norms' sums are left out."""
    config, count, depth = recipe.model, recipe.optim.accumulate_steps, recipe.model.depth
    again = int(config.remat != "none")
    traffic: list[Traffic] = []

    def add(kind: str, axis: str, number: int, size: float, hidden: bool, per_layer: bool = True):
        """`number` collectives of arrays that take `size` bytes gathered."""
        members = getattr(layer, axis)
        if members == 1 or number == 0:
            return
        share = (members - 1) / members
        total = number * count * (depth if per_layer else 1)
        received = total * size * share * (2 if kind == "all-reduce" else 1)
        rate = bandwidth(chip, (layer.replica, layer.data, layer.model), axis, devices_per_node, kind)
        ring = kind == "collective-permute"
        hops = members - 1 if ring else 1
        traffic.append(
            Traffic(
                kind=kind,
                per_layer=number * hops * per_layer,
                total=total * hops,
                bytes=received,
                seconds=received / rate,
                hidden=hidden and (ring or not is_tpu(chip)),
                exposed=RING_EXPOSED * received / rate if ring and is_tpu(chip) else 0.0,
            )
        )

    stream = layer.item * layer.tokens * layer.whole
    weights = layer.item * layer.matrices / layer.model
    if config.overlap == "rings":
        # Per sum into the stream: in and out; once more recomputed; backward in again for the kernels' gradients,
        # the output's gradient in, the input's out.
        add("collective-permute", "model", layer.sums * (5 + again), stream, hidden=True)
        # Two rings, for the kernels in and out: to gather them, again in the backward pass, and to sum gradients.
        rings = 2 * layer.sums
        add("collective-permute", "data", rings * (2 + again), weights / rings, hidden=True)
    else:
        inputs, outputs = 3 + layer.gates, 2
        # Where each layer is a program of its own, halves hide but a part, which is left out.
        beside = config.overlap == "halves" and config.unrolled and config.remat == "none"
        add("all-gather", "model", layer.sums * (2 + again), stream, hidden=beside)
        # What branches add to the stream, and the gradients through all that read it, are summed together.
        add("reduce-scatter", "model", 2 * layer.sums, stream, hidden=beside)
        kernels = inputs + outputs
        add("all-gather", "data", kernels * (1 + again), weights / kernels, hidden=True)
        add("reduce-scatter", "data", kernels, weights / kernels, hidden=True)
    # The classifier, in fp32, and pooling's six kernels or so: once a microbatch.
    pooling = layer.item * (layer.matrices / layer.model) if config.pool == "map" else 0.0
    head = 4 * config.width * config.num_classes + pooling
    kernels = 7 if config.pool == "map" else 1
    add("all-gather", "data", kernels, head / kernels, hidden=True, per_layer=False)
    add("reduce-scatter", "data", kernels, head / kernels, hidden=True, per_layer=False)
    shard = layer.matrices / (layer.data * layer.model)
    if config.overlap == "rings":  # one sum in fp32 behind the backward pass
        add("all-reduce", "replica", 1, 4 * depth * shard, hidden=False, per_layer=False)
    else:
        add("all-reduce", "replica", 1, layer.item * shard, hidden=False)
    add("all-reduce", "replica", 1, head / layer.data, hidden=False, per_layer=False)
    return traffic


def bandwidth(chip: Chip, shape: tuple[int, int, int], axis: str, devices_per_node: int, kind: str) -> float:
    """Bytes/s that a device receives at over a mesh axis; model varies fastest over devices, then data, then replica.

    TPUs: a ring with a link to either side. GPUs: NVLink where a server holds the whole axis; else the network cards
    of all members in a server work for the axis together, as in NCCL's collectives, but in a ring of permutes between
    neighbours those alone that sit at the server's edge, one direction each.
    """
    if is_tpu(chip):
        return 2 * chip.link_bandwidth
    index = ("replica", "data", "model").index(axis)
    stride = math.prod(shape[index + 1 :])
    inside = min(max(devices_per_node // stride, 1), shape[index])  # members in one server, at most
    if devices_per_node % (stride * shape[index]) == 0:  # no group is on two servers
        return LINK_EFFICIENCY * chip.link_bandwidth
    cards = min(inside, 2) if kind == "collective-permute" else inside
    return LINK_EFFICIENCY * min(cards * chip.network_bandwidth, chip.link_bandwidth)


def _state_memory(recipe: Recipe, shape: tuple[int, int, int]) -> dict[str, int]:
    """`memory.state_memory`, whose trace takes a tenth of a second, by no more than it depends on."""
    model = dataclasses.replace(recipe.model, remat="none", overlap="none", scan_unroll=1, attention="xla")
    optim = recipe.optim
    return _cached_state_memory(model, optim.name, optim.momentum_dtype, optim.ema_decay > 0, shape[1:])


@functools.lru_cache(maxsize=512)
def _cached_state_memory(
    model: ModelConfig, name: str, momentum_dtype: str, ema: bool, split: tuple[int, int]
) -> dict[str, int]:
    optim = OptimConfig(name=name, momentum_dtype=momentum_dtype, ema_decay=0.5 if ema else 0.0)
    data = DataConfig(train="synthetic", validation="synthetic")
    recipe = Recipe(name="state", total_steps=1, batch_size=1, model=model, data=data, optim=optim)
    return state_memory(recipe, (1, *split))
