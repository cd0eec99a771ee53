"""Plans against real arrays, XLA's own counts and by-hand arithmetic; `launch/plan.py` as a user runs it."""

import dataclasses
import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import MeshFactory

from launch.command_line import parse
from vit22b import hlo
from vit22b.cluster import Cluster, Torus, open_cluster
from vit22b.config import DataConfig, MeshConfig, OptimConfig, Recipe
from vit22b.errors import RecipeError
from vit22b.flops import executed_flops, train_flops
from vit22b.hardware import CHIPS
from vit22b.model_config import ModelConfig
from vit22b.plan import count_collectives, describe, make_plan
from vit22b.sharding import concrete, make_mesh
from vit22b.step import abstract_state, compile_train_step, init_state, trace_train_step

ROOT = Path(__file__).resolve().parent.parent
RECIPE = Recipe(
    name="t",
    total_steps=1000,
    batch_size=16,
    model=ModelConfig(
        width=64,
        depth=3,
        mlp_dim=128,
        num_heads=4,
        num_classes=32,
        image_size=16,
        patch_size=4,
        pool="gap",
        overlap="rings",
    ),
    optim=OptimConfig(name="adamw", momentum_dtype="bf16", ema_decay=0.9),
    mesh=MeshConfig(replica=2, data=2, model=2),
    data=DataConfig(train="digits", validation="digits"),
)


def simulated() -> Cluster:
    """The simulated devices that the tests have, as `cpu:8` gives them to a plan."""
    devices = jax.devices()
    return Cluster(name="cpu:8", num_devices=8, device_kind="cpu", chip=None, devices_per_node=8, devices=devices)


@pytest.fixture(scope="module")
def plan():
    return make_plan(RECIPE, simulated())


def test_memory_classes_are_those_of_real_arrays(plan) -> None:
    with jax.set_mesh(make_mesh((2, 2, 2))):
        state = jax.jit(functools.partial(init_state, RECIPE))()
        batch = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), abstract_batch_on_mesh())
    classes = {"parameters": state.model, "optimizer": (state.opt_state, state.ema), "batch": batch}
    held = {
        name: sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree)) / 2**30
        for name, tree in classes.items()
    }
    assert plan.state_gib_per_device == held
    assert plan.params == sum(leaf.size for leaf in jax.tree.leaves(state.model))


def abstract_batch_on_mesh() -> dict:
    return concrete(RECIPE.objective().batch(), jax.sharding.get_mesh())


def test_donated_buffers_count_once(plan) -> None:
    mesh = make_mesh((2, 2, 2))
    with jax.set_mesh(mesh):
        compiled = compile_train_step(RECIPE, concrete(abstract_state(RECIPE), mesh))
    memory = compiled.memory_analysis()
    twice = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    donated = sum(plan.state_gib_per_device[name] for name in ("parameters", "optimizer"))
    assert twice / 2**30 - plan.peak_gib_per_device == pytest.approx(donated, rel=0.01)
    assert plan.temp_gib_per_device > plan.state_gib_per_device["parameters"]  # the gradients, at the least
    state_and_temporaries = sum(plan.state_gib_per_device.values()) + plan.temp_gib_per_device
    assert state_and_temporaries == pytest.approx(plan.peak_gib_per_device, rel=1e-3)


def test_rings_leave_no_other_large_collective_in_the_layers(plan) -> None:
    kernel = 64 * 64 * 2 / (2 * 2)  # bf16 bytes of the smallest kernel's shard
    kinds = {row["kind"] for row in plan.layer_collectives if row["bytes"] >= kernel}
    assert kinds == {"collective-permute"}
    assert plan.collectives["collective-permute"]["per_layer"] > 0
    assert plan.collectives["collective-permute"]["per_layer"] * 3 <= plan.collectives["collective-permute"]["total"]
    assert plan.compute_s is plan.mfu_bound is plan.train_days is None  # nothing is known about a CPU's speed


def collective(**changes) -> hlo.Collective:
    usual = {"kind": "all-gather", "name": "a", "bytes": 100, "runs": 6, "in_layers": True, "asynchronous": False}
    return hlo.Collective(**usual | {"seconds": 2.0, "exposed": 1.0, "beside": 0.5} | changes)


