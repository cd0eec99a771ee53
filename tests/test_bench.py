"""The benchmark command as a user runs it; where time goes, worked out by hand; the tables of BENCHMARKS.md."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from benchmarks import table, timm_step
from launch import bench
from launch.command_line import parse
from vit22b import profile
from vit22b.clocks import ClockSampler
from vit22b.errors import RecipeError
from vit22b.profile import Event, Labels, time_shares
from vit22b.timing import GROUP, WARM_UP, spread, time_groups, warm_up

ROOT = Path(__file__).resolve().parent.parent
TINY = [
    *("--config", "recipes/smoke.py", "--config.model.depth=1", "--config.batch_size=16", "--config.optim.name=adamw"),
    *("--config.model.pool=gap", "--config.model.init=xavier", "--config.optim.clip_norm=0"),
]
KEYS = {
    *("recipe", "arguments", "date", "commit", "modified", "xla_flags", "jax", "python", "device_kind", "devices"),
    *("mesh", "matmul", "batch_size", "image_size", "tokens", "input", "steps", "params_m", "compile_s", "step_ms"),
    *("step_ms_min", "step_ms_p25", "step_ms_p75", "step_ms_max", "images_per_second", "mfu", "peak_gib"),
    *("device_peak_gib", "loss", "data_wait_s", "regions", "kinds", "kernels", "profile_error", "sm_clock_mhz"),
    *("power_w", "throttle_reasons", "timm", "vs_timm"),
}


def run_bench(*arguments: str, program: str = "launch/bench.py") -> subprocess.CompletedProcess:
    """The program in a process of its own, on two simulated devices: the eight of conftest.py take longer."""
    command = [sys.executable, program, *arguments]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory) -> tuple[list[dict], str]:
    """The records of a run per kind of input, appended to a file that held a line before, and what was printed."""
    file = tmp_path_factory.mktemp("bench") / "records.jsonl"
    file.write_text('{"before": 1}\n')
    printed = ""
    for kind in ("synthetic", "real"):
        result = run_bench(*TINY, "--steps", "6", "--kernels", "2", "--input", kind, "--json", str(file))
        assert result.returncode == 0, result.stderr
        printed += result.stdout
    lines = file.read_text().splitlines()
    assert lines[0] == '{"before": 1}'
    return [json.loads(line) for line in lines[1:]], printed


def test_each_run_appends_a_record_with_every_key(two_runs) -> None:
    records, printed = two_runs
    assert [record["input"] for record in records] == ["synthetic", "real"]
    for record in records:
        assert set(record) == KEYS
        assert record["arguments"][: len(TINY)] == TINY
        assert (record["devices"], record["mesh"]) == (2, {"replica": 1, "data": 2, "model": 1})  # data=-1: all
        assert record["xla_flags"] == "--xla_force_host_platform_device_count=2"
        assert (record["batch_size"], record["tokens"], record["jax"]) == (16, 16, jax.__version__)
        assert record["mfu"] is record["sm_clock_mhz"] is record["timm"] is None  # not known of a CPU, not asked for
        assert record["step_ms_min"] <= record["step_ms_p25"] <= record["step_ms"]
        assert record["step_ms"] <= record["step_ms_p75"] <= record["step_ms_max"]
        assert record["images_per_second"] == pytest.approx(16 / record["step_ms"] * 1e3)
        assert f"{record['step_ms']:.2f} ms" in printed
    assert records[0]["data_wait_s"] is None
    assert records[1]["data_wait_s"] > 0
    assert printed.count("ms a step for the next batch") == 1
    for record in records:
        times = [kernel["ms"] for kernel in record["kernels"]]
        assert 2 < len(times) <= profile.LONGEST
        assert times == sorted(times, reverse=True)
        assert [f"{ms:12.3f}" in printed for ms in times[:2]] == [True, True]


def test_the_parameters_and_the_least_memory_are_those_of_the_model(two_runs) -> None:
    # Width 96, one layer, patches of 2 x 2 x 3 values: by hand, without looking at the code.
    block = 4 * 96**2 + 2 * 96 * 384 + 384 + 96 + 96 + 2 * 32  # kernels, MLP biases, norm, query and key norms
    params = (12 + 1) * 96 + block + 96 + (96 + 1) * 10  # patches, block, final norm, head
    for record in two_runs[0]:
        assert record["params_m"] == pytest.approx(params / 1e6)
        assert record["peak_gib"] * 2**30 > 3 * 4 * params / 2  # half of fp32 parameters and both moments


def test_shares_of_a_real_profile_sum_to_one(two_runs) -> None:
    for record in two_runs[0]:
        assert record["profile_error"] is None
        for part in ("regions", "kinds"):
            assert sum(record[part].values()) == pytest.approx(1)
        assert (
            {"optimizer", "attention"} <= set(record["regions"]) <= {*profile.REGIONS, "other", "communication", "idle"}
        )
        assert {"matmul", "elementwise"} <= set(record["kinds"]) <= {"matmul", "elementwise", "communication", "idle"}


def test_kernels_that_take_most_time_are_added_up_per_region_and_step() -> None:
    events = [Event("add_1", "a", 0, 3e6), Event("add_2", "b", 5e6, 8e6), Event("add", "c", 9e6, 10e6)]
    events += [Event("gemm", "d", 10e6, 30e6), Event("tiny", "d", 30e6, 30.1e6)]
    region = {"a": "mlp", "b": "mlp", "c": "head", "d": "mlp"}
    found = profile.longest(events, lambda event: region[event.instruction], steps=2)
    assert found == [
        profile.Kernel("gemm", "mlp", 0.5, 10.0),
        profile.Kernel("add", "mlp", 1.0, 3.0),
        profile.Kernel("add", "head", 0.5, 0.5),
        profile.Kernel("tiny", "mlp", 0.5, pytest.approx(0.05)),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "fast"], "--input='fast': choose one of synthetic, real"),
        (["--steps", "10"], "--steps=10: must be a positive multiple of 3"),
        (["--kernels", "41"], "--kernels=41: must be from 0 to 40"),
        (["--steps", "many"], "invalid int value"),
        (["--vs", "flax"], "--vs='flax': choose one of timm"),
        (["--json", "none/such.jsonl"], "--json=none/such.jsonl: there is no folder none"),
        (["--json", "tests"], "--json=tests: is a folder"),
        (["--workdir", "x"], "--workdir=x: "),
        (["--profile", "x"], "profile"),
        (["--config.model.attention=cudnn", "--config.model.matmul=bf16"], "model.attention='cudnn': needs a GPU"),
        (["--config.mesh.model=3"], "mesh=replica=1,data=-1,model=3: does not fill 8"),
        (["--input", "real", "--config.data.train=npz:/none/such"], "data.train"),
        (["--vs", "timm", "--timm-python", "/none/python"], "--timm-python=/none/python: is no program"),
        (["--vs", "timm", "--config.model.mlp=swiglu"], "model.mlp=swiglu: has no equivalent"),
    ],
)
def test_a_mistake_is_answered_in_one_line(arguments: list[str], message: str, monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["launch/bench.py", *TINY, *arguments])
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("measured all the same"))
    assert bench.main() == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1


HLO = """HloModule jit_train_step, is_scheduled=true

