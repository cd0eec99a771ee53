"""Recipes of runs that learn from frozen teachers."""

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vit22b.config import Recipe, View
from vit22b.errors import RecipeError, check, check_choice
from vit22b.model_config import ALL_SIZES, ModelConfig, resized

if TYPE_CHECKING:
    from distill.objective import Distillation


@dataclasses.dataclass(kw_only=True, slots=True)
class DistillConfig:
    """Who teaches, what the teachers see, and what of them is learned.

    A teacher is the work directory of a run, of one with several students as RUN@NAME, or of what launch/convert.py
    made; 'random:RECIPE.py' is an untrained model, for timing. It computes at an image size of its own, and with the
    mean and std that it was trained with.

    The four ways of teaching are those of [Beyer 2022, section 3]: 'function_matching': teacher and student see the
    same crop, mixed with another image; 'consistent': the same crop; 'independent': each a random crop of its own;
    'fixed': the teacher sees the image as its evaluation does.
    """

    teachers: tuple[str, ...]
    image_sizes: tuple[int, ...] = ()  # of each teacher; (): its own
    # How each sees images in evaluation, for 'fixed' and for its accuracy, as fields of `DataConfig`; (): its own.
    eval_crop_fractions: tuple[float, ...] = ()
    eval_resizes: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()  # of each teacher in the loss; (): all 1
    matmul: str = "bf16"  # the teachers': 'bf16', 'fp32', 'fp8'
    sharding: str = "fsdp"  # of their parameters: 'fsdp', as the student's; 'replicated', but for tensor parallelism
    teaching: str = "function_matching"
    match: str = "logits"  # 'logits'; 'features': of teachers without a classifier
    temperature: float = 1.0  # of logits, in both distributions
    label_weight: float = 0.0  # w: the loss is (1 - w) x teachers' + w x labels'
    # With match='features', of standardised features (mean 0, variance 1 in each dimension, over some batches):
    widths: tuple[int, ...] = ()  # of each teacher's features
    summary_weight: float = 1.0  # of the pooled features
    patch_weight: float = 1.0  # of the patches', resized to the student's grid
    adaptor_dim: int = 2048  # hidden dims of the heads between the student's features and each teacher's
    statistics_batches: int = 8
    # A folder with what the teachers said of the views of the first `cached_steps` steps (distill/cache.py), made by
    # launch/teach.py: these are seen again and again. '': teachers compute beside the student.
    cache: str = ""
    cached_steps: int = 0
    top_k: int = 32  # classes stored of each view
    # Further students that learn from the same teachers' passes: rows of vit22b/model_config.py's tables of sizes.
    more_students: tuple[str, ...] = ()

    def validate(self, recipe: Recipe) -> None:
        check(len(self.teachers) >= 1, "distill.teachers", self.teachers, "name at least one work directory")
        self._validate_teachers()
        check_choice("distill.matmul", self.matmul, ("bf16", "fp32", "fp8"))
        check_choice("distill.sharding", self.sharding, ("fsdp", "replicated"))
        check_choice("distill.teaching", self.teaching, ("function_matching", "consistent", "independent", "fixed"))
        check_choice("distill.match", self.match, ("logits", "features"))
        check(self.temperature > 0, "distill.temperature", self.temperature, "must be positive")
        check(0 <= self.label_weight < 1, "distill.label_weight", self.label_weight, "must be in [0, 1)")
        check(self.cached_steps >= 0, "distill.cached_steps", self.cached_steps, "must be 0 (no cache) or more")
        check(
            bool(self.cache) == bool(self.cached_steps),
            "distill.cached_steps",
            self.cached_steps,
            "goes with distill.cache: give both or neither",
        )
        for name in ("adaptor_dim", "statistics_batches", "top_k"):
            check(getattr(self, name) >= 1, f"distill.{name}", getattr(self, name), "must be at least 1")
        self._validate_match()
        mixed = bool(recipe.data.mixup or recipe.data.cutmix)
        if self.teaching == "function_matching":
            check(
                mixed, "data.mixup", recipe.data.mixup, "function matching mixes images; give 1.0, or use 'consistent'"
            )
        else:
            field, value = (
                ("data.mixup", recipe.data.mixup) if recipe.data.mixup else ("data.cutmix", recipe.data.cutmix)
            )
            check(not mixed, field, value, f"0 with distill.teaching={self.teaching!r}; mixing is 'function_matching'")
        for name in self.more_students:
            check_choice("distill.more_students", name, tuple(ALL_SIZES))
        check(
            len(set(self.more_students)) == len(self.more_students),
            "distill.more_students",
            self.more_students,
            "name each size once",
        )

    def _validate_teachers(self) -> None:
        """Those fields that have a value for each."""
        for teacher in self.teachers:
            ok = isinstance(teacher, str) and bool(teacher)
            check(ok, "distill.teachers", self.teachers, "needs work directories, as ('runs/a','runs/b')")
            several = tuple(part.strip() for part in teacher.split(","))
            check("," not in teacher, "distill.teachers", teacher, f"several are given as {several}")
        allowed: dict[str, tuple[Any, str, Callable[[Any], bool]]] = {
            "image_sizes": (int, "positive integers", lambda size: size > 0),
            "eval_crop_fractions": (int | float, "numbers from 0.1 to 1", lambda part: 0.1 <= part <= 1),
            "eval_resizes": (str, "'short_side' or 'square'", lambda name: name in ("short_side", "square")),
            "weights": (int | float, "positive numbers", lambda weight: 0 < weight < math.inf),
            "widths": (int, "positive integers", lambda width: width > 0),
        }
        for name, (kind, what, fits) in allowed.items():
            values, needed = getattr(self, name), name == "widths" and self.match == "features"
            ok = len(values) == len(self.teachers) or not (values or needed)
            check(ok, f"distill.{name}", values, f"needs one value for each of {len(self.teachers)} teacher(s)")
            ok = all(isinstance(v, kind) and not isinstance(v, bool) and fits(v) for v in values)
            check(ok, f"distill.{name}", values, f"needs {what}")

    def _validate_match(self) -> None:
        """What goes with one of the two and not with the other."""
        for name in ("summary_weight", "patch_weight"):
            check(getattr(self, name) >= 0, f"distill.{name}", getattr(self, name), "must not be negative")
        if self.match == "features":
            ok = self.summary_weight + self.patch_weight > 0
            check(ok, "distill.summary_weight", 0, "with distill.patch_weight=0 nothing is learned; make one positive")
            remedy = "has no effect with distill.match='features'; leave it at 1"
            check(self.temperature == 1, "distill.temperature", self.temperature, remedy)
        else:
            remedy = "has no effect with distill.match='logits'; leave it out"
            check(not self.widths, "distill.widths", self.widths, remedy)


