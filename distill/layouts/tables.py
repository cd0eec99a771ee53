"""How weights of another library and ours lie to one another: one table of rules, read in both directions.

A rule ties one of their tensors, or a part of one, to one of our parameters, or to rows of one. The two sides of its
einops pattern are theirs and ours; exporting swaps them. Our blocks are stacked, theirs are not: in a name of theirs
'{}' stands for the layer, and patterns describe one layer.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import einops
import numpy as np

from vit22b.errors import RecipeError, check
from vit22b.model_config import ModelConfig

Shape = tuple[int, ...]

TRANSPOSE = "o i -> i o"  # PyTorch's linear layers are (out, in), our kernels (in, out)
CONVOLUTION = "d c p q -> (p q c) d"
SAME = "... -> ..."


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """Where values of theirs lie in ours."""

    theirs: str  # empty: theirs has no such thing; ours is zero
    ours: str = ""  # empty: we have no such thing; it must be zero unless `ignored`, and is written as zeros
    pattern: str = SAME
    part: tuple[int, int, int] | None = None  # of theirs: (dimension, start, stop)
    rows: tuple[int, int] | None = None  # of ours
    # Ours is the sum of two of theirs, of which this one is written as zeros: a class token and its position.
    added: bool = False
    optional: bool = False  # theirs may be absent, as biases that are always zero are; it is always written
    shape: Shape = ()  # of theirs, where nothing of ours says it
    ignored: bool = False  # any values of theirs will do: they do not take part in what the model computes

    def to_ours(self, theirs: np.ndarray, sizes: dict[str, int]) -> np.ndarray:
        """Our (rows of a) layer's parameter: a view of theirs, wherever the pattern allows one."""
        if self.part is not None:
            dim, start, stop = self.part
            theirs = theirs[(slice(None),) * dim + (slice(start, stop),)]
        return _rearrange(theirs, self.pattern, sizes)

    def to_theirs(self, ours: np.ndarray, sizes: dict[str, int]) -> np.ndarray:
        """The part of their tensor that comes from our layer's parameter."""
        if self.rows is not None:
            ours = ours[slice(*self.rows)]
        left, right = self.pattern.split(" -> ")
        return _rearrange(ours, f"{right} -> {left}", sizes)


def _rearrange(array: np.ndarray, pattern: str, sizes: dict[str, int]) -> np.ndarray:
    named = set(re.findall(r"\w+", pattern))
    return einops.rearrange(array, pattern, **{axis: size for axis, size in sizes.items() if axis in named})