%inner_matmul (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %a = f32[4]{0} add(%p, %p), metadata={op_name="jit(train_step)/jvp(norm)/add"}
  %b = f32[4]{0} add(%a, %p), metadata={op_name="jit(train_step)/jvp(norm)/add"}
  ROOT %m = f32[4]{0} custom-call(%b), custom_call_target="__cublas$gemm", metadata={op_name="jit(train_step)/jvp(attention)/btd,dk->btk/dot_general"}
}

%inner_elementwise (q: f32[4]) -> f32[4] {
  %q = f32[4]{0} parameter(0)
  %c = f32[4]{0} add(%q, %q), metadata={op_name="jit(train_step)/jvp()/add"}
  %d = f32[4]{0} multiply(%c, %q), metadata={op_name="jit(train_step)/transpose(jvp(mlp))/mul"}
  %e = f32[4]{0} multiply(%d, %q), metadata={op_name="jit(train_step)/transpose(jvp(mlp))/mul"}
  ROOT %f = f32[4]{0} add(%e, %c), metadata={op_name="jit(train_step)/jvp(norm)/add"}
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %dynamic_slice_fusion = f32[4]{0} fusion(%x), kind=kCustom, calls=%inner_matmul
  %residual = f32[4]{0} fusion(%dynamic_slice_fusion), kind=kLoop, calls=%inner_elementwise, metadata={op_name="jit(train_step)/jvp()/add"}
  %pooling = f32[4]{0} dot(%residual, %x), metadata={op_name="jit(train_step)/transpose(jvp(head))/attention/dot_general"}
  %backward = f32[4]{0} add(%pooling, %x), metadata={op_name="jit(train_step)/transpose(jvp(mlp))/btk,kd->btd/add_any"}
  %muon = f32[4]{0} add(%backward, %x), metadata={op_name="jit(train_step)/optimizer/vmap(jit(norm))/reduce_sum"}
  %word = f32[4]{0} add(%backward, %x), metadata={op_name="jit(train_step)/jvp(attention_mask)/add"}
  %fused_attention = f32[4]{0} custom-call(%word), custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="jit(train_step)/jvp(attention)/dot_product_attention"}
  %gathered = f32[8]{0} all-gather-start(%word), metadata={op_name="jit(train_step)/jvp(mlp)/all_gather"}
  %loop = f32[4]{0} while(%x), condition=%c1, body=%b1, metadata={op_name="jit(train_step)/jvp(mlp)/while"}
  ROOT %bare = f32[4]{0} copy(%word)
}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("kernel", "instruction", "region", "kind"),
    [
        ("nvjet_tst_128x256", "dynamic_slice_fusion", "attention", "matmul"),  # no scope of its own: its matmul's
        ("loop_add_fusion", "residual", "mlp", "elementwise"),  # own scopes unknown: the most frequent inside
        ("dot", "pooling", "attention", "matmul"),  # the innermost of head and attention
        ("loop_add", "backward", "mlp", "elementwise"),
        ("loop_add", "muon", "optimizer", "elementwise"),  # a function called norm is no scope
        ("loop_add", "word", "other", "elementwise"),  # nor is what only begins like one
        ("cudnn_generated_fort_native_sdpa", "fused_attention", "attention", "attention"),
        ("attention_backward", "fused_attention", "attention", "attention"),
        ("attention_wide_forward", "fused_attention", "attention", "attention"),
        ("ncclDevKernel_AllGather", "gathered", "communication", "communication"),
        ("all-gather-start", "gathered", "communication", "communication"),
        ("ncclDevKernel_Broadcast", "", "communication", "communication"),
        ("MemcpyD2D", "", "other", "elementwise"),
        ("copy", "bare", "other", "elementwise"),
    ],
)
def test_events_are_put_down_to_region_and_kind(kernel: str, instruction: str, region: str, kind: str) -> None:
    labels, event = Labels(HLO), Event(kernel, instruction, 0, 1, "jit_train_step")
    assert (labels.region(event), labels.kind(event)) == (region, kind)


