"""Trains a recipe on whatever devices are there: `python launch/tpu.py --config recipes/smoke.py`.

Any field of the recipe can be overridden: `--config.optim.learning_rate=3e-4`. The same command again goes on
from the last checkpoint. On several hosts run it on each of them, with a --workdir that all see; TPU pods, SLURM and
Open MPI need nothing else, elsewhere set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.94")  # of a GPU; JAX's default leaves a quarter unused

import jax

from launch.command_line import parse
from launch.preparation import load_teachers, preparation, teacher_fingerprints
from vit22b import data, sharding
from vit22b.checkpoint import Checkpoints
from vit22b.config import Recipe
from vit22b.errors import RecipeError, check
from vit22b.hardware import is_hopper, multiplies_fp8, runs_triton
from vit22b.kernels import attention
from vit22b.memory import check_state_memory
from vit22b.model_config import ModelConfig
from vit22b.report import Reporter, was_evaluated
from vit22b.train import train
from vit22b.workdir import open_workdir


def check_on_devices(recipe: Recipe) -> tuple[int, int, int]:
    """The mesh's shape on the devices here. Raises `RecipeError` for what cannot work on them, data aside."""
    recipe.validate()
    devices = jax.devices()
    check(
        recipe.model.matmul != "fp8" or multiplies_fp8(devices[0]),
        "model.matmul",
        "'fp8'",
        f"{devices[0].device_kind} has no fp8 matmuls, as NVIDIA's Ada, Hopper and later and TPU7x have; use 'bf16'",
    )
    check_state_memory(recipe)
    cudnn = recipe.model.attention == "cudnn"
    check(not cudnn or devices[0].platform == "gpu", "model.attention", "'cudnn'", "needs a GPU; use 'auto' or 'xla'")
    check_attention_kernel(recipe.model, devices[0])
    check(
        recipe.model.kernels != "pallas" or devices[0].platform == "cpu" or runs_triton(devices[0]),
        "model.kernels",
        "'pallas'",
        "needs an NVIDIA GPU of compute capability 8.0 or more (or a CPU, where it is slow); use 'auto' or 'xla'",
    )
    shape = sharding.mesh_shape(recipe.mesh, len(devices))
    sharding.check_divisibility(recipe, shape)
    return shape


def check_attention_kernel(config: ModelConfig, device: jax.Device) -> None:
    """Raises `RecipeError` where model.attention asks for the kernel for Hopper, and it does not apply."""
    if config.attention != "pallas":
        return
    found = f"{device.device_kind}, {config.num_tokens} tokens, heads of {config.head_dim}, JAX {jax.__version__}"
    lengths = ", or ".join(
        f"{' to '.join(str(n) for n in sorted({r[0], r[-1]}))} tokens in heads of {dim}"
        for dim, r in attention.LENGTHS.items()
    )
    check(
        is_hopper(device) and attention.fits((1, config.num_tokens, 1, config.head_dim)),
        "model.attention",
        "'pallas'",
        f"needs an NVIDIA H100 or H200, {lengths}, and JAX 0.11.2; here: {found}; use 'auto'",
    )


def run(recipe: Recipe, workdir: Path) -> int:
    """Checks everything that can be checked, then trains. Returns the exit status: 0, or 128 + a signal's number.

    Raises `RecipeError` for what the user can mend and FloatingPointError where training diverged.
    """
    devices, shape = jax.devices(), check_on_devices(recipe)
    sources = data.open_sources(recipe)
    fingerprints = {name: source.fingerprint() for name, source in zip(("train", "validation"), sources, strict=True)}
    cache = keep_compiled_programs(devices[0].platform)
    mesh = sharding.make_mesh(shape, devices)
    with jax.set_mesh(mesh):
        recipe, teachers = load_teachers(recipe)  # before the work directory is made: what is refused leaves none
        fingerprints |= teacher_fingerprints(teachers)
    if jax.process_index() == 0:
        open_workdir(workdir, recipe, fingerprints)
    checkpoints = Checkpoints(workdir / "checkpoints", recipe)
    if checkpoints.latest_step == recipe.total_steps and was_evaluated(workdir, recipe.total_steps):
        print(f"{recipe.name}: complete after {recipe.total_steps} steps; results in {workdir}")
        return 0
    reporter = Reporter(recipe, workdir)
    reporter.note(
        f"{recipe.name}: {len(devices)} x {devices[0].device_kind}, mesh "
        + " x ".join(f"{axis} {count}" for axis, count in zip(sharding.AXES, shape, strict=True))
    )
    reporter.note(f"compiled programs are kept in {cache or 'no cache'}", on_terminal=False)
    try:
        with (
            checkpoints.stopping_on(signal.SIGTERM, signal.SIGINT),
            jax.set_mesh(mesh),
        ):
            prepare = preparation(recipe, teachers, sources, fingerprints, reporter.note)
            train(recipe, sources, checkpoints, reporter, prepare)
    finally:
        checkpoints.wait()  # also where training failed: what was saved before is still being written
        reporter.close()
    complete = checkpoints.latest_step == recipe.total_steps
    return 0 if complete or checkpoints.signal is None else 128 + checkpoints.signal


def keep_compiled_programs(platform: str) -> str | None:
    """Has JAX keep compiled programs for later runs; returns the folder, None where there is none.

    JAX_COMPILATION_CACHE_DIR says where, and empty that there is none; unset, it is ~/.cache/vit22b. CPUs get none by
    themselves: what was compiled for one does not run on every other that shares a home.
    """
    given = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    folder = given if given is not None or platform == "cpu" else str(Path.home() / ".cache" / "vit22b")
    if not folder:
        return None
    jax.config.update("jax_compilation_cache_dir", folder)
    return folder


def join_cluster() -> None:
    """Connects this process with the others of the run, if there are any.

    TPU pods, SLURM and Open MPI are known by the variables they set; elsewhere JAX_COORDINATOR_ADDRESS (HOST:PORT of
    process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID say it. Raises `RecipeError` if some of these are missing.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    missing = [name for name in names if name not in os.environ]
    if not missing:
        address, count, index = (os.environ[name] for name in names)
        if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
            raise RecipeError(
                f"JAX_PROCESS_ID={index}, JAX_NUM_PROCESSES={count}: need numbers, the first below the other"
            )
        jax.distributed.initialize(address, int(count), int(index))
        return
    if len(missing) < len(names):
        raise RecipeError(f"{missing[0]}: not set; several processes need all of {', '.join(names)}")
    tasks = max(int(os.environ.get(name, "1")) for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    if tasks > 1 or len(hosts) > 1:
        jax.distributed.initialize()


def main() -> int:
    if {"-h", "--help"} & set(sys.argv):
        print(__doc__, "vit22b/config.py and model_config.py list the fields, recipes/ holds the recipes.", sep="\n")
        return 0
    try:
        recipe, workdir = parse(sys.argv)
        join_cluster()
        return run(recipe, workdir or Path("runs") / recipe.name)
    except (RecipeError, FloatingPointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped at once; the last checkpoint stays", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
