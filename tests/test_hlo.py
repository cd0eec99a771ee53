"""Reading compiled modules: small texts written by hand, and what JAX compiles here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import MeshFactory
from jax.sharding import PartitionSpec as P

from vit22b import hlo
from vit22b.cluster import Torus

# Two trips of a loop: a permute of 4 KiB beside 300 cycles. Then an all-gather of 1 MiB that blocks, and 100 cycles.
TEXT = """HloModule step, is_scheduled=true

%body (p: (s32[], f32[1024])) -> (s32[], f32[1024]) {
  %p = (s32[], f32[1024]{0:T(1024)}) parameter(0)
  %x = f32[1024]{0:T(1024)} get-tuple-element(%p), index=1
  %start = (f32[1024]{0}, f32[1024]{0}) collective-permute-start(%x), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %long = f32[1024]{0} fusion(%x), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"300"}
  %permute-done = f32[1024]{0} collective-permute-done(%start)
  ROOT %t = (s32[], f32[1024]{0}) tuple(%x, %permute-done)
}

%condition (p: (s32[], f32[1024])) -> pred[] {
  %limit = s32[]{:T(128)} constant(2)
  %p = (s32[], f32[1024]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

ENTRY %main (a: f32[1024]) -> f32[262144] {
  %a = f32[1024]{0} parameter(0)
  %zero = s32[] constant(0)
  %init = (s32[], f32[1024]{0}) tuple(%zero, %a)
  %while = (s32[], f32[1024]{0}) while(%init), condition=%condition, body=%body
  %y = f32[1024]{0} get-tuple-element(%while), index=1
  %gather = f32[262144]{0} all-gather(%y), channel_id=2, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %short = f32[262144]{0} fusion(%gather), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"100"}
}
"""
# A cube of 4 x 4 x 4 chips, closed in each dimension; the first four are a ring in the first.
CUBE = np.array([(x, y, z) for z in range(4) for y in range(4) for x in range(4)])
CLOCK = 1e9


def replay(bandwidth: float) -> tuple[hlo.Replay, dict[str, hlo.Collective]]:
    found = hlo.Replay(hlo.parse(TEXT), 4, Torus(CUBE, bandwidth), CLOCK, layer_trips=2)
    return found, {c.kind: c for c in found.collectives}


def test_collectives_are_counted_with_their_loops_trips_and_bytes() -> None:
    _, found = replay(bandwidth=1e12)
    permute, gather = found["collective-permute"], found["all-gather"]
    assert (permute.runs, permute.bytes, permute.asynchronous, permute.in_layers) == (2, 4096, True, True)
    assert (gather.runs, gather.bytes, gather.asynchronous, gather.in_layers) == (1, 2**20 * 3 // 4, False, False)


def test_communication_that_fits_beside_compute_costs_nothing() -> None:
    ran, found = replay(bandwidth=4096e9 / 200)  # 200 ns, of 300 beside it
    permute, gather = found["collective-permute"], found["all-gather"]
    assert permute.seconds == pytest.approx(200e-9)
    assert permute.beside == pytest.approx(300e-9)
    assert permute.exposed == 0
    # A closed ring: two links bring the other devices' 768 KiB.
    assert gather.exposed == gather.seconds == pytest.approx(0.75 * 2**20 / (2 * 4096e9 / 200))
    assert ran.seconds == pytest.approx(2 * 300e-9 + gather.seconds + 100e-9)


def test_what_compute_does_not_cover_is_exposed() -> None:
    ran, found = replay(bandwidth=4096e9 / 500)
    assert found["collective-permute"].exposed == pytest.approx(200e-9)
    assert ran.seconds == pytest.approx(2 * 500e-9 + found["all-gather"].seconds + 100e-9)


def test_permutes_on_the_same_links_wait_for_one_another_and_others_do_not() -> None:
    pairs = np.array([(0, 1), (1, 2), (2, 3), (3, 0)])
    starts = "%{n} = (f32[1024]{{0}}, f32[1024]{{0}}) collective-permute-start(%a), source_target_pairs={{{p}}}"
    dones = "%{n}-done = f32[1024]{{0}} collective-permute-done(%{n})"

    def seconds(*ways: np.ndarray) -> float:
        texts = [",".join(f"{{{a},{b}}}" for a, b in way) for way in ways]
        lines = [starts.format(n=f"s{i}", p=t) for i, t in enumerate(texts)]
        lines += [dones.format(n=f"s{i}") for i in range(len(ways))]
        text = "ENTRY %main (a: f32[1024]) -> f32[1024] {\n  " + "\n  ".join(lines) + "\n}\n"
        return hlo.Replay(hlo.parse(text), 4, Torus(CUBE, 4096e6), CLOCK, layer_trips=2).seconds

    assert seconds(pairs) == pytest.approx(1e-6)
    assert seconds(pairs, pairs[:, ::-1]) == pytest.approx(1e-6)  # the other direction
    assert seconds(pairs, pairs) == pytest.approx(2e-6)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}, dimensions={0}", [[0, 2], [1, 3]]),
        ("replica_groups=[2,2]<=[4], dimensions={0}", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), dimensions={0}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['data'=2,'model'=2] {'model'}, dimensions={0}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['data'=2,'model'=2] {'data'}, dimensions={0}", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2] {'a','c'}, use_global_device_ids=true", [[0, 1, 2, 3]]),
        ("replica_groups={}, dimensions={0}", [[0, 1, 2, 3]]),
    ],
)
def test_groups_are_read_in_every_form_that_compilers_write(text: str, groups: list) -> None:
    assert hlo.groups_of(text, 4).tolist() == groups


@pytest.mark.parametrize(
    ("kind", "result", "received"),
    [
        ("all-gather", 800, 600),  # all but its own quarter
        ("reduce-scatter", 200, 600),  # three others' parts of its quarter
        ("all-reduce", 800, 1200),  # the two together
        ("all-to-all", 800, 600),
        ("collective-permute", 800, 800),
    ],
)
def test_bytes_received_are_those_of_a_ring_of_four(kind: str, result: int, received: int) -> None:
    assert hlo.received(kind, result, 4) == received


def test_a_compiled_program_holds_the_collectives_that_were_written(mesh: MeshFactory) -> None:
    def step(x, axis):
        def body(total, _):
            return total + jax.lax.psum(total, axis) * 0.1, None

        total, _ = jax.lax.scan(body, x, None, length=5)
        return jax.lax.ppermute(jax.lax.all_gather(total, axis), axis, [(i, (i + 1) % 8) for i in range(8)])

    with mesh(1, 1, 8):
        local = jax.shard_map(
            functools.partial(step, axis="model"), in_specs=P("model"), out_specs=P("model"), check_vma=False
        )
        x = jax.ShapeDtypeStruct(
            (8 * 16,), jnp.float32, sharding=jax.NamedSharding(jax.sharding.get_mesh(), P("model"))
        )
        text = jax.jit(local).lower(x).compile().as_text()
    found = {c.kind: c for c in hlo.Replay(hlo.parse(text), 8, None, 0.0, layer_trips=5).collectives}
    assert {kind: (c.runs, c.bytes, c.in_layers) for kind, c in found.items()} == {
        "all-reduce": (5, 2 * 64 * 7 // 8, True),
        "all-gather": (1, 512 * 7 // 8, False),
        "collective-permute": (1, 512, False),
    }


def test_a_loop_of_unknown_length_and_other_texts_are_errors() -> None:
    with pytest.raises(ValueError, match="while: a loop of unknown length"):
        hlo.Replay(hlo.parse(TEXT.replace("constant(2)", "parameter(1)")), 4, None, 0.0, layer_trips=2)
    with pytest.raises(ValueError, match="not the text of a compiled module"):
        hlo.parse("hello")


def entry(*lines: str, before: str = "") -> str:
    return (
        before
        + "ENTRY %main (a: f32[1024]) -> f32[1024] {\n  %a = f32[1024]{0} parameter(0)\n  "
        + "\n  ".join(lines)
        + "\n}\n"
    )


def computation(name: str, *lines: str) -> str:
    return (
        f"%{name} (p: f32[1024]) -> f32[256] {{\n  %p = f32[1024]{{0}} parameter(0)\n  "
        + "\n  ".join(lines)
        + "\n}\n\n"
    )


SCATTER = "%rs = f32[256]{0} reduce-scatter(%p), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add"
WORK = '%work = f32[1024]{0} fusion(%a), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"100"}'


@pytest.mark.parametrize(
    ("text", "kind", "received", "asynchronous"),
    [
        (entry(SCATTER.replace("%p", "%a")), "reduce-scatter", 3 * 1024, False),
        (
            entry(
                "%s = ((f32[1024]), f32[256], u32[]) async-start(%a), calls=%wrapped",
                WORK,
                "%u = ((f32[1024]), f32[256], u32[]) async-update(%s)",
                "%d = f32[256]{0} async-done(%u)",
                before=computation("wrapped", SCATTER),
            ),
            "reduce-scatter",
            3 * 1024,
            True,
        ),
        (
            entry(
                "%s = ((f32[1024], token[]), f32[256]) call-start(%a, %token), to_apply=%wrapped",
                WORK,
                "%d = f32[256]{0} call-done(%s)",
                before=computation("wrapped", SCATTER),
            ),
            "reduce-scatter",
            3 * 1024,
            True,
        ),
        (
            entry(
                "%b = bf16[8]{0} parameter(1)",
                "%s = ((f32[1024]{0}, bf16[8]{0}), (f32[4096]{0}, bf16[32]{0})) all-gather-start(%a, %b), "
                "replica_groups={{0,1,2,3}}, dimensions={0}",
                WORK,
                "%d = (f32[4096]{0}, bf16[32]{0}) all-gather-done(%s)",
            ),
            "all-gather",
            3 * (4096 + 16),
            True,
        ),
        (
            entry(
                "%f1 = f32[256]{0} fusion(%a), kind=kCustom, calls=%outer",
                before=computation("inner", SCATTER)
                + computation("outer", "%f2 = f32[256]{0} fusion(%p), kind=kLoop, calls=%inner"),
            ),
            "reduce-scatter",
            3 * 1024,
            False,
        ),
        (
            entry(
                "%c = f32[256]{0} conditional(%a, %a, %a), branch_computations={%one, %two}",
                before=computation("one", SCATTER) + computation("two", "%n = f32[256]{0} negate(%p)"),
            ),
            "reduce-scatter",
            3 * 1024,
            False,
        ),
        (entry("%g = f8e4m3fn[4096]{0} all-gather(%a), replica_groups={{0,1,2,3}}"), "all-gather", 3 * 1024, False),
    ],
    ids=["plain", "wrapped", "on another core", "combined", "in fusions", "in a branch", "eight bits"],
)
def test_collectives_are_found_wherever_compilers_put_them(
    text: str, kind: str, received: int, asynchronous: bool
) -> None:
    ran = hlo.Replay(hlo.parse(text), 4, Torus(CUBE, 1e9), CLOCK, layer_trips=2)
    (found,) = ran.collectives
    assert (found.kind, found.bytes, found.asynchronous) == (kind, received, asynchronous)
    if asynchronous:
        assert found.beside == pytest.approx(100e-9)
        assert found.exposed == pytest.approx(found.seconds - 100e-9)
    else:
        assert found.exposed == found.seconds == ran.seconds > 0


def test_what_is_not_waited_for_where_it_began_is_exposed_to_the_end() -> None:
    start = "%s = (f32[1024]{0}, f32[1024]{0}) collective-permute-start(%a), source_target_pairs={{0,1},{1,0}}"
    ran = hlo.Replay(hlo.parse(entry(start, WORK)), 4, Torus(CUBE, 4096e6), CLOCK, layer_trips=2)
    assert ran.seconds == pytest.approx(1e-6)
    assert ran.collectives[0].exposed == pytest.approx(0.9e-6)


def test_a_collective_in_a_place_not_understood_is_an_error() -> None:
    text = entry("%c = f32[256]{0} custom-call(%a), called_computations={%odd}", before=computation("odd", SCATTER))
    with pytest.raises(ValueError, match="odd: rs would not be counted"):
        hlo.Replay(hlo.parse(text), 4, None, 0.0, layer_trips=2)


def test_only_the_loop_over_layers_is_the_layers() -> None:
    ran = hlo.Replay(hlo.parse(TEXT), 4, None, 0.0, layer_trips=3)
    assert [c.in_layers for c in ran.collectives] == [False, False]
