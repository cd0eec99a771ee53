"""Checkpoints: written while training goes on, restored onto any mesh, bit for bit.

On disk an array's name is its path in the state ('model/blocks/attention/query'); beside the arrays lies the
data position. Orbax writes into a temporary folder and renames it, so that a folder named by a step is whole.
"""

import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from vit22b.config import Recipe
from vit22b.errors import RecipeError, check
from vit22b.names import named_leaves


def restore_model(folder: Path, abstract, member: str = ""):
    """The model of the newest checkpoint in `folder`, without the rest of the state; its average where there is one.

    Placed, and in the dtypes, as `abstract` says. Where several models were trained together, `member` names one; else
    it is the first student. Raises `RecipeError`.
    """
    steps = [int(path.name) for path in folder.glob("*") if path.name.isdecimal()]
    check(bool(steps), "checkpoints", folder, "has none; give the work directory of a run that has saved one")
    path = folder.absolute() / str(max(steps)) / "state"
    checkpointer, leaves = ocp.PyTreeCheckpointer(), named_leaves(abstract)
    try:
        saved = checkpointer.metadata(path).item_metadata.tree
        prefix = _prefix(set(saved), list(leaves), member)
        wrong = [name for name, leaf in leaves.items() if tuple(saved[prefix + name].shape) != leaf.shape]
        if not wrong:
            wanted = {prefix + name: leaf for name, leaf in leaves.items()}
            placed = {n: ocp.ArrayRestoreArgs(sharding=x.sharding, dtype=x.dtype) for n, x in wanted.items()}
            arguments = ocp.args.PyTreeRestore(item=wanted, restore_args=placed, partial_restore=True)
            restored = checkpointer.restore(path, args=arguments)
    except RecipeError:
        raise
    except Exception as error:  # orbax, tensorstore and the file system each raise their own
        raise RecipeError(f"{path}: cannot be restored ({type(error).__name__})") from error
    if wrong:
        found, expected = tuple(saved[prefix + wrong[0]].shape), leaves[wrong[0]].shape
        raise RecipeError(f"{path}: {wrong[0]} has shape {found}, not {expected}; is recipe.json of another run?")
    return jax.tree.unflatten(jax.tree.structure(abstract), [restored[name] for name in wanted])


def _prefix(saved: set[str], names: list[str], member: str) -> str:
    """What stands before a model's own names in a checkpoint."""
    found = {name.removesuffix(names[0]) for name in saved if name.endswith(f"/{names[0]}")}
    whole = sorted(p for p in found if p.split("/")[0] in ("ema", "model") and {p + name for name in names} <= saved)
    of_member = [p for p in whole if f"/{member or 'student'}/" in p] or ([] if member else whole)
    if not of_member:
        there = ", ".join(sorted(saved)[:3])
        raise RecipeError(f"member={member!r}: no such model in the checkpoint, which holds {there}, ...")
    return of_member[0]  # 'ema' before 'model'


class Checkpoints:
    """The checkpoints of one run, in `folder/STEP`, the newest `keep_checkpoints` of them."""

    def __init__(self, folder: Path, recipe: Recipe):
        self._recipe = recipe
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=recipe.run.keep_checkpoints, enable_async_checkpointing=True, create=True
            ),
        )
        self.signal: signal.Signals | None = None  # what asked this process to stop

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state) -> None:
        """Starts writing; returns once the arrays may change again. A step already there is left as it is."""
        if step == self.latest_step:
            return
        position = {"next_example": step * self._recipe.batch_size, "seed": self._recipe.seed}
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(named_leaves(state)), data=ocp.args.JsonSave(position)),
        )

    def restore(self, abstract):
        """The newest state, placed as `abstract` says; raises `RecipeError` where it belongs to another stream."""
        step = self.latest_step
        assert step is not None
        names, structure = named_leaves(abstract), jax.tree.structure(abstract)
        wanted = ocp.args.Composite(state=ocp.args.StandardRestore(names), data=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=wanted)
        except Exception as error:  # orbax, tensorstore and the file system each raise their own
            raise RecipeError(
                f"{self._manager.directory / str(step)}: cannot be restored ({type(error).__name__}); if damaged, "
                "remove that folder to go on from the checkpoint before it"
            ) from error
        expected = step * self._recipe.batch_size
        if restored.data["next_example"] != expected:
            raise RecipeError(
                f"batch_size={self._recipe.batch_size}: the checkpoint of step {step} stopped at example "
                f"{restored.data['next_example']}, not {expected}; use the batch size it was made with"
            )
        return jax.tree.unflatten(structure, [restored.state[name] for name in names])

    @contextlib.contextmanager
    def stopping_on(self, *signals: signal.Signals) -> Iterator[None]:
        """Within it, one of these signals ends training after the current step, with a checkpoint; two do at once.

        With several processes JAX's own service handles SIGTERM, so that all stop after the same step.
        """
        if jax.process_count() > 1:
            yield
            return
        before = {number: signal.signal(number, self._on_signal) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        print(f"{self.signal.name}: stopping after the current step; once more to stop at once", file=sys.stderr)

    def preempted(self, step: int) -> bool:
        """Whether to save and stop after `step`; all processes agree."""
        if jax.process_count() > 1:
            self.signal = signal.SIGTERM if self._manager.reached_preemption(step) else None
        return self.signal is not None

    def wait(self) -> None:
        """Returns once everything saved is on disk."""
        self._manager.wait_until_finished()