def test_programs_beside_the_step_are_teachers_though_instructions_have_the_same_names() -> None:
    labels = Labels(HLO)
    for kernel, kind in (("nvjet_tst_128x256", "matmul"), ("loop_add", "elementwise")):
        for name in ("pooling", "backward", "loop", "unknown"):
            event = Event(kernel, name, 0, 1, "jit_annotate")
            assert (labels.region(event), labels.kind(event), labels.is_container(event)) == ("teacher", kind, False)
    assert labels.region(Event("ncclDevKernel_AllGather", "", 0, 1, "jit_annotate")) == "communication"


def by_kernel(event: Event) -> str:
    return event.kernel


def test_overlapping_events_share_the_time_and_communication_has_only_what_is_left() -> None:
    events = [
        Event("mlp", "", 100, 140),
        Event("communication", "", 110, 170),  # alone from 140 to 150 and from 160 to 170
        Event("norm", "", 120, 130),  # beside mlp
        Event("mlp", "", 125, 130),  # three at once, two of them mlp
        Event("norm", "", 150, 160),
        Event("head", "", 180, 200),  # after 10 of nothing
        Event("head", "", 190, 190),  # takes no time
    ]
    expected = {
        "mlp": 20 + 5 / 2 + 5 * 2 / 3 + 10,  # 100-120, 120-125, 125-130, 130-140
        "norm": 5 / 2 + 5 / 3 + 10,
        "communication": 20,
        "idle": 10,
        "head": 20,
    }
    found = time_shares(events, by_kernel)
    assert found == pytest.approx({name: part / 100 for name, part in expected.items()})
    assert sum(found.values()) == pytest.approx(1)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    shuffled = [events[i] for i in (4, 0, 6, 3, 5, 1, 2)]
    assert time_shares(shuffled, by_kernel) == pytest.approx(found)


