"""What a user types: overrides, mistakes answered in one line, and recipes that do not fit the machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from launch import tpu
from launch.command_line import parse, writable_folder
from vit22b import memory, sharding, step
from vit22b.config import Recipe
from vit22b.errors import RecipeError
from vit22b.model_config import LADDER, ModelConfig, size
from vit22b.report import read_metrics

ROOT = Path(__file__).parent.parent
SMOKE = str(ROOT / "recipes" / "smoke.py")


def parsed(*args: str) -> Recipe:
    return parse(["tpu.py", "--config", SMOKE, *args])[0]


def other_value(value: object) -> tuple[str, object]:
    """A value unlike `value` as text for the command line, and as the recipe then holds it."""
    if isinstance(value, bool):
        return str(not value).lower(), not value
    if isinstance(value, int):
        return str(value + 1), value + 1
    if isinstance(value, float):
        return str(value + 0.25), value + 0.25
    if isinstance(value, list):
        return str(tuple(v + 0.25 for v in value)), [v + 0.25 for v in value]
    return f"{value}-other", f"{value}-other"


@pytest.mark.parametrize("field", parsed().flat())
def test_every_field_can_be_overridden_alone(field):
    before = parsed().flat()
    text, value = other_value(before[field])
    assert parsed(f"--config.{field}={text}").flat() == before | {field: value}


def test_workdir_is_given_by_a_flag():
    assert parse(["tpu.py", "--config", SMOKE, "--workdir", "a/b"])[1] == Path("a/b")
    assert parse(["tpu.py", "--config", SMOKE])[1] is None
    with pytest.raises(RecipeError, match=r"--workdir=gs://bucket/run: must be a folder of a file system"):
        parse(["tpu.py", "--config", SMOKE, "--workdir", "gs://bucket/run"])


def test_a_workdir_that_cannot_be_made_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    assert writable_folder(str(tmp_path / "new" / "newer")) == tmp_path / "new" / "newer"
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(RecipeError, match=f"--workdir={path}: {tmp_path / 'file'} is a file; give a folder"):
            writable_folder(str(path))
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # permissions do not bind root
    with pytest.raises(RecipeError, match=f"--workdir={tmp_path / 'new'}: {tmp_path} may not be written to"):
        writable_folder(str(tmp_path / "new"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config.model.depht=4"], "--config.model.depht: no such field; the closest are model.depth"),
        (["--config.model.depth=four"], "--config.model.depth=four: needs an integer; the recipe has 4"),
        (["--config.model.depth=1.5"], "--config.model.depth=1.5: needs an integer"),
        (["--config.data.flip=maybe"], "--config.data.flip=maybe: needs true or false"),
        (["--config.optim.learning_rate=high"], "--config.optim.learning_rate=high: needs a number"),
        (["depth=4"], "depth=4: not a flag"),
        (["--depth=4"], "'depth'"),
        (["--config.model.depth=0"], "model.depth=0: must be at least 1"),
        (["--config.model.block=serial"], "model.block='serial': choose one of parallel, sequential"),
        (["--config.model.num_heads=5"], "model.num_heads=5: must divide model.width=96; nearest: 4, 6"),
        (["--config.model.image_size=9"], "model.image_size=9: must be a multiple of model.patch_size=2; try 8 or 10"),
        (["--config.model.pool=cls"], "needs --config.model.class_token=true"),
        (["--config.data.mean=0.5"], "data.mean=(0.5,): needs three numbers"),
        (["--config.data.train=digist"], "data.train='digist'"),
        (["--config.data.train=folder:/nowhere"], "/nowhere does not exist"),
        (["--config.seed=-1"], "seed=-1"),
        (["--config.optim.learning_rate=inf"], "optim.learning_rate=inf: must be finite"),
        (["--config.model.head_bias=nan"], "model.head_bias=nan: must be finite"),
        (["--config.name=../up"], "name='../up': must be a plain name"),
        (["--config.total_steps=3000000000"], "total_steps=3000000000: must be below"),
        (["--config.model.attention=cudnn", "--config.model.matmul=bf16"], "model.attention='cudnn': needs a GPU"),
        (
            ["--config.model.attention=pallas", "--config.model.matmul=bf16"],
            "model.attention='pallas': needs an NVIDIA H100 or H200, 193 to 256 tokens in heads of 64",
        ),
        (["--config.model.width=3000000001"], "model.num_heads=3: must divide model.width=3000000001"),
        (["--config.batch_size=100"], "batch_size=100: must be a multiple of 8 = mesh.replica=1 x mesh.data=8"),
        (["--config.mesh.data=3"], "does not fill 8 device(s)"),
        (["--config.mesh.model=8"], "mesh.model=8: must divide model.num_heads=3; the largest that does: 1"),
        (["--config.mesh.model=-1"], "at most one may be -1"),
        (["--config.optim.cooldown_steps=5"], "has no effect with optim.schedule='cosine'"),
        (["--config.optim.warmup_steps=401"], "exceeds total_steps=400"),
    ],
)
def test_a_mistake_is_answered_in_one_line(args, message, tmp_path):
    with pytest.raises(RecipeError) as caught:
        tpu.run(parsed(*args), tmp_path / "run")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_missing_recipe_is_answered_with_those_there_are():
    with pytest.raises(RecipeError, match=r"no such recipe; there are .*recipes/smoke\.py"):
        parse(["tpu.py", "--config", "recipes/smok.py"])
    with pytest.raises(RecipeError, match=r"--config: give a recipe, for example --config recipes/smoke\.py"):
        parse(["tpu.py"])


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def get_config(): raise RuntimeError('no such thing')", "no such thing"),
        ("import nothing_of_that_name", "nothing_of_that_name"),
        ("def get_config(: pass", "invalid syntax"),
        ("def get_config(): return {}", "must return a Recipe"),
        ("x = 1", "get_config"),
    ],
)
def test_a_broken_recipe_file_is_answered_in_one_line(code, message, tmp_path):
    (tmp_path / "broken.py").write_text(code)
    with pytest.raises(RecipeError) as caught:
        parse(["tpu.py", "--config", str(tmp_path / "broken.py")])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_an_argument_that_a_recipe_does_not_take_is_answered_in_one_line():
    with pytest.raises(RecipeError, match=r"^--config: TypeError: get_config\(\) takes 0 positional arguments"):
        parse(["tpu.py", "--config", f"{SMOKE}:foo"])


def test_an_unknown_rung_is_answered_with_the_ladder():
    with pytest.raises(RecipeError, match=r"size='23B': choose one of 0\.5M, .*22B"):
        parse(["tpu.py", "--config", str(ROOT / "recipes" / "vit22b.py") + ":23B"])


def test_an_empty_folder_is_answered_with_the_layout_expected(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(RecipeError, match=r"data\.train='folder:.*images'"):
        tpu.run(parsed(f"--config.data.train=folder:{tmp_path / 'images'}"), tmp_path / "run")


def test_the_22b_recipe_is_refused_before_allocating_with_sizes_that_fit(tmp_path):
    recipe, _ = parse(["tpu.py", "--config", str(ROOT / "recipes" / "vit22b.py")])
    live = len(jax.live_arrays())
    with pytest.raises(RecipeError) as caught:
        tpu.run(recipe, tmp_path / "run")
    assert len(jax.live_arrays()) == live
    # 21.9e9 parameters and gradients of 4 bytes, a bf16 momentum; by FSDP over the 8 devices.
    needed = float(str(caught.value).split("needs at least ")[1].split(" GiB")[0])
    assert needed == pytest.approx(22.4e9 * (4 + 4 + 2) / 8 / 2**30, rel=0.03)
    available = memory.device_memory(jax.devices()[0]) / 2**30
    assert f"has {available:.1f} GiB" in str(caught.value)
    named = str(caught.value).split("Sizes that fit here: ")[1].split(";")[0].split(", ")
    assert named == list(LADDER)[: len(named)]
    assert "22B" not in named
    example = str(caught.value).split("for example ")[1].split()
    assert example[:2] == ["--config", f"recipes/vit22b.py:{named[-1]}"]
    suggested, _ = parse(["tpu.py", "--config", f"{ROOT}/{example[1]}", *example[2:]])
    suggested.validate()
    state = sum(memory.state_memory(suggested, (1, 8, 1)).values())
    kept = suggested.model.depth * suggested.model.num_tokens * suggested.model.width * 2 * suggested.batch_size / 8
    assert (state + kept) / 2**30 < available


def test_state_memory_equals_the_bytes_of_real_arrays(mesh):
    recipe = parsed("--config.model.width=32", "--config.model.num_heads=2", "--config.optim.ema_decay=0.9")
    with mesh(replica=2, data=2, model=2):
        state = jax.jit(lambda: step.init_state(recipe))()
        held = {}
        for name, tree in {"parameters": state.model, "optimizer": (state.opt_state, state.ema)}.items():
            shards = [leaf.addressable_shards[0].data for leaf in jax.tree.leaves(tree)]
            held[name] = sum(shard.nbytes for shard in shards)
    expected = memory.state_memory(recipe, (2, 2, 2))
    assert {name: expected[name] for name in held} == held
    assert expected["gradients"] == held["parameters"]


def test_a_batch_too_large_for_the_compiled_step_is_refused_with_one_that_fits(mesh, monkeypatch):
    recipe = parsed("--config.batch_size=64", "--config.model.depth=1")
    with mesh(data=8) as m:
        compiled = step.compile_train_step(recipe, sharding.concrete(step.abstract_state(recipe), m))
        memory.check_step_memory(recipe, compiled, m)
        analysis = compiled.memory_analysis()
        half = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes // 2
        monkeypatch.setattr(memory, "device_memory", lambda device: half)
        with pytest.raises(RecipeError, match=r"batch_size=64: a step needs .* try --config\.batch_size=(16|32) or"):
            memory.check_step_memory(recipe, compiled, m)


def test_the_smallest_rung_has_under_a_million_parameters():
    model = ModelConfig(**size("0.5M", LADDER), num_classes=1000)
    with jax.sharding.use_abstract_mesh(sharding.abstract_mesh((1, 1, 1))):
        shapes = jax.eval_shape(lambda: step.ViT(model, jax.random.key(0)))
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes)) < 1_000_000


def test_the_script_exits_with_status_2_and_one_line():
    command = [sys.executable, "launch/tpu.py", "--config", "recipes/smoke.py", "--config.model.num_heads=7"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert errors == ["error: model.num_heads=7: must divide model.width=96; nearest: 6, 8"]
    assert "Traceback" not in done.stderr


def test_two_processes_of_two_devices_train_as_one_process_of_four(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    small = ["depth=1", "width=32", "num_heads=2", "mlp_dim=64"]
    command = [sys.executable, "launch/tpu.py", "--config", "recipes/smoke.py", "--config.total_steps=3",
               "--config.optim.warmup_steps=1", "--config.run.log_every_steps=1", "--config.mesh.model=2",
               *(f"--config.model.{field}" for field in small)]  # fmt: skip

    def start(workdir: str, devices: int, **variables: str) -> subprocess.Popen:
        variables["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
        arguments = [*command, "--workdir", str(tmp_path / workdir)]
        return subprocess.Popen(arguments, cwd=ROOT, env=os.environ | variables, stdout=subprocess.DEVNULL)

    cluster = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    processes = [start("two", 2, **cluster, JAX_PROCESS_ID=str(i)) for i in range(2)]
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
    assert start("one", 4).wait(timeout=240) == 0
    two, one = read_metrics(tmp_path / "two"), read_metrics(tmp_path / "one")
    for name in ("train/loss", "train/gradient_norm", "validation/loss"):
        assert list(two[name]) == list(one[name])
        np.testing.assert_allclose(list(two[name].values()), list(one[name].values()), rtol=1e-5)
    assert two["validation/top1"] == one["validation/top1"]


def test_an_incomplete_description_of_the_processes_is_refused(monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1234")
    with pytest.raises(RecipeError, match=r"JAX_NUM_PROCESSES: not set"):
        tpu.join_cluster()


@pytest.mark.parametrize(
    ("platform", "given", "expected"),
    [
        ("gpu", None, "HOME/.cache/vit22b"),
        ("tpu", None, "HOME/.cache/vit22b"),
        ("cpu", None, None),
        ("cpu", "mine", "mine"),
        ("gpu", "mine", "mine"),
        ("gpu", "", None),
    ],
)
def test_compiled_programs_are_kept_where_the_user_says_or_at_home(platform, given, expected, monkeypatch):
    updates: dict[str, object] = {}
    monkeypatch.setattr(jax.config, "update", lambda name, value: updates.__setitem__(name, value))
    monkeypatch.setenv("HOME", "HOME")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    if given is not None:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", given)
    assert tpu.keep_compiled_programs(platform) == expected
    assert updates.get("jax_compilation_cache_dir") == expected


def test_a_compiled_program_is_found_in_the_folder_named(tmp_path):
    script = (
        "import jax; from launch.tpu import keep_compiled_programs; folder = keep_compiled_programs('gpu');"
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0);"
        "jax.jit(lambda x: x @ x)(jax.numpy.ones((8, 8))); print(folder)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | {"HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stderr
    assert list(Path(done.stdout.strip()).iterdir())
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)
