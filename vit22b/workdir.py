"""A run's folder: the resolved recipe in recipe.json, and the rule that one folder holds one run."""

import importlib.metadata
import json
import platform
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import jax

from vit22b.config import Recipe, from_flat
from vit22b.errors import RecipeError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tensorflow-datasets", "pillow")

# A resumed run may change these fields and, ending in a dot, sections: where and how it is computed, and where the data
# lie (they have fingerprints).
RESUMABLE = (
    "mesh.",
    "run.",
    "model.attention",
    "model.kernels",
    "model.remat",
    "model.scan_unroll",
    "model.overlap",
    "data.train",
    "data.validation",
    "data.workers",
    "data.threads",
    "data.prefetch_batches",
    "distill.teachers",
    "distill.sharding",
    "distill.cache",
)


def open_workdir(workdir: Path, recipe: Recipe, fingerprints: dict[str, str]) -> None:
    """Makes the folder for a new run, or checks that it holds this very run; notes the start in recipe.json.

    `fingerprints` identify the data sets. A start that was refused before its first record does not count. Raises
    `RecipeError` naming the first field that differs.
    """
    path = workdir / "recipe.json"
    identity = json.loads(json.dumps(recipe.flat() | {f"{k} fingerprint": v for k, v in fingerprints.items()}))
    if path.exists():
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            before, _ = content["recipe"], content["starts"]
        except (ValueError, KeyError, TypeError) as error:
            raise RecipeError(f"--workdir={workdir}: its recipe.json is not a run's; give a new folder") from error
        metrics = workdir / "metrics.jsonl"
        if metrics.exists() and metrics.stat().st_size:
            check_same_run(workdir, before, identity)
    else:
        if workdir.exists() and any(workdir.iterdir()):
            raise RecipeError(f"--workdir={workdir}: holds files but no recipe.json; give a new or empty folder")
        workdir.mkdir(parents=True, exist_ok=True)
        content = {"starts": []}
    content["recipe"] = identity
    content["starts"].append(describe_start())
    write_json(path, content)


def write_json(path: Path, content: object) -> None:
    """Writes or replaces a file; a kill leaves the old one or the new one."""
    temporary = own_temporary(path)
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.rename(path)


def own_temporary(path: Path) -> Path:
    """Beside `path`, to be renamed to it; no other process writes there, on whichever host."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def read_recipe(workdir: Path) -> Recipe:
    """The recipe of the run in a folder; raises `RecipeError` where there is none.

    A field that an older run does not have takes its default, one that is no longer there is passed over.
    """
    fields = read_fields(workdir)
    try:
        return from_flat(fields)
    except TypeError as error:  # a field is missing
        raise RecipeError(f"{workdir / 'recipe.json'}: is not a run's ({error})") from error


def read_fields(workdir: Path) -> dict[str, Any]:
    """The fields of the run's recipe by their dotted names, those of its kind too; raises `RecipeError`."""
    path = workdir / "recipe.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["recipe"])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RecipeError(f"{workdir}: holds no recipe.json, as the folder of a run does") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{path}: is not a run's ({error})") from error


def check_same_run(workdir: Path, old: dict[str, object], new: dict[str, object]) -> None:
    """Raises `RecipeError` unless the recipes agree in all that decides a run's result."""
    # A field that only one version of the code has decides nothing.
    decide = [name for name in old.keys() & new.keys() if not is_resumable(name)]
    what = f"--workdir={workdir}: holds another run, with"
    remedy = "give another --workdir, or the recipe it was started with"
    check_same({name: old[name] for name in decide}, {name: new[name] for name in decide}, what, remedy)


def is_resumable(field: str) -> bool:
    """Whether a resumed run may change a field, by its dotted name."""
    return any(field == name or (name.endswith(".") and field.startswith(name)) for name in RESUMABLE)


def check_same(old: dict[str, object], new: dict[str, object], what: str, remedy: str) -> None:
    """Raises `RecipeError('WHAT NAME=OLD, not NEW; REMEDY')` for the first name whose values differ."""
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            raise RecipeError(f"{what} {name}={old.get(name)!r}, not {new.get(name)!r}; {remedy}")


def describe_start() -> dict[str, object]:
    """When, with which command, code, versions and devices a run is started."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        **git_commit(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
    }


def version(package: str) -> str | None:
    """Of an installed package; None of one that is not, as one may be that a run does without."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit() -> dict[str, object]:
    """The checkout's commit and whether files differ from it; None outside git."""

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(Path(__file__).parent), *args], capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain")
    return {"commit": git("rev-parse", "HEAD"), "modified": None if status is None else bool(status)}