def test_collectives_are_added_up_by_kind() -> None:
    found = [collective(), collective(asynchronous=True, runs=3), collective(in_layers=False, runs=1, exposed=0.0)]
    row = count_collectives([*found, collective(kind="all-reduce")], depth=3)["all-gather"]
    assert row == {
        "per_layer": 3,  # (6 + 3) / 3
        "total": 10,
        "asynchronous": 3,
        "bytes_per_step": 1000,
        "seconds": 20.0,
        "exposed_seconds": 9.0,
        "beside_seconds": 5.0,
    }
    rows = describe([collective(exposed=0.0), collective(exposed=1.0), collective(bytes=200)])
    assert [(row["bytes"], row["count"], row["runs"], row["exposed_s"]) for row in rows] == [
        (200, 1, 6, 1.0),
        (100, 2, 12, 0.5),
    ]


@pytest.mark.parametrize("remat", ["none", "full"])
def test_executed_flops_are_what_xla_counts_without_loops(remat: str, mesh: MeshFactory) -> None:
    # Matmuls large enough that the elementwise work beside them, which XLA counts too, is a few percent.
    model = ModelConfig(
        width=256, depth=2, mlp_dim=1024, num_heads=4, num_classes=100, image_size=32, patch_size=4, matmul="fp32",
        pool="gap", scan_unroll=2, remat=remat,
    )  # fmt: skip
    recipe = dataclasses.replace(RECIPE, model=model, batch_size=2, optim=OptimConfig(name="adafactor"))
    with mesh() as m:
        traced = trace_train_step(recipe, concrete(abstract_state(recipe), m))
        counted = traced.lower().compile().cost_analysis()["flops"]
    executed = executed_flops(traced.jaxpr.jaxpr)
    assert 1.0 <= counted / executed < 1.1
    # The patch embedding's input needs no gradient; with rematerialisation the input projections run once more.
    forward_again = 2 * 2 * 2 * 64 * (3 * 256**2 + 256 * 1024) + 2 * 2 * 2 * 2 * 64**2 * 256
    expected = train_flops(model) * 2 - 2 * 2 * 64 * 48 * 256 + (forward_again if remat == "full" else 0)
    assert executed == pytest.approx(expected, rel=1e-3)


def test_executed_flops_count_loops_and_shards_as_often_as_they_run(mesh: MeshFactory) -> None:
    for shape in ((1, 1, 1), (2, 2, 2)):
        with mesh(*shape) as m:
            for overlap in ("none", "rings"):
                model = dataclasses.replace(RECIPE.model, overlap=overlap, remat="full")
                recipe = dataclasses.replace(RECIPE, model=model, mesh=MeshConfig())
                traced = trace_train_step(recipe, concrete(abstract_state(recipe), m))
                executed = executed_flops(traced.jaxpr.jaxpr)
                # Of a layer's forward pass all but the output projections runs twice.
                layer = 2 * 16 * (4 * 64**2 + 2 * 64 * 128) + 4 * 16**2 * 64
                again = 16 * 3 * (layer - 2 * 16 * (64**2 + 64 * 128))
                first = 16 * 2 * 16 * 48 * 64  # the patch embedding's input needs no gradient
                assert executed == pytest.approx(train_flops(model) * 16 + again - first, rel=1e-3)


def test_links_of_a_torus_carry_what_is_routed_over_them() -> None:
    coords = np.array([(x, y, z) for x in range(4) for y in range(4) for z in range(8)])
    index = {tuple(c): i for i, c in enumerate(coords.tolist())}
    torus = Torus(coords, bandwidth=1e9)

    def seconds(step: tuple[int, int, int]) -> float:
        pairs = [(i, index[tuple((np.array(c) + step) % (4, 4, 8))]) for c, i in index.items()]
        return torus.seconds("collective-permute", 10**9, np.array(pairs))[0]

    assert seconds((0, 0, 1)) == pytest.approx(1.0)
    assert seconds((0, 0, 3)) == pytest.approx(3.0)  # each link passes on those of three chips
    assert seconds((0, 0, 7)) == pytest.approx(1.0)  # back around
    assert seconds((1, 0, 2)) == pytest.approx(2.0)
    line = np.arange(8)[None]  # one whole dimension: both directions of a closed ring
    assert torus.seconds("all-gather", 10**9, line)[0] == pytest.approx(0.5)
    assert torus.seconds("all-gather", 10**9, line[:, :4])[0] == pytest.approx(1.0)  # a part of it: an open line
    plane = np.arange(32)[None]  # two whole dimensions
    assert torus.seconds("all-gather", 10**9, plane)[0] == pytest.approx(0.25)
    small = Torus(np.array([(x, y, 0) for x in range(2) for y in range(2)]), bandwidth=1e9)  # no ring in a 2 x 2
    assert small.seconds("all-gather", 10**9, np.arange(4)[None])[0] == pytest.approx(0.5)


