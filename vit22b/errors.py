"""The error that a user is shown in one line, and the checks that raise it."""


class RecipeError(ValueError):
    """A mistake of the user's, told in one line: the field, the value got, what would work."""


def check(ok: bool, field: str, value: object, remedy: str) -> None:
    """Raises `RecipeError('FIELD=VALUE: REMEDY')` unless `ok`."""
    if not ok:
        raise RecipeError(f"{field}={value}: {remedy}")


def check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises `RecipeError` listing the choices unless `value` is one of them."""
    check(value in choices, field, repr(value), "choose one of " + ", ".join(choices))