def test_a_loop_does_not_count_beside_what_it_runs() -> None:
    events = [Event("while", "loop", 0, 100), Event("add", "backward", 0, 50), Event("add", "muon", 50, 100)]
    assert profile.shares(HLO, events, 1).regions == pytest.approx({"mlp": 0.5, "optimizer": 0.5})
    with pytest.raises(ValueError, match="no events of the device"):
        profile.shares(HLO, events[:1], 1)


def test_groups_are_waited_for_once_and_their_spread_is_that_of_steps() -> None:
    calls: list[str] = []
    step, wait = (lambda name=name: calls.append(name) for name in ("step", "wait"))
    warm_up(step, wait)
    assert calls == ["step", "wait"] * WARM_UP
    calls.clear()
    assert len(time_groups(step, wait, 4 * GROUP)) == 4
    assert calls == (["step"] * GROUP + ["wait"]) * 4
    assert spread([5.0, 1.0, 4.0, 2.0, 3.0]) == {
        **{"step_ms": 3.0, "step_ms_min": 1.0, "step_ms_p25": 2.0, "step_ms_p75": 4.0, "step_ms_max": 5.0}
    }


def test_clocks_are_medians_of_what_the_program_prints(monkeypatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    lines = "1980, 700.5, 0x4\\n[N/A], 1, 0x0\\n1500, 600.5, 0x20\\n1800, 650.5, 0x0\\n"
    script = (
        f"print('900, 90, 0x1', flush=True); import time; time.sleep(1); print('{lines}', flush=True); time.sleep(99)"
    )
    with ClockSampler((sys.executable, "-c", script)) as clocks:
        clocks.restart()  # the first line is from before
        deadline = time.monotonic() + 30
        while len(clocks._samples) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
    assert clocks.figures() == {"sm_clock_mhz": 1800.0, "power_w": 650.5, "throttle_reasons": "0x24"}
    for command in (("no-such-program",), None):
        with ClockSampler(command) as absent:
            absent.restart()
        assert set(absent.figures().values()) == {None}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.position=rope", "model.position=rope: has no equivalent in timm's benchmark; it knows learned or none"),
        ("model.mlp_bias=false", "model.mlp_bias=False: has no equivalent"),
        ("model.qk_norm=width", "model.qk_norm=width: has no equivalent"),
        ("model.matmul=fp32", "model.matmul=fp32: timm's benchmark computes in bf16"),
        ("optim.name=muon", "optim.name=muon: has no equivalent"),
        ("data.mixup=0.8", "data.mixup=0.8: has no equivalent"),
    ],
)
def test_what_timm_cannot_do_is_refused_by_name(change: str, message: str) -> None:
    plain = ["timm_step.py", "--config", f"{ROOT}/recipes/bench.py:So400m14"]
    recipe, _ = parse(plain)
    timm_step.refuse(recipe)
    arguments = timm_step.model_arguments(recipe.model)
    assert int(arguments["embed_dim"] * arguments["mlp_ratio"]) == 4304  # as timm computes the MLP's width
    with pytest.raises(RecipeError) as caught:
        timm_step.refuse(parse([*plain, f"--config.{change}"])[0])
    assert str(caught.value).startswith(message)