def test_a_gpu_clusters_plan_follows_from_its_own_figures() -> None:
    recipe, _ = parse(["plan.py", "--config", f"{ROOT}/recipes/vit22b.py:1B", "--config.batch_size=512"])
    figures = make_plan(recipe, open_cluster("gpu:h200x8x2"))
    assert (figures.devices, figures.device_kind, figures.mesh) == (
        16,
        "NVIDIA H200",
        {"replica": 1, "data": 16, "model": 1},
    )
    peak = 16 * CHIPS["NVIDIA H200"].peak_flops
    assert figures.compute_s == pytest.approx(figures.executed_flops_per_step / peak)
    assert figures.step_s_bound == pytest.approx(figures.compute_s + figures.exposed_s)
    assert figures.mfu_bound == pytest.approx(train_flops(recipe.model) * 512 / peak / figures.step_s_bound)
    assert figures.step_s_estimate > figures.step_s_bound
    assert figures.train_days == pytest.approx(177_000 * figures.step_s_bound / 86_400)
    assert figures.chip_hours == pytest.approx(24 * 16 * figures.train_days)
    assert figures.fits
    assert figures.train_days_estimate / figures.train_days == pytest.approx(
        figures.step_s_estimate / figures.step_s_bound
    )
    # Tensor parallel, nothing is hidden: the rows by kind add up to what is exposed.
    exposed = make_plan(dataclasses.replace(recipe, mesh=MeshConfig(data=4, model=4)), open_cluster("gpu:h200x8x2"))
    by_kind = sum(row["exposed_seconds"] for row in exposed.collectives.values())
    assert 0 < by_kind == pytest.approx(exposed.exposed_s)
    small = make_plan(dataclasses.replace(recipe, batch_size=2**17), open_cluster("gpu:h200x8"))
    assert small.fits is False


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x9:2x2", "not known; for example v4:8x8x16"),
        ("h200x8", "not known; for example"),
        ("gpu:h300x8", "with KIND one of a100, h100, h200"),
        ("gpu:h200", "needs gpu:KINDxGPUSxSERVERS"),
        ("gpu:h200x0x2", "needs gpu:KINDxGPUSxSERVERS"),
        ("gpu:h200x16", "at most 8 GPUs per server"),
        ("gpu:h200x8x9999999", "16384 in all"),
        ("cpu:none", "needs a number of devices from 1 to 512"),
        ("cpu:0", "needs a number of devices from 1 to 512"),
        ("cpu:3", "JAX has 8 CPU device(s) already"),
    ],
)
def test_a_wrong_topology_is_answered_with_what_works(name: str, message: str, monkeypatch) -> None:
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # the devices of these tests are there already
    with pytest.raises(RecipeError) as caught:
        open_cluster(name)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"--topology={name}: ")
    assert "\n" not in str(caught.value)


