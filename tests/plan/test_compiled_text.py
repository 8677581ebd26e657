"""What is read from a compiled program's text: messages, traffic, loops as often as they turn."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from slimsam_jax.plan.compiled_text import parse, traffic

TEXT = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8,4]{1,0})->f32[8,4]{1,0}}

%fused (p0: f32[8,4], p1: f32[2,4]) -> f32[2,4] {
  %p0 = f32[8,4]{1,0} parameter(0)
  %p1 = f32[2,4]{1,0} parameter(1)
  ROOT %add.9 = f32[2,4]{1,0} add(%p0, %p1)
}

%body (state: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %state = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%state), index=1
  %piece = f32[2,4]{1,0} dynamic-slice(%x, %i), dynamic_slice_sizes={2,4}
  %new = f32[2,4]{1,0} fusion(%x, %piece), kind=kLoop, calls=%fused, metadata={op_name="a(b), c=d"}
  %sum = f32[2,4]{1,0} all-reduce(%new), replica_groups={}, to_apply=%fused
  %out = f32[8,4]{1,0} dynamic-update-slice(%x, %sum, %i)
  ROOT %next = (s32[], f32[8,4]{1,0}) tuple(%i, %out)
}

%condition (state: (s32[], f32[8,4])) -> pred[] {
  %state.1 = (s32[], f32[8,4]{1,0}) parameter(0)
  ROOT %less = pred[] compare(%state.1, %state.1), direction=LT
}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %begin = (s32[], f32[8,4]{1,0}) tuple(%zero, %a)
  %loop = (s32[], /*index=1*/f32[8,4]{1,0}) while(%begin), condition=%condition, body=%body, TRIPS
  %end = f32[8,4]{1,0} get-tuple-element(%loop), index=1
  %gather = (bf16[2,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(%end), dimensions={0}
  %gathered = bf16[8,4]{1,0} all-gather-done(%gather)
  ROOT %result = f32[8,4]{1,0} convert(%gathered)
}
"""
TRIPS = 'backend_config={"known_trip_count":{"n":"3"}}'
# slice 2 * 32 bytes; fusion reads 128 + 32 and writes 32; all-reduce 32 + 32; update 2 * 32
IN_THE_LOOP = 64 + 192 + 64 + 64
AFTER = (64 + 128) + (128 + 64)  # all-gather of the larger of its pair, and its operand; convert


def test_loops_count_as_often_as_they_turn():
    met = traffic(TEXT.replace("TRIPS", TRIPS))
    assert met.collectives == {"all-reduce": (3, 3 * 32), "all-gather": (1, 64)}
    assert met.moved == 3 * IN_THE_LOOP + AFTER
    assert met.unknown_loops == 0


SENT = """HloModule jit_step, is_scheduled=true

ENTRY %main (a: f32[8,4], b: f32[2]) -> f32[2] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = f32[2]{0} parameter(1)
  %long-start = f32[8,4]{1,0} all-reduce-start(%a), to_apply=%add
  %short-start = f32[2]{0} all-reduce-start(%b), to_apply=%add
  %same = f32[2]{0} bitcast(%b)
  %short-done = f32[2]{0} all-reduce-done(%short-start)
  %twice = f32[2]{0} add(%short-done, %b)
  %long-done = f32[8,4]{1,0} all-reduce-done(%long-start)
  ROOT %sum = f32[2]{0} all-reduce(%twice), to_apply=%add
}
"""


def test_what_travels_while_something_is_computed():
    assert traffic(SENT).collectives == {"all-reduce": (3, 128 + 8 + 8)}
    assert traffic(SENT).beside == 128
    assert traffic(SENT.replace("add(%short-done", "bitcast(%short-done")).beside == 0


