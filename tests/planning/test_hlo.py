"""Collectives and memory traffic, from recorded texts and from programs compiled here."""

import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dmpo_jax.planning import hlo

GOLDEN = pathlib.Path(__file__).parent / "golden"
MB = 2**20


def summary(found) -> dict:
    """{(kind, what it moves): (instructions, runs a step, bytes moved a step)}."""
    table = {}
    for one in found:
        row = table.setdefault((one.kind, one.moves), [0, 0, 0])
        for i, value in enumerate((1, one.trips, one.trips * one.moved)):
            row[i] += value
    return {key: tuple(row) for key, row in table.items()}


def test_a_tpu_program():
    """v5p 2x2x1, JAX 0.10.2: 6 layers in a scan and 4 beside it, 2048 x 2048 in bfloat16.

    A gather of each in the forward, of the scanned ones again in the rematerialised backward;
    one reduction of each gradient, which the compiler writes as an all-reduce and a slice.
    """
    text = (GOLDEN / "sharded_scan_v5p.hlo").read_text()
    found = hlo.collectives(text, [(2048, 2048)])
    moved = 2048 * 2048 * 2 * 3 // 4  # by a ring of 4
    assert summary(found) == {
        ("all-gather", "parameters"): (6, 16, 16 * moved),
        ("reduce-scatter", "parameters"): (5, 10, 10 * moved),
    }
    assert {one.group for one in found} == {4}
    assert {one.payload for one in found} == {8 * MB}
    other = hlo.collectives(text, [(7, 7)])
    assert {one.moves for one in other} == {"activations"}
    total, once = hlo.memory_traffic(text)
    assert once < total < 6 * once


