"""What is read from a compiler's text, against numbers worked out by hand."""

import pytest

from benchmarks.hlo_costs import program_costs

LOOP = """\
HloModule jit_f

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (g: bf16[16,32]) -> bf16[4,32] {
  %g = bf16[16,32]{1,0} parameter(0)
  %all-reduce.2 = bf16[16,32]{1,0} all-reduce(%g), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice = bf16[4,32]{1,0} dynamic-slice(%all-reduce.2, %g), dynamic_slice_sizes={4,32}
}

%body (p: (s32[], bf16[8,16], bf16[4,32])) -> (s32[], bf16[8,16], bf16[4,32]) {
  %p = (s32[], bf16[8,16]{1,0}, bf16[4,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[8,16]{1,0} get-tuple-element(%p), index=1
  %w = bf16[4,32]{1,0} get-tuple-element(%p), index=2
  %all-gather.3 = bf16[16,32]{1,0:T(8,128)(2,1)} all-gather(%w), replica_groups=[2,4]<=[8]
  %dot.4 = bf16[8,32]{1,0} dot(%x, %all-gather.3), lhs_contracting_dims={1}
  %fusion.5 = bf16[4,32]{1,0} fusion(%all-gather.3), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %t = (s32[], bf16[8,16]{1,0}, bf16[4,32]{1,0}) tuple(%i, %x, %fusion.5)
}

%condition (p: (s32[], bf16[8,16], bf16[4,32])) -> pred[] {
  %p = (s32[], bf16[8,16]{1,0}, bf16[4,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} constant(7)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (q: (s32[], bf16[8,16], bf16[4,32])) -> f32[5] {
  %q = (s32[], bf16[8,16]{1,0}, bf16[4,32]{1,0}) parameter(0)
  %while.6 = (s32[], bf16[8,16]{1,0}, bf16[4,32]{1,0}) while(%q), condition=%condition, body=%body
  %z = f32[5]{0} constant({1, 2, 3, 4, 5})
  ROOT %all-reduce.7 = f32[5]{0} all-reduce(%z), replica_groups=mesh['x'=2,'y'=4] {'y'}
}
"""

CONVOLUTION = """\
ENTRY %main (x: f32[2,6,6,3], k: f32[3,3,3,5]) -> f32[2,6,6,5] {
  %x = f32[2,6,6,3]{3,2,1,0} parameter(0)
  %k = f32[3,3,3,5]{3,2,1,0} parameter(1)
  ROOT %c = f32[2,6,6,5] convolution(%x, %k), window={pad=1_1x1_1}, dim_labels=b01f_01io->b01f
}
"""


def test_body_of_a_loop_counts_as_often_as_the_loop_turns():
    costs = program_costs(LOOP, 8)
    assert costs.flops == 7 * 2 * 8 * 16 * 32
    assert costs.count == {"all-gather": 7, "reduce-scatter": 7, "all-reduce": 1}


def test_bytes_are_those_of_a_ring():
    sent = program_costs(LOOP, 8).sent
    whole = 16 * 32 * 2
    assert sent["all-gather"] == 7 * whole * 3 / 4
    assert sent["reduce-scatter"] == 7 * whole * 3 / 4
    assert sent["all-reduce"] == 2 * 20 * 3 / 4


def test_convolution_counts_no_padding():
    pairs = 6 * 3 - 2  # of output and kernel places along an axis, less those on the padding
    assert program_costs(CONVOLUTION, 1).flops == 2 * 2 * pairs**2 * 3 * 5


def test_loop_of_unknown_length_is_refused():
    with pytest.raises(ValueError, match=r"how often the loop while\.6 turns"):
        program_costs(LOOP.replace("constant(7)", "parameter(1)"), 8)


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("[4,2]<=[8]", 2),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("{}", 8),
        ("mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'x'}", 2),
        ("mesh['x'=2,'y'=2,'z'=2] {'x','z'}", 4),
    ],
)
def test_size_of_a_group_is_read_in_every_form(groups, size):
    text = LOOP.replace("mesh['x'=2,'y'=4] {'y'}", groups)
    assert program_costs(text, 8).sent["all-reduce"] == 2 * 20 * (size - 1) / size


def test_groups_of_an_unknown_form_are_refused():
    with pytest.raises(ValueError, match="cannot read replica_groups=ring"):
        program_costs(LOOP.replace("mesh['x'=2,'y'=4] {'y'}", "ring(8)"), 8)