IN_FUSIONS = """HloModule jit_step, is_scheduled=true

%begin (p0: bf16[8,4]) -> (bf16[8,4], u32[]) {
  %p0 = bf16[8,4]{1,0} parameter(0)
  %first = bf16[8,4]{1,0} all-reduce(%p0), to_apply=%add
  ROOT %both = (bf16[8,4]{1,0}, u32[]) custom-call(%first)
}

%multiply (q0: bf16[8,4]) -> bf16[8,4] {
  %q0 = bf16[8,4]{1,0} parameter(0)
  %next = bf16[8,4]{1,0} all-reduce(%q0), to_apply=%add
  ROOT %product = bf16[8,4]{1,0} multiply(%q0, %next)
}

ENTRY %main (a: bf16[8,4]) -> bf16[8,4] {
  %a = bf16[8,4]{1,0} parameter(0)
  %async-collective-start.1 = (bf16[8,4]{1,0}, u32[]) fusion(%a), kind=kCustom, calls=%begin
  %x = bf16[8,4]{1,0} get-tuple-element(%async-collective-start.1), index=0
  %step = bf16[8,4]{1,0} fusion(%x), kind=kOutput, calls=%multiply
  %y = bf16[8,4]{1,0} bitcast(%step)
  ROOT %async-collective-done.1 = bf16[8,4]{1,0} fusion(%y), kind=kCustom, calls=%end
}
"""


def test_a_tpu_sends_within_what_it_computes():
    """Its compiler takes an all-reduce apart, and puts each part into a fusion: it counts once."""
    assert (traffic(IN_FUSIONS).collectives, traffic(IN_FUSIONS).beside) == ({"all-reduce": (1, 64)}, 64)
    at_once = IN_FUSIONS.replace("fusion(%x), kind=kOutput, calls=%multiply", "bitcast(%x)")
    assert (traffic(at_once).collectives, traffic(at_once).beside) == ({"all-reduce": (1, 64)}, 0)


WRAPPED = """HloModule jit_step, is_scheduled=true

%wrapped (p0: f32[8]) -> f32[2] {
  %p0 = f32[8]{0} parameter(0)
  ROOT %scattered = f32[2]{0} reduce-scatter(%p0), dimensions={0}, to_apply=%add
}

ENTRY %main (a: f32[8]) -> f32[2] {
  %a = f32[8]{0} parameter(0)
  %s = ((f32[8]{0}), f32[2]{0}, u32[]) async-start(%a), calls=%wrapped
  %between = f32[8]{0} KIND(%a, %a)
  %u = ((f32[8]{0}), f32[2]{0}, u32[]) async-update(%s)
  ROOT %d = f32[2]{0} async-done(%u)
}
"""


@pytest.mark.parametrize(("kind", "beside"), [("multiply", 8), ("add-dependency", 0), ("all-reduce", 0)])
def test_what_is_wrapped_travels_beside_what_computes(kind, beside):
    met = traffic(WRAPPED.replace("KIND", kind))
    assert (met.collectives["reduce-scatter"], met.beside) == ((1, 8), beside)


def test_a_loop_of_unknown_length_counts_once_and_is_named():
    met = traffic(TEXT.replace("TRIPS", "metadata={}"))
    assert met.moved == IN_THE_LOOP + AFTER and met.unknown_loops == 1


def test_operands_are_those_in_the_brackets():
    computations, entry = parse(TEXT)
    assert entry == "main"
    new = next(each for each in computations["body"] if each.name == "new")
    assert (new.kind, new.size, new.operands) == ("fusion", 32, ("x", "piece"))