@pytest.mark.parametrize("remat", [False, True])
def test_a_scan_over_gathered_weights(remat):
    """Eight fake devices: what stands in the loop counts once a trip."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    whole, rows = (NamedSharding(mesh, PartitionSpec(*spec)) for spec in ((), ("fsdp",)))
    last = NamedSharding(mesh, PartitionSpec(None, None, "fsdp"))

    def layer(x, kernel):
        kernel = jax.lax.with_sharding_constraint(kernel, whole)
        return jax.lax.with_sharding_constraint(jnp.tanh(x @ kernel), rows), None

    def loss(kernels, x):
        layers = jax.checkpoint(layer) if remat else layer
        return (jax.lax.scan(layers, x, kernels)[0] ** 2).mean()

    kernels = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=last)
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=rows)
    program = jax.jit(jax.grad(loss), out_shardings=last).lower(kernels, x).compile()
    found = summary(hlo.collectives(program.as_text(), [(64, 64), (5, 64, 64)]))
    _, runs, moved = found.pop(("all-gather", "parameters"))
    # The forward gathers each, the backward again or, without remat, keeps what was gathered
    # or gathers all at once: 5 to 10 kernels' worth, never 1.
    assert moved in [n * 5 * 64 * 64 * 4 * 7 // 8 for n in (1, 2)]
    assert runs in (5, 10, 6, 2)
    reduced = [value for (kind, _), value in found.items() if kind != "all-gather"]
    assert sum(row[2] for row in reduced) >= 5 * 64 * 64 * 4 * 7 // 8


def module(*lines: str, extra: str = "") -> str:
    body = "\n".join(f"  {line}" for line in lines)
    head = f"HloModule m, num_partitions=8\n\n{extra}\n"
    return f"{head}ENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n"


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        (
            "%a = (bf16[64,8]{1,0}, bf16[64,64]{1,0:T(8,128)}) all-gather-start(%p), "
            "channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={1}",
            ("all-gather", 8192, 7168, 8, "activations"),
        ),
        (
            "%a = f32[64,64]{1,0} all-reduce-start(%p), replica_groups=[2,4]<=[8], to_apply=%add",
            ("all-reduce", 16384, 24576, 4, "activations"),
        ),
        (
            "%a = f32[16,100]{1,0} reduce-scatter(%p), replica_groups={{0,1},{2,3}}, to_apply=%add",
            ("reduce-scatter", 12800, 6400, 2, "parameters"),
        ),
        (
            "%a = f32[32,100]{1,0} all-to-all(%p), "
            "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}",
            ("all-to-all", 12800, 9600, 4, "parameters"),
        ),
        (
            "%a = f32[64,64]{1,0} all-gather(%p), replica_groups=mesh['axis_0'=8] "
            "{'axis_0':(2)4}, dimensions={0}",
            ("all-gather", 16384, 12288, 4, "activations"),
        ),
        (
            "%a = (f32[64,64]{1,0}, f32[64,64]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) "
            "collective-permute-start(%p), channel_id=3, source_target_pairs={{0,1},{1,0}}",
            ("collective-permute", 16384, 16384, 2, "activations"),
        ),
        (
            "%a = f32[] all-reduce(%p), replica_groups={}, to_apply=%add",
            ("all-reduce", 4, 7, 8, "scalars"),
        ),
    ],
)
def test_every_way_of_writing_one(line, wanted):
    done = f"ROOT %done = f32[8]{{0}} {wanted[0]}-done(%a)"
    text = module("%p = f32[8]{0} parameter(0)", line, done)
    (one,) = hlo.collectives(text, [(32, 100)])
    assert (one.kind, one.payload, one.moved, one.group, one.moves) == wanted


def test_joined_arrays_count_each():
    line = "ROOT %a = (f32[32,100]{1,0}, f32[64,64]{1,0}) all-reduce(%p, %p), replica_groups={}"
    found = hlo.collectives(module("%p = f32[8]{0} parameter(0)", line), [(32, 100)])
    assert [one.moves for one in found] == ["parameters", "activations"]


@pytest.mark.parametrize("fused", [True, False])
def test_arrays_laid_end_to_end_count_each(fused):
    """As XLA's GPU compiler reduces gradients: one array, of which each has a part."""
    joined = "f32[7300]{0} concatenate(%a, %b, %c), dimensions={0}"
    inputs = ("a: f32[3200]", "b: f32[4096]", "c: f32[4]")
    parts = [f"%{x[0]} = {x.split(': ')[1]}{{0}} parameter({i})" for i, x in enumerate(inputs)]
    extra, made = "", f"%j = {joined}"
    if fused:
        body = "\n".join(f"  {line}" for line in (*parts, f"ROOT %j0 = {joined}"))
        extra = f"%joined ({', '.join(inputs)}) -> f32[7300] {{\n{body}\n}}\n"
        made = "%j = f32[7300]{0} fusion(%a, %b, %c), kind=kLoop, calls=%joined"
    start = "%r = f32[7300]{0} all-reduce-start(%j), replica_groups={}, to_apply=%add"
    done = "ROOT %done = f32[7300]{0} all-reduce-done(%r)"
    found = hlo.collectives(module(*parts, made, start, done, extra=extra), [(32, 100)])
    assert [one.moves for one in found] == ["parameters", "activations", "scalars"]
    assert sum(one.payload for one in found) == 4 * 7300


def test_small_arrays_that_are_gathered_are_no_parameters():
    """These are never sharded: it is the pairs' metrics that has as many numbers as a bias."""
    line = "ROOT %g = f32[8,16]{1,0} all-gather(%p), replica_groups={}, dimensions={1}"
    (one,) = hlo.collectives(module("%p = f32[8]{0} parameter(0)", line), [(128,)])
    assert one.moves == "scalars"
    line = "ROOT %g = f32[128]{0} all-reduce(%p), replica_groups={}, to_apply=%add"
    (one,) = hlo.collectives(module("%p = f32[8]{0} parameter(0)", line), [(128,)])
    assert one.moves == "parameters"