def test_tpus_without_libtpu_are_answered_with_the_file_to_install(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"--topology=v4:8x8x16: .* pip install -r requirements-tpu\.txt"):
        open_cluster("v4:8x8x16")
    assert "libtpu" in (ROOT / "requirements-tpu.txt").read_text()


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (MeshConfig(replica=3, data=2, model=2), "does not fill 16 device(s)"),
        (MeshConfig(model=16), "mesh.model=16: must divide model.num_heads=12; the largest that does: 4"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_before_anything_is_compiled(mesh: MeshConfig, message: str) -> None:
    recipe, _ = parse(["plan.py", "--config", f"{ROOT}/recipes/vit22b.py:1B"])
    with pytest.raises(RecipeError) as caught:
        make_plan(dataclasses.replace(recipe, mesh=mesh), open_cluster("gpu:h200x8x2"))
    assert message in str(caught.value)


def run_plan(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "launch/plan.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


TINY = ["--config", "recipes/debug.py:plain", "--config.model.depth=1", "--config.optim.accumulate_steps=1"]


def test_the_command_prints_a_table_and_writes_the_same_as_json(tmp_path) -> None:
    result = run_plan(*TINY, "--topology", "cpu:2", "--json", str(tmp_path / "plan.json"))
    assert result.returncode == 0, result.stderr
    figures = json.loads((tmp_path / "plan.json").read_text())
    issue = {
        *("devices", "device_kind", "mesh", "params", "state_gib_per_device", "temp_gib_per_device"),
        *("peak_gib_per_device", "hbm_gib", "fits", "model_flops_per_step", "collectives", "compute_s"),
        *("communication_s", "step_s_bound", "mfu_bound", "train_days", "compile_s"),
    }
    assert issue <= set(figures)
    assert set(figures["state_gib_per_device"]) == {"parameters", "optimizer", "batch"}
    assert figures["devices"] == 2
    assert f"{figures['peak_gib_per_device']:.3g} GiB per device: their limit is not known" in result.stdout
    again = run_plan(*TINY, "--topology", "cpu:2", "--json", str(tmp_path / "plan.json"))
    assert (again.returncode, again.stdout) == (2, "")
    assert "plan.json: is there already" in again.stderr
    assert "MFU" not in result.stdout  # nor anything else that the speed of a CPU would have to be known for
    assert "blocking" not in result.stdout  # CPUs have no asynchronous collectives


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--topology: give one"),
        (["--topology", "v4"], "--topology=v4: "),
        (["--topology"], "--topology"),
        (["--topo", "cpu:2"], "--topology: give one"),
        (["--topology", "cpu:2", "--json", "none/such.json"], "--json=none/such.json: there is no folder none"),
        (["--topology", "cpu:2", "--config.model.attention=cudnn"], "model.attention='cudnn': needs GPUs, not cpu:2"),
        (["--topology", "gpu:h200x8", "--config.mesh.model=3"], "mesh=replica=1,data=-1,model=3: does not fill 8"),
        (["--topology", "gpu:h200x8", "--workdir", "x"], "--workdir=x: "),
        (["--topology", "cpu:2", "--search"], "--search: needs a topology of known speed"),
        (["--topology", "gpu:h200x8", "--config.model.widht=3"], "no such field; the closest are model.width"),
    ],
)
def test_a_mistake_is_answered_in_one_line(arguments: list[str], message: str) -> None:
    result = run_plan(*TINY, *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_plan_refuses_teachers_which_it_does_not_count() -> None:
    result = run_plan("--config", "recipes/distill_smoke.py", "--topology", "gpu:h200x8")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: --config: distill_smoke_student has teachers")


def test_a_tpu_slices_plan_is_compiled_with_rings_and_without_blocking_collectives() -> None:
    pytest.importorskip("libtpu", reason="pip install -r requirements-tpu.txt")
    cluster = open_cluster("v4:2x2x1")
    recipe = dataclasses.replace(RECIPE, mesh=MeshConfig(data=1, model=4))
    figures = make_plan(recipe, cluster)
    assert (cluster.num_devices, figures.device_kind, figures.fits) == (4, "TPU v4", True)
    assert 0 < figures.peak_gib_per_device < figures.hbm_gib == 32
    permutes = figures.collectives["collective-permute"]
    assert permutes["asynchronous"] == permutes["total"] > 0
    assert figures.blocking_in_layers == []
    assert 0 < figures.compute_s < figures.step_s_bound < figures.step_s_estimate


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9x:2x2", "Invalid TPU external name: TPU v9x; for example v4:8x8x16"),
        ("v4:3x5x7", "not divisible"),
        ("v4:8", "needs the torus of at most 16384 chips behind the colon; for example v4:8x8x16"),
        ("v4", "needs the torus of at most 16384 chips behind the colon"),
        ("v4:1000x1000x1000", "needs the torus of at most 16384 chips"),
    ],
)
def test_a_slice_that_does_not_exist_is_answered_in_one_line(name: str, message: str) -> None:
    pytest.importorskip("libtpu", reason="pip install -r requirements-tpu.txt")
    with pytest.raises(RecipeError) as caught:
        open_cluster(name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
