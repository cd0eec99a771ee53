"""A ViT-Ti-sized student learns CIFAR-10 from a model of the ladder, in one of the ways of Beyer et al.

`distill_cifar10.py:TEACHING` takes function_matching, consistent, independent, fixed; or labels, for the same student
without a teacher. 32 px in patches of 4. benchmarks/distill_quality.py runs all, with several seeds.

Source: Beyer et al. 2022 (arXiv 2106.05237), section 3, for the ways of teaching; the rest is this project's.
Command: python launch/tpu.py --config recipes/distill_cifar10.py:function_matching
    after: python launch/tpu.py --config recipes/cifar10.py:30M
Not run.
"""

import dataclasses

from distill.config import DistillConfig, DistillRecipe
from recipes import cifar10
from vit22b.config import Recipe
from vit22b.errors import check_choice
from vit22b.model_config import SIZES, size

TEACHINGS = ("function_matching", "consistent", "independent", "fixed", "labels")


def get_config(arg: str = "function_matching") -> Recipe:
    check_choice("teaching", arg, TEACHINGS)
    teacher = cifar10.get_config("30M")
    shape = size("Ti", SIZES)
    student = dataclasses.replace(teacher.model, **shape, scan_unroll=shape["depth"])
    recipe = dataclasses.replace(teacher, name=f"distill_cifar10_{arg}", model=student)
    if arg == "labels":
        return recipe
    fields = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    mixup = 1.0 if arg == "function_matching" else 0.0
    # A teacher sees images as it was evaluated, or as it was trained: without mixing, where that is not the point.
    return DistillRecipe(
        **fields | {"data": dataclasses.replace(recipe.data, mixup=mixup)},
        distill=DistillConfig(teachers=(f"runs/{teacher.name}",), teaching=arg),
    )