SLICED = """HloModule jit_step

%nested (n0: f32[64,4], n1: s32[]) -> f32[1,4] {
  %n0 = f32[64,4]{1,0} parameter(0)
  %n1 = s32[] parameter(1)
  ROOT %slice.1 = f32[1,4]{1,0} dynamic-slice(%n0, %n1, %n1), dynamic_slice_sizes={1,4}
}

%fused (p0: f32[64,4], p1: s32[], p2: bf16[64,4], p3: f32[64,4], p4: f32[1,4]) -> (f32[64,4], f32[1,4]) {
  %p4 = f32[1,4]{1,0} parameter(4)
  %p3 = f32[64,4]{1,0} parameter(3)
  %p2 = bf16[64,4]{1,0} parameter(2)
  %p1 = s32[] parameter(1)
  %p0 = f32[64,4]{1,0} parameter(0)
  %wide = f32[64,4]{1,0} convert(%p2)
  %two = f32[2,4]{1,0} slice(%wide), slice={[0:2], [0:4]}
  %one = f32[1,4]{1,0} fusion(%p3, %p1), kind=kLoop, calls=%nested
  %sum = f32[1,4]{1,0} add(%one, %p4)
  %new = f32[64,4]{1,0} dynamic-update-slice(%p0, %sum, %p1, %p1)
  %named = f32[64,4]{1,0} bitcast(%new)
  ROOT %both = (f32[64,4]{1,0}, f32[1,4]{1,0}) tuple(%named, %sum)
}

%whole (q0: bf16[64,4]) -> f32[64,4] {
  %q0 = bf16[64,4]{1,0} parameter(0)
  ROOT %converted = f32[64,4]{1,0} convert(%q0)
}

ENTRY %main (a: f32[64,4], i: s32[], b: bf16[64,4], c: f32[64,4], d: f32[1,4]) -> f32[64,4] {
  %a = f32[64,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %b = bf16[64,4]{1,0} parameter(2)
  %c = f32[64,4]{1,0} parameter(3)
  %d = f32[1,4]{1,0} parameter(4)
  USED
}
"""
PAIR = "%pair = (f32[64,4]{1,0}, f32[1,4]{1,0}) fusion(%a, %i, %b, %c, %d), kind=kLoop, calls=%fused"


@pytest.mark.parametrize(
    ("line", "moved"),
    [
        # The index, two rows of bfloat16, one of c and of d; what is written of a and of the sum.
        (PAIR, (4 + 2 * 8 + 16 + 16) + (16 + 16)),
        ("%all = f32[64,4]{1,0} fusion(%b), kind=kLoop, calls=%whole", 512 + 1024),
        ("%s = f32[64,4]{1,0} scatter(%a, %i, %d), to_apply=%add", 2 * 16),
        ("%s = ((f32[64,4]{1,0}), f32[1,4]{1,0:T(8,128)(2,1)}, s32[]) slice-start(%a), slice={[0:1], [0:4]}", 2 * 16),
    ],
)
def test_a_piece_of_an_array_counts_as_the_piece(line, moved):
    assert traffic(SLICED.replace("USED", line)).moved == moved


def test_a_loop_over_rows_moves_each_once():
    """4 MB read and 4 MB written row by row, after 4 MB of zeros that they are written over; not 12 GB."""
    loop = jax.jit(lambda rows: jax.lax.map(lambda row: jnp.tanh(row) * 2 + 1, rows))
    text = loop.lower(jax.ShapeDtypeStruct((1000, 1000), jnp.float32)).compile().as_text()
    assert 8e6 <= traffic(text).moved < 12.1e6


@pytest.mark.parametrize(
    ("line", "sent"),
    [
        ("(f32[8]{0}, f32[4]{0}) all-reduce-start(%a, %d), to_apply=%add", {"all-reduce": (1, 48)}),
        ("f32[8]{0} all-reduce-start(%a), to_apply=%add", {"all-reduce": (1, 32)}),
        ("((f32[2]{0}, f32[1]{0}), (f32[8]{0}, f32[4]{0})) all-gather-start(%a, %d)", {"all-gather": (1, 48)}),
        ("(f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%a)", {"collective-permute": (1, 32)}),
        ("((f32[8]{0}), f32[1]{0}) reduce-scatter-start(%a)", {"reduce-scatter": (1, 4)}),
    ],
)
def test_what_begins_is_sent_with_all_its_results(line, sent):
    assert traffic(SLICED.replace("USED", f"%begun = {line}")).collectives == sent
