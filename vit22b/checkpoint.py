"""Checkpoints: written while training goes on, restored onto any mesh, bit for bit.

On disk an array's name is its path in the state ('model/blocks/attention/query'); beside the arrays lies the
data position. Orbax writes into a temporary folder and renames it, so that a folder named by a step is whole.
"""

import signal
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from vit22b.config import Recipe, RecipeError


def named_leaves(tree) -> dict[str, jax.Array]:
    """{'model/blocks/norm/scale': array, ...} of any pytree, in its own order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


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
        self._signalled = False

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
        names, structure = named_leaves(abstract), jax.tree.structure(abstract)
        restored = self._manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(names), data=ocp.args.JsonRestore())
        )
        expected = step * self._recipe.batch_size
        if restored.data["next_example"] != expected:
            raise RecipeError(
                f"batch_size={self._recipe.batch_size}: the checkpoint of step {step} stopped at example "
                f"{restored.data['next_example']}, not {expected}; use the batch size it was made with"
            )
        return jax.tree.unflatten(structure, [restored.state[name] for name in names])

    def stop_on(self, *signals: signal.Signals) -> None:
        """Makes these signals end training after the current step, with a checkpoint."""
        for number in signals:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number, frame) -> None:
        if self._signalled:  # the second time means now
            raise KeyboardInterrupt
        self._signalled = True

    def preempted(self, step: int) -> bool:
        """Whether to save and stop after `step`; all processes agree."""
        if jax.process_count() > 1:
            return self._manager.reached_preemption(step)
        return self._signalled

    def wait(self) -> None:
        """Returns once everything saved is on disk."""
        self._manager.wait_until_finished()
