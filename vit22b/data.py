"""Batches for training and evaluation, decoded in the background.

The training stream is a function of the recipe's seed and the step alone. Sample i of the run is image
`source_index(i, ...)` of the source, augmented by a generator seeded with (seed, i). Step s holds the samples from
s * batch_size on, of which process p of n takes the p-th of n equal parts. So neither the number of processes, workers
and threads nor a restart changes what a step sees, and all that a checkpoint needs to store is the step. Epochs follow
one another without a gap: a batch may end one and begin the next.
"""

import dataclasses
import functools
import math
import sys
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import grain
import numpy as np
from absl import flags
from grain.experimental import ThreadPrefetchIterDataset, index_shuffle

from vit22b.augment import eval_image, train_image
from vit22b.config import DataConfig, Recipe, View
from vit22b.errors import check
from vit22b.sources import Source, open_source

Batch = dict[str, np.ndarray]


class Stream(Iterator[Batch]):
    """The first `length` batches of an iterator of Grain.

    Its threads and processes end after these, by `close()`, with this object, or with the program. At an end of its
    own, or of the program, Grain leaves shared memory behind and complains.
    """

    def __init__(self, batches: grain.DatasetIterator[Batch], length: int) -> None:
        # In a list, so that the finalizer can drop it before the interpreter dismantles what its destructor needs.
        self._batches = [batches]
        self._remaining = length
        self.close = weakref.finalize(self, _close, self._batches)

    def __next__(self) -> Batch:
        if not (self._remaining and self._batches):
            self.close()
            raise StopIteration
        self._remaining -= 1
        return next(self._batches[0])


def _close(batches: list[grain.DatasetIterator[Batch]]) -> None:
    batches.pop().close()


def open_sources(recipe: Recipe) -> tuple[Source, Source]:
    """The training and the validation source: to be called before anything expensive is done.

    Raises `RecipeError` if one cannot be opened, has no image or more classes than the model, or if the two share
    all images or number their classes differently.
    """
    names = {"train": recipe.data.train, "validation": recipe.data.validation}
    model = recipe.model
    train, validation = (
        open_source(name, split, image_size=model.image_size, num_classes=model.num_classes)
        for split, name in names.items()
    )
    limit = recipe.data.train_images
    train.request.check(limit <= len(train), f"has {len(train)} images, fewer than data.train_images={limit}")
    train = train.some(limit) if limit else train
    for split, source in (("train", train), ("validation", validation)):
        source.request.check(len(source) > 0, "has no images")
        found = f"data.{split}={source.name!r} has {source.num_classes} classes"
        ok = source.num_classes <= model.num_classes
        check(ok, "model.num_classes", model.num_classes, f"{found}; give at least as many")
    check_alike(train, validation)
    return train, validation


def check_alike(train: Source, validation: Source) -> None:
    """Raises `RecipeError` if two sets number their classes differently or are the very same."""
    # Labels follow from the sorted folder names: a missing class would silently renumber those after it.
    differ = sorted(set(train.class_names) ^ set(validation.class_names))
    ok = not (train.class_names and validation.class_names and differ)
    few = ", ".join(differ[:3])
    validation.request.check(ok, f"class folders differ from data.train's in {few}; make empty ones if need be")
    same = train.fingerprint() == validation.fingerprint()
    validation.request.check(not same, "is the very set of data.train; name another file or folder, or a split")


def train_batches(source: Source, recipe: Recipe, start_step: int, process_index: int, process_count: int) -> Stream:
    """This process's part of the batches of steps `start_step`, `start_step` + 1, ... without end.

    Each is {'image': uint8 (b, S, S, 3), 'label': int32 (b,)} with b = batch_size / process_count, or, instead of
    'image', has the recipe's views. Decoding starts at once, in the background. Raises `RecipeError`.
    """
    size = local_batch_size(recipe, process_count)
    make = functools.partial(_train_batch, source, recipe, size, process_index)
    return _prefetch(make, start_step, sys.maxsize - start_step, recipe.data)


def eval_batches(
    source: Source, recipe: Recipe, process_index: int, process_count: int, start_batch: int = 0
) -> Stream:
    """This process's part of the batches that hold every image of `source` exactly once, unaugmented and in order.

    As in `train_batches`, with 'mask' float32 (b,): 1 for images, 0 for the black ones that fill up the last batch.
    Every process gets the same number of batches, from number `start_batch` on. Raises `RecipeError`.
    """
    size = local_batch_size(recipe, process_count)
    make = functools.partial(_eval_batch, source, recipe, size, process_index)
    return _prefetch(make, start_batch, math.ceil(len(source) / recipe.batch_size) - start_batch, recipe.data)


def local_batch_size(recipe: Recipe, process_count: int) -> int:
    """Images per process and step; raises `RecipeError` if `batch_size` is no multiple of the processes."""
    size = recipe.batch_size
    fits = math.ceil(size / process_count) * process_count
    check(size == fits, "batch_size", size, f"must be a multiple of the {process_count} processes; try {fits}")
    return size // process_count