class Table:
    """The rules of one family for one configuration, as a layout lists them.

    `published` is what is read; None for what is written, which then holds whatever the library's model has, zeros
    included.
    """

    def __init__(self, config: ModelConfig, published: "Published | None"):
        self.config, self.published = config, published
        self.rules: list[Rule] = []

    def stores(self, theirs: str) -> bool:
        """Whether theirs has that tensor, in its first layer."""
        return self.published is None or theirs.format(0) in self.published.shapes

    def add(self, theirs: str, ours: str, pattern: str = SAME, **details: Any) -> None:
        self.rules.append(Rule(theirs=theirs, ours=ours, pattern=pattern, **details))

    def absent(self, *ours: str) -> None:
        """Parameters of ours that theirs has no place for: zeros, and what is not zero cannot be written."""
        self.rules += [Rule(theirs="", ours=name) for name in ours]

    def ignored(self, theirs: str, shape: Shape) -> None:
        """A tensor that takes no part in what the model computes; written as zeros."""
        self.rules.append(Rule(theirs=theirs, shape=shape, ignored=True))

    def bias(self, theirs: str, ours: str, has: bool, size: int, pattern: str = SAME) -> None:
        """A bias that theirs always has. `has`: whether ours does; theirs must otherwise be zero."""
        if has:
            self.add(theirs, ours, pattern)
        elif self.stores(theirs):
            self.rules.append(Rule(theirs=theirs, shape=(size,)))

    def linear(self, theirs: str, ours: str, has_bias: bool, size: int) -> None:
        """A linear layer's '.weight', and its '.bias', of `size` outputs, that theirs always has."""
        self.add(f"{theirs}.weight", ours, TRANSPOSE)
        self.bias(f"{theirs}.bias", f"{ours}_bias", has_bias, size)

    def projection(self, theirs: str, ours: str, has_bias: bool, optional: bool = False) -> None:
        """A linear layer that has a bias in both or in none, as a description of theirs says; see `Rule.optional`."""
        self.add(f"{theirs}.weight", ours, TRANSPOSE)
        if has_bias:
            self.add(f"{theirs}.bias", f"{ours}_bias", optional=optional)

    def packed(self, theirs: str, parts: list[tuple[str, int]], pattern: str = SAME) -> None:
        """A tensor that holds several parameters of ours, of the given sizes, along its first dimension."""
        start = 0
        for ours, size in parts:
            self.add(theirs, ours, pattern, part=(0, start, start + size))
            start += size

    def norm(self, theirs: str, ours: str, size: int) -> None:
        """A norm's '.weight', and its '.bias', which every centred norm of theirs has and no other."""
        centred = self.config.norm == "layer"
        check(centred or not self.config.norm_bias, "model.norm_bias", "true", "no library has it without norm='layer'")
        self.add(f"{theirs}.weight", f"{ours}/scale")
        if centred:
            self.bias(f"{theirs}.bias", f"{ours}/bias", self.config.norm_bias, size)

    def class_token(self, token: str, registers: str) -> None:
        """Class token and registers, (1, n, D) each: our prefix, in this order."""
        first, n = int(self.config.class_token), self.config.num_registers
        if first:
            self.add(token, "prefix", "1 t d -> t d", rows=(0, 1))
        if n:
            self.add(registers, "prefix", "1 t d -> t d", rows=(first, first + n))

    def positions(self, theirs: str, num_prefix: int) -> None:
        """Positions (1, n, D), the first `num_prefix` of which belong to prefix tokens, to which ours adds them."""
        if num_prefix:
            part = (1, 0, num_prefix)
            self.add(theirs, "prefix", "1 t d -> t d", part=part, rows=(0, num_prefix), added=True)
        self.add(theirs, "position", "1 t d -> t d", part=(1, num_prefix, num_prefix + self.config.grid**2))

    def classifier(self, theirs: str) -> None:
        """The classifier. One class alone means none: features are all there is."""
        if self.config.num_classes > 1:
            self.add(f"{theirs}.weight", "head_kernel", TRANSPOSE)
            self.add(f"{theirs}.bias", "head_bias")
        else:
            self.absent("head_kernel", "head_bias")


def sizes_of(config: ModelConfig) -> dict[str, int]:
    """Lengths of the axes that patterns name."""
    return {"p": config.patch_size, "q": config.patch_size, "n": config.num_heads, "two": 2}


@dataclasses.dataclass(frozen=True, slots=True)
class Published:
    """What is known of weights before any is read: their description and the shapes of their tensors."""

    info: dict[str, Any]  # the content of config.json; empty where there is none
    shapes: dict[str, Shape]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """One family of models as one library stores it."""

    name: str  # as given to --layout: 'LIBRARY-FAMILY'
    rules: Callable[[ModelConfig, Published | None], list[Rule]]  # None: as they are written
    recognises: Callable[[Published], bool]
    # Fields of `ModelConfig`, as far as they are known; None: must be asked for, though it has a default.
    config: Callable[[Published], dict[str, Any]]
    describe: Callable[[ModelConfig], dict[str, Any]]  # the description that is written beside the weights
    needs: dict[str, tuple]  # field of `ModelConfig` -> the values of it that the family can express
    others: tuple[str, ...] = ()  # how names of other parts begin that lie in the same files, such as a text tower

    def check_expresses(self, config: ModelConfig) -> None:
        """Raises `RecipeError` naming the first field whose value the family does not have."""
        for field, values in self.needs.items():
            value = getattr(config, field)
            check(
                value in values,
                f"model.{field}",
                repr(value),
                f"cannot be written as {self.name}, which has {' or '.join(map(repr, values))}",
            )


def expand(rules: list[Rule], depth: int) -> Iterator[tuple[str, int | None, Rule]]:
    """Each of their tensors' names with its layer, None outside the blocks, and its rule."""
    for rule in rules:
        if "{}" in rule.theirs:
            yield from ((rule.theirs.format(layer), layer, rule) for layer in range(depth))
        elif rule.theirs:
            yield rule.theirs, None, rule


