"""`--config FILE[:ARG]` and `--config.FIELD=VALUE`, by ml_collections, with errors in one line."""

import difflib
import re
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from vit22b.config import Recipe, RecipeError

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def parse(argv: list[str]) -> tuple[Recipe, Path | None]:
    """The recipe with its overrides, and `--workdir` if given; `argv[0]` is the program.

    Raises `RecipeError` naming the flag, its value and what would work.
    """
    overridden = [match[1] for match in (re.match(r"--?(?:no)?config\.([^=]+)", arg) for arg in argv) if match]
    # Once without the overrides, to know the fields there are; then with them.
    plain = read([arg for arg in argv if not re.match(r"--?(?:no)?config\.", arg)], strict=False)
    recipe = plain.config
    if not isinstance(recipe, Recipe):
        known = ", ".join(f"recipes/{path.name}" for path in sorted(RECIPES.glob("*.py")))
        raise RecipeError(
            f"--config={plain['config'].value and plain['config'].config_filename}: no such recipe; there are {known}"
        )
    fields = recipe.flat()
    for name in overridden:
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=3, cutoff=0.4)
            raise RecipeError(f"--config.{name}: no such field; the closest are {', '.join(close) or 'none'}")
    values = read(argv, strict=True)
    return values.config, Path(values.workdir) if values.workdir else None


def read(argv: list[str], strict: bool) -> flags.FlagValues:
    """The flags in `argv`; unless `strict`, words that are no flags are passed over."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "recipe file, with ':ARG' where it takes one", values, lock_config=False, sys_argv=argv
    )
    flags.DEFINE_string("workdir", None, "folder of the run; default: runs/NAME, with the recipe's name", values)
    try:
        rest = values(argv, known_only=not strict)
    except RecipeError:
        raise
    except flags.Error as error:
        raise RecipeError(" ".join(str(error).split())) from error
    if strict and len(rest) > 1:
        raise RecipeError(f"{rest[1]}: not a flag; a field is given as --config.FIELD=VALUE")
    return values