@pytest.mark.parametrize(("fused", "kind"), [(True, "reduce-scatter"), (False, "all-reduce")])
def test_a_slice_of_an_all_reduce(fused, kind):
    """One kernel of both is a reduce-scatter; apart, the whole array travels."""
    both = (
        "%p = f32[64,64]{1,0} parameter(0)",
        "%zero = s32[] constant(0)",
        "%a = f32[64,64]{1,0} all-reduce(%p), replica_groups={}, to_apply=%add",
        "ROOT %s = f32[64,8]{1,0} dynamic-slice(%a, %zero, %zero), dynamic_slice_sizes={64,8}",
    )
    if fused:
        body = "\n".join(f"  {line}" for line in both)
        extra = f"%both (p: f32[64,64]) -> f32[64,8] {{\n{body}\n}}\n"
        call = "ROOT %f = f32[64,8]{1,0} fusion(%q), kind=kCustom, calls=%both"
        text = module("%q = f32[64,64]{1,0} parameter(0)", call, extra=extra)
    else:
        text = module(*both)
    (one,) = hlo.collectives(text)
    assert one.kind == kind
    assert one.moved == (2 if kind == "all-reduce" else 1) * 64 * 64 * 4 * 7 // 8


LOOP = """
%body (t: (s32[], f32[64,64])) -> (s32[], f32[64,64]) {
  %t = (s32[], f32[64,64]{1,0}) parameter(0)
  %x = f32[64,64]{1,0} get-tuple-element(%t), index=1
  ROOT %g = f32[64,64]{1,0} all-gather(%x), replica_groups={}, dimensions={0}
}

%condition (t.1: (s32[], f32[64,64])) -> pred[] {
  %end = s32[] constant(9)
  %t.1 = (s32[], f32[64,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t.1), index=0
  ROOT %lt = pred[] compare(%i, %end), direction=LT
}
"""


@pytest.mark.parametrize(
    ("start", "attributes", "trips"),
    [
        ("0", "", 9),
        ("2", "", 7),
        ("0", ', backend_config={"known_trip_count":{"n":"4"}}', 4),
    ],
)
def test_trips(start, attributes, trips):
    """From the counter's start and end, or as XLA states them."""
    text = module(
        "%p = f32[8]{0} parameter(0)",
        f"%zero = s32[] constant({start})",
        "%tuple = (s32[], f32[8]{0}) tuple(%zero, %p)",
        "ROOT %loop = (s32[], f32[64,64]{1,0}) while(%tuple), condition=%condition, "
        f"body=%body{attributes}",
        extra=LOOP,
    )
    (one,) = hlo.collectives(text)
    assert one.trips == trips == hlo.kernels(text)


def test_traffic_of_a_slice():
    """A layer sliced off a stack is what is read, not the stack."""
    stack = jax.ShapeDtypeStruct((100, 64, 64), jnp.float32)
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)

    def scanned(stack, x):
        return jax.lax.scan(lambda x, kernel: (jnp.sin(x) + kernel, None), x, stack)[0]

    text = jax.jit(scanned).lower(stack, x).compile().as_text()
    total, once = hlo.memory_traffic(text)
    kernel = 64 * 64 * 4
    assert 100 * 2 * kernel < total < 100 * 12 * kernel
    assert once < 30 * kernel


def test_kernels():
    """Instructions inside a kernel, and those that move nothing, do not count."""
    inside = """
%fused (x: f32[64,64]) -> f32[64,64] {
  %x = f32[64,64]{1,0} parameter(0)
  %sine = f32[64,64]{1,0} sine(%x)
  ROOT %cosine = f32[64,64]{1,0} cosine(%sine)
}

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}
"""
    lines = (
        "%p = f32[64,64]{1,0} parameter(0)",
        "%f = f32[64,64]{1,0} fusion(%p), kind=kLoop, calls=%fused",
        "%start = f32[64,64]{1,0} all-reduce-start(%f), to_apply=%sum",
        "%done = f32[64,64]{1,0} all-reduce-done(%start)",
        "%turned = f32[64,64]{0,1} bitcast(%done)",
        "ROOT %copy = f32[64,64]{1,0} copy(%turned)",
    )
    assert hlo.kernels(module(*lines, extra=inside)) == 3


def test_workspaces_are_no_traffic():
    """Of cuBLAS: how much of one is used is not known."""
    product = (
        "%g = (f32[64,64]{1,0}, s8[4194304]{0}) custom-call(%p, %p), "
        'custom_call_target="__cublas$lt$matmul"'
    )
    total, _ = hlo.memory_traffic(module("%p = f32[64,64]{1,0} parameter(0)", product))
    assert total == 3 * 64 * 64 * 4


def test_other_texts_are_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.Program("module @jit_f {}")