def source_index(index: int, length: int, seed: int) -> int:
    """Which of `length` images is sample `index` of the run: each epoch is a permutation of its own."""
    epoch, position = divmod(index, length)
    if length < 2**16:
        return int(_permutation(length, seed, epoch)[position])
    # One cipher for any length, without storing a permutation. After the 4 rounds of Grain's own `shuffle` neighbours
    # stay correlated, by up to 0.5 at a length of 2^20, and a folder lies sorted by class; after 16 they do not.
    return index_shuffle(position, max_index=length - 1, seed=_epoch_seed(seed, epoch), rounds=16)


@functools.lru_cache(maxsize=8)
def _permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng(_epoch_seed(seed, epoch)).permutation(length)


@functools.lru_cache(maxsize=8)
def _epoch_seed(seed: int, epoch: int) -> int:
    """Hashed, as with seed + epoch the second epoch of seed 0 would be the first of seed 1."""
    return int(np.random.SeedSequence((seed, epoch, 1)).generate_state(1)[0])  # 1: apart from the samples' (seed, i)


def _train_batch(source: Source, recipe: Recipe, size: int, process_index: int, step: int) -> Batch:
    step %= recipe.period() or sys.maxsize
    first = step * recipe.batch_size + process_index * size

    views = recipe.views()

    def sample(position: int) -> tuple[list[np.ndarray], int]:
        index = first + position
        image, label = source[source_index(index, len(source), recipe.seed)]
        return [see(image, view, recipe, index) for view in views], label

    return _collect(sample, size, size, views, recipe.data)


def see(image: np.ndarray, view: View, recipe: Recipe, index: int) -> np.ndarray:
    """A view of sample `index`, uint8 (S, S, 3)."""
    if view.eval_crop:
        config = dataclasses.replace(recipe.data, eval_crop_fraction=view.eval_crop, eval_resize=view.eval_resize)
        return eval_image(image, config, view.size)
    entropy = (recipe.seed, index, view.stream) if view.stream else (recipe.seed, index)
    return train_image(image, recipe.data, view.size, np.random.default_rng(entropy))


def _eval_batch(source: Source, recipe: Recipe, size: int, process_index: int, step: int) -> Batch:
    first = step * recipe.batch_size + process_index * size
    count = min(max(len(source) - first, 0), size)

    def sample(position: int) -> tuple[list[np.ndarray], int]:
        image, label = source[first + position]
        return [see(image, view, recipe, first + position)], label

    config = recipe.data
    view = View(
        name="image",
        size=recipe.model.image_size,
        eval_crop=config.eval_crop_fraction,
        eval_resize=config.eval_resize,
    )
    mask = (np.arange(size) < count).astype(np.float32)
    return _collect(sample, count, size, (view,), recipe.data) | {"mask": mask}


def _collect(
    sample: Callable[[int], tuple[list[np.ndarray], int]],
    count: int,
    size: int,
    views: tuple[View, ...],
    config: DataConfig,
) -> Batch:
    """Samples 0 .. `count` - 1, made by all threads together, as one batch of `size`; what remains is 0."""
    arrays = [np.zeros((size, view.size, view.size, 3), np.uint8) for view in views]
    labels = np.zeros(size, np.int32)
    shares = min(4 * config.threads, count)  # several per thread, so that none waits long for another's large images

    def fill(share: int) -> None:
        for position in range(share, count, shares):
            images, labels[position] = sample(position)
            for array, image in zip(arrays, images, strict=True):
                array[position] = image

    list(_pool(config.threads).map(fill, range(shares)))  # a list, so that errors surface
    return {view.name: array for view, array in zip(views, arrays, strict=True)} | {"label": labels}


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """One per process, shared by all streams; made where it is used, since it cannot be sent to a worker."""
    return ThreadPoolExecutor(threads, thread_name_prefix="decode")


def _copy(batch: Batch) -> Batch:
    return {name: np.array(array) for name, array in batch.items()}


def _prefetch(make: Callable[[int], Batch], start: int, length: int, config: DataConfig) -> Stream:
    """`make(step)` for `length` steps in order, computed ahead by threads, or by `workers` processes in turn.

    Workers are spawned: they import the running script, which therefore guards its start by `__name__ == '__main__'`,
    and, through Grain, JAX, but they never touch a device.
    """
    depth = config.prefetch_batches
    # Two threads overlap the end of one batch with the start of the next.
    options = grain.ReadOptions(num_threads=min(depth, 2), prefetch_buffer_size=depth)
    dataset = grain.MapDataset.range(start, sys.maxsize).map(make).to_iter_dataset(options)
    if config.workers:
        if not flags.FLAGS.is_parsed():  # Grain reads flags of its own, which only programs under absl's `app` parse
            flags.FLAGS.mark_as_parsed()
        processes = grain.MultiprocessingOptions(num_workers=config.workers)
        # The thread starts the workers at once, and copies their batches out of shared memory, which would leak if
        # one lived to the end of the program.
        dataset = ThreadPrefetchIterDataset(dataset.mp_prefetch(processes).map(_copy), prefetch_buffer_size=1)
    batches = iter(dataset)
    batches.start_prefetch()
    return Stream(batches, length)