@dataclasses.dataclass(kw_only=True, slots=True)
class DistillRecipe(Recipe):
    """A recipe whose `model` is the student, and whose batches are taught before the train step gets them."""

    distill: DistillConfig

    def validate(self) -> None:
        # Not super(): with slots, dataclasses make a new class, of which this method does not know.
        Recipe.validate(self)
        self.distill.validate(self)
        for config in self.students().values():
            config.validate()

    def students(self) -> dict[str, ModelConfig]:
        """The models that are trained, by name."""
        return {"student": self.model} | {name: resized(self.model, name) for name in self.distill.more_students}

    def check_mesh(self, data: int, model: int) -> None:
        Recipe.check_mesh(self, data, model)
        for name in self.distill.more_students:
            try:
                resized(self.model, name).check_mesh(data, model)
            except RecipeError as error:
                raise RecipeError(f"distill.more_students={name}: {error}") from error
        hidden = self.distill.adaptor_dim
        if self.distill.match == "features":
            check(hidden % data == 0, "distill.adaptor_dim", hidden, f"must be a multiple of mesh.data={data}")

    def without_cache(self) -> "DistillRecipe":
        """The recipe of the same views, taught by teachers that compute."""
        return dataclasses.replace(self, distill=dataclasses.replace(self.distill, cache="", cached_steps=0))

    def top_k(self) -> int:
        """Classes that a cache stores of each view."""
        return min(self.distill.top_k, self.model.num_classes)

    def period(self) -> int | None:
        return self.distill.cached_steps or None

    def views(self) -> tuple[View, ...]:
        """'image', and 'teacher_image' where teachers see another, or with 'fixed' 'teacher_image_I' of each of them.

        A view that several read is as large as the largest wants it. Raises `RecipeError` where the recipe does not say
        what teachers see, as `teacher.resolved` does.
        """
        own, sizes, fractions = self.model.image_size, self.distill.image_sizes, self.distill.eval_crop_fractions
        known = bool(sizes and fractions and self.distill.eval_resizes)
        check(known, "distill.image_sizes", sizes, "each teacher's own is not known here")
        if self.distill.teaching not in ("independent", "fixed"):
            return (View(name="image", size=max(own, *sizes)),)
        image = View(name="image", size=own)
        if self.distill.cache:
            return (image,)
        if self.distill.teaching == "independent":
            return image, View(name="teacher_image", size=max(sizes), stream=1)
        theirs = zip(sizes, fractions, self.distill.eval_resizes, strict=True)
        return image, *(
            View(name=f"teacher_image_{i}", size=size, eval_crop=fraction, eval_resize=resize)
            for i, (size, fraction, resize) in enumerate(theirs)
        )

    def objective(self) -> "Distillation":
        from distill.objective import Distillation

        return Distillation(self)