def their_shapes(rules: list[Rule], ours: Mapping[str, Shape], config: ModelConfig) -> dict[str, Shape]:
    """The shape of every tensor of theirs, from those of our parameters, stacked as they are in a model."""
    shapes: dict[str, list[int]] = {}
    for name, layer, rule in expand(rules, config.depth):
        if not rule.ours:
            shapes.setdefault(name, list(rule.shape))
            continue
        full = ours[rule.ours] if layer is None else ours[rule.ours][1:]
        shape = list(rule.to_theirs(np.broadcast_to(np.float32(0), full), sizes_of(config)).shape)
        if rule.part is not None:  # parts lie side by side: the last one's end is the tensor's
            dim, _, stop = rule.part
            shape[dim] = max(stop, shapes[name][dim] if name in shapes else 0)
        shapes[name] = shape
    return {name: tuple(shape) for name, shape in shapes.items()}


def check_tensors(rules: list[Rule], expected: Mapping[str, Shape], found: Mapping[str, Shape], config: ModelConfig):
    """Raises `RecipeError` naming tensors that are missing, unexpected or of another shape."""
    all_rules = {name: rule for name, _, rule in expand(rules, config.depth)}
    absent = [n for n in expected if n not in found and not (all_rules[n].optional or all_rules[n].ignored)]
    extra = [name for name in found if name not in expected]
    wrong = [
        f"{name} {found[name]} instead of {shape}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != shape
    ]
    problems = [
        f"{what}: {', '.join(names[:8])}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        for what, names in (("missing", absent), ("unexpected", extra), ("of another shape", wrong))
        if names
    ]
    if problems:
        raise RecipeError("tensors " + "; ".join(problems))


def read(
    rules: list[Rule],
    ours: str,
    index: tuple[slice, ...],
    shape: Shape,
    arrays: Mapping[str, np.ndarray],
    config: ModelConfig,
) -> np.ndarray:
    """The part `index` of our parameter of that global shape, fp32, reading no more of theirs than that needs."""
    bounds = [s.indices(n)[:2] for s, n in zip(index, shape, strict=True)]
    out = np.zeros([stop - start for start, stop in bounds], np.float32)
    sizes = sizes_of(config)
    wanted_rules = sorted((rule for rule in rules if rule.ours == ours), key=lambda rule: rule.added)
    for name, layer, rule in expand(wanted_rules, config.depth):
        if rule.optional and name not in arrays:
            continue
        target, wanted = out, bounds
        if layer is not None:
            if not bounds[0][0] <= layer < bounds[0][1]:
                continue
            target, wanted = out[layer - bounds[0][0]], bounds[1:]
        start, stop = wanted[0]
        first, last = (0, shape[0 if layer is None else 1]) if rule.rows is None else rule.rows
        begin, end = max(start, first), min(stop, last)
        if begin >= end:
            continue
        piece = rule.to_ours(arrays[name], sizes)
        piece = piece[(slice(begin - first, end - first), *(slice(*bound) for bound in wanted[1:]))]
        part = target[begin - start : end - start]
        part[...] = part + piece.astype(np.float32) if rule.added else piece
    return out


def check_zeros(rules: list[Rule], arrays: Mapping[str, np.ndarray], config: ModelConfig) -> None:
    """Raises `RecipeError` for a tensor of theirs that ours has no place for and that is not zero."""
    for name, _, rule in expand(rules, config.depth):
        if not rule.ours and not rule.ignored and name in arrays and np.any(arrays[name]):
            raise RecipeError(f"{name}: is not zero, and a model with this configuration has no such parameter")


def write(
    rules: list[tuple[int | None, Rule]], shape: Shape, value: Callable[[str, int | None], np.ndarray], config
) -> np.ndarray:
    """One tensor of theirs, fp32, of its rules; `value(name, layer)` gives our parameter, of one layer."""
    out = np.zeros(shape, np.float32)
    for layer, rule in rules:
        if rule.ours and not rule.added:
            dim, start, stop = rule.part or (0, 0, None)
            target = out[(slice(None),) * dim + (slice(start, stop),)] if shape else out
            target[...] = rule.to_theirs(value(rule.ours, layer), sizes_of(config))
    return out