def test_the_peer_needs_no_jax_and_names_the_packages_it_lacks() -> None:
    script = (
        "import runpy, sys; sys.modules |= dict.fromkeys(['jax', 'torch', 'timm']);"
        "sys.argv = ['timm_step.py', '--config', 'recipes/bench.py:L16'];"
        "runpy.run_path('benchmarks/timm_step.py', run_name='__main__')"
    )
    result = run_bench(script, program="-c")
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(r"error: \S+ has no timm: pip install torch timm .*\n", result.stderr)


RECORD = {
    **{"recipe": "r", "batch_size": 1024, "matmul": "bf16", "images_per_second": 1234.5, "step_ms": 829.04},
    **{"step_ms_p25": 828.0, "step_ms_p75": 831.26, "mfu": 0.4567, "peak_gib": 51.26, "compile_s": 33.4},
    **{
        "sm_clock_mhz": 1485.0,
        "vs_timm": 1.234,
        "jax": "0.11.2",
        "devices": 2,
        "device_kind": "NVIDIA H200",
        "date": "2026-11-24T01:02:03",
    },
    "arguments": ["--config", "r.py:A B", "--input", "real"],
}


def test_a_table_has_a_row_for_each_record(tmp_path) -> None:
    unknown = dict.fromkeys(("mfu", "peak_gib", "sm_clock_mhz", "vs_timm")) | {"devices": 1}
    file = tmp_path / "b.jsonl"
    file.write_text(json.dumps(RECORD) + "\n" + json.dumps(RECORD | unknown) + "\n")
    result = run_bench(str(file), program="benchmarks/table.py")
    heading, rule, first, second = result.stdout.splitlines()
    assert heading.count("|") == rule.count("|") == first.count("|") == second.count("|") == len(table.HEADINGS) + 1
    assert first == (
        "| r | 1,024 | bf16 | 1,234 | 829.0 | 828.0 to 831.3 | 45.7 % | 51.3 | 33 | 1,485 | 1.23 | 0.11.2 "
        "| 2 x NVIDIA H200 | 2026-11-24 | `python launch/bench.py --config 'r.py:A B' --input real` |"
    )
    assert second.startswith(
        "| r | 1,024 | bf16 | 1,234 | 829.0 | 828.0 to 831.3 |  |  | 33 |  |  | 0.11.2 | NVIDIA H200 |"
    )
    file.write_text("no json\n")
    result = run_bench(str(file), program="benchmarks/table.py")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert f"{file}:1: not a line of JSON" in result.stderr


def stale_tables(text: str, root: Path) -> list[str]:
    """The files whose table in the text is not what benchmarks/table.py prints of them."""
    marked = re.findall(r"^<!-- table: (\S+) -->\n(.*?)^<!-- end -->$", text, re.MULTILINE | re.DOTALL)
    assert len(marked) == len(re.findall(r"^<!-- table", text, re.MULTILINE)), "a table without an end"
    return [name for name, body in marked if body.strip() != table.table(table.read_records(root / name))]


def test_the_tables_of_the_benchmarks_are_those_of_their_records(tmp_path) -> None:
    (tmp_path / "b.jsonl").write_text(json.dumps(RECORD) + "\n")
    good = f"text\n\n<!-- table: b.jsonl -->\n{table.table([RECORD])}\n<!-- end -->\n"
    assert stale_tables(good, tmp_path) == []
    assert stale_tables(good + good.replace("45.7 %", "55.7 %"), tmp_path) == ["b.jsonl"]
    assert stale_tables((ROOT / "BENCHMARKS.md").read_text(), ROOT) == []


def test_the_help_explains_every_flag_and_every_figure() -> None:
    text = run_bench("--help").stdout
    for word in ("--config", "--input", "--steps", "--json", "--vs", "MFU", *profile.REGIONS, "communication", "idle"):
        assert word in text
