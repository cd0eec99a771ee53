"""Recipes of runs that learn from frozen teachers."""

import dataclasses
from typing import TYPE_CHECKING

from vit22b.config import Recipe, View
from vit22b.errors import check, check_choice
from vit22b.model_config import LADDER, SIZES, ModelConfig, size

if TYPE_CHECKING:
    from distill.objective import Distillation

STUDENT_SIZES = SIZES | LADDER


@dataclasses.dataclass(kw_only=True, slots=True)
class DistillConfig:
    """Who teaches, what the teachers see, and what of them is learned.

    A teacher is the work directory of a run, or of what launch/convert.py made; 'random:RECIPE.py' is an untrained
    model, for timing. It computes at an image size of its own, and with the mean and std that it was trained with.

    The four ways of teaching are those of [Beyer 2022, section 3]: 'function_matching': teacher and student see the
    same crop, mixed with another image; 'consistent': the same crop; 'independent': each a random crop of its own;
    'fixed': the teacher sees the image as evaluation does.
    """

    teachers: tuple[str, ...]
    image_sizes: tuple[int, ...] = ()  # of each teacher; (): the student's
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
        for name in ("image_sizes", "weights", "widths"):
            values = getattr(self, name)
            optional = not (name == "widths" and self.match == "features")
            ok = len(values) == len(self.teachers) or (optional and not values)
            check(ok, f"distill.{name}", values, f"needs one number for each of {len(self.teachers)} teacher(s)")
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
        for name in ("summary_weight", "patch_weight"):
            check(getattr(self, name) >= 0, f"distill.{name}", getattr(self, name), "must not be negative")
        check(all(w > 0 for w in self.weights), "distill.weights", self.weights, "must be positive")
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
            check_choice("distill.more_students", name, tuple(STUDENT_SIZES))
        check(
            len(set(self.more_students)) == len(self.more_students),
            "distill.more_students",
            self.more_students,
            "name each size once",
        )


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
        further = {name: self._resized(name) for name in self.distill.more_students}
        return {"student": self.model, **further}

    def _resized(self, name: str) -> ModelConfig:
        row = size(name, STUDENT_SIZES)
        unroll = row["depth"] if self.model.unrolled else self.model.scan_unroll
        return dataclasses.replace(self.model, **row, scan_unroll=unroll)

    def teacher_sizes(self) -> tuple[int, ...]:
        """Pixels a side of what each teacher sees."""
        return self.distill.image_sizes or (self.model.image_size,) * len(self.distill.teachers)

    def without_cache(self) -> "DistillRecipe":
        """The recipe of the same views, taught by teachers that compute."""
        return dataclasses.replace(self, distill=dataclasses.replace(self.distill, cache="", cached_steps=0))

    def top_k(self) -> int:
        """Classes that a cache stores of each view."""
        return min(self.distill.top_k, self.model.num_classes)

    def period(self) -> int | None:
        return self.distill.cached_steps or None

    def views(self) -> tuple[View, ...]:
        """'image', and 'teacher_image' where that is not the same; each as large as its largest reader wants it."""
        own, theirs = self.model.image_size, max(self.teacher_sizes())
        if self.distill.teaching not in ("independent", "fixed"):
            return (View(name="image", size=max(own, theirs)),)
        image = View(name="image", size=own)
        if self.distill.cache:
            return (image,)
        fixed = self.distill.teaching == "fixed"
        return image, View(name="teacher_image", size=theirs, plain=fixed, stream=int(not fixed))

    def objective(self) -> "Distillation":
        from distill.objective import Distillation

        return Distillation(self)
