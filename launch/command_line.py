"""`--config FILE[:ARG]` and `--config.FIELD=VALUE`, by ml_collections, with errors in one line."""

import argparse
import difflib
import os
import re
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from vit22b.config import Recipe
from vit22b.errors import RecipeError, check

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


TYPES = {bool: "true or false", int: "an integer", float: "a number", str: "a text", list: "numbers, as '(1,2,3)'"}


def flag_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of a program's own flags, beside those that `parse` reads; its docstring is the help.

    To be used with `parse_known_args`, of which `parse` takes what is left over. Raises `argparse.ArgumentError`.
    """
    return argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=argparse.SUPPRESS,
        allow_abbrev=False,
        exit_on_error=False,
    )


def parse(argv: list[str]) -> tuple[Recipe, Path | None]:
    """The recipe with its overrides, and `--workdir` if given; `argv[0]` is the program.

    Raises `RecipeError` naming the flag, its value and what would work.
    """
    is_override = re.compile(r"--?(?:no)?config\.([^=]+)")
    # Once without the overrides, to know the fields there are; then with them.
    plain = read([arg for arg in argv if not is_override.match(arg)], known_only=True)
    if not isinstance(plain.config, Recipe):
        if not plain["config"].present:
            raise RecipeError("--config: give a recipe, for example --config recipes/smoke.py")
        given = config_flags.get_config_filename(plain["config"])
        if Path(given.split(":")[0]).is_file():
            raise RecipeError(f"--config={given}: get_config() must return a Recipe of vit22b/config.py")
        known = ", ".join(f"recipes/{path.name}" for path in sorted(RECIPES.glob("*.py")))
        raise RecipeError(f"--config={given}: no such recipe; there are {known}")
    fields = plain.config.flat()
    overridden = {match[1]: arg for arg in argv if (match := is_override.match(arg))}
    for name in overridden:
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=3, cutoff=0.4)
            raise RecipeError(f"--config.{name}: no such field; the closest are {', '.join(close) or 'none'}")
    try:
        values = read(argv, known_only=False)
    except flags.IllegalFlagValueError as error:
        name = next(name for name in overridden if f"config.{name}=" in str(error))
        needed, now = TYPES[type(fields[name])], fields[name]
        raise RecipeError(f"{overridden[name]}: needs {needed}; the recipe has {now!r}") from error
    return values.config, writable_folder(values.workdir) if values.workdir else None


def writable_folder(workdir: str) -> Path:
    """The folder that --workdir names, which need not be there yet; raises `RecipeError` where it cannot be made."""
    # Asked of the text, since Path would make one slash of the two.
    check("://" not in workdir, "--workdir", workdir, "must be a folder of a file system; mount the bucket")
    path = Path(workdir)
    nearest = next(each for each in (path, *path.absolute().parents) if os.path.exists(each))
    check(nearest.is_dir(), "--workdir", workdir, f"{nearest} is a file; give a folder")
    check(os.access(nearest, os.W_OK | os.X_OK), "--workdir", workdir, f"{nearest} may not be written to; give another")
    return path


def read(argv: list[str], known_only: bool) -> flags.FlagValues:
    """The flags in `argv`; with `known_only`, other words are passed over. Raises as `parse` does."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "recipe file, with ':ARG' where it takes one", values, lock_config=False, sys_argv=argv
    )
    flags.DEFINE_string("workdir", None, "folder of the run; default: runs/NAME, with the recipe's name", values)
    try:
        rest = values(argv, known_only=known_only)
    except flags.IllegalFlagValueError as error:
        if "--config." in str(error) or "flag config." in str(error):
            raise
        raise RecipeError(cause(error)) from error
    except Exception as error:  # whatever the recipe's own code raises
        raise RecipeError(cause(error)) from error
    if not known_only and len(rest) > 1:
        raise RecipeError(f"{rest[1]}: not a flag; a field is given as --config.FIELD=VALUE")
    return values


def cause(error: BaseException) -> str:
    """The line that says what is wrong: a `RecipeError` below absl's and ml_collections' own errors, or theirs."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # ml_collections puts a whole traceback into its message, with what was wrong in the last line.
    line = f"--config: {lines[-1]}" if "Error whilst parsing" in lines[0] else " ".join(" ".join(lines).split())
    below: BaseException | None = error
    while below is not None:
        if isinstance(below, RecipeError) and "\n" not in str(below):
            line = str(below)
        below = below.__context__
    return line
