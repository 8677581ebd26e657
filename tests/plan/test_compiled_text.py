"""What is read from a compiled program's text: messages, traffic, loops as often as they turn."""

from __future__ import annotations

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


def test_a_loop_of_unknown_length_counts_once_and_is_named():
    met = traffic(TEXT.replace("TRIPS", "metadata={}"))
    assert met.moved == IN_THE_LOOP + AFTER and met.unknown_loops == 1


def test_operands_are_those_in_the_brackets():
    computations, entry = parse(TEXT)
    assert entry == "main"
    new = next(each for each in computations["body"] if each.name == "new")
    assert (new.kind, new.size, new.operands) == ("fusion", 32, ("x", "piece"))
