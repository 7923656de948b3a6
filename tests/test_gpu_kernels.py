"""What is read of a GPU's program, against numbers worked out by hand."""

import dataclasses
import json

import pytest
from source_tree import ROOT

from benchmarks import aot_gpu, check_budgets, gpu_kernels

PRODUCT = json.dumps(
    {
        "gemm_backend_config": {
            "dot_dimension_numbers": {
                "lhs_contracting_dimensions": ["1"],
                "rhs_contracting_dimensions": ["0"],
            }
        }
    }
)
ATTENTION = json.dumps(
    {
        "cudnn_fmha_backend_config": {
            "intermediate_tensor_shape": {"dimensions": ["2", "6", "96", "80"]},
            "mask_type": "NO_MASK",
        }
    }
)

LOOP = f"""\
HloModule jit_f, is_scheduled=true

%wide (p: f32[64,32]) -> bf16[64,32] {{
  %p = f32[64,32]{{1,0}} parameter(0)
  ROOT %narrow = bf16[64,32]{{1,0}} convert(%p)
}}

%layer (stack: bf16[5,32,16], n: s32[]) -> bf16[32,16] {{
  %stack = bf16[5,32,16]{{2,1,0}} parameter(0)
  %n = s32[] parameter(1)
  %zero = s32[] constant(0)
  %cut = bf16[1,32,16]{{2,1,0}} dynamic-slice(%stack, %n, %zero, %zero)
  ROOT %flat = bf16[32,16]{{1,0}} bitcast(%cut)
}}

%write (slots: bf16[5,8,16], new: bf16[8,16], n: s32[]) -> bf16[5,8,16] {{
  %slots = bf16[5,8,16]{{2,1,0}} parameter(0)
  %new = bf16[8,16]{{1,0}} parameter(1)
  %n = s32[] parameter(2)
  %zero = s32[] constant(0)
  %one = bf16[1,8,16]{{2,1,0}} bitcast(%new)
  ROOT %put = bf16[5,8,16]{{2,1,0}} dynamic-update-slice(%slots, %one, %n, %zero, %zero)
}}

%square (x: bf16[8,64]) -> bf16[8,64] {{
  %x = bf16[8,64]{{1,0}} parameter(0)
  ROOT %y = bf16[8,64]{{1,0}} multiply(%x, %x)
}}

%body (t: (s32[], bf16[8,64], f32[64,32], bf16[5,32,16], bf16[5,8,16])) -> (s32[], bf16[8,64], f32[64,32], bf16[5,32,16], bf16[5,8,16]) {{
  %t = (s32[], bf16[8,64]{{1,0}}, f32[64,32]{{1,0}}, bf16[5,32,16]{{2,1,0}}, bf16[5,8,16]{{2,1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = bf16[8,64]{{1,0}} get-tuple-element(%t), index=1
  %w = f32[64,32]{{1,0}} get-tuple-element(%t), index=2
  %s = bf16[5,32,16]{{2,1,0}} get-tuple-element(%t), index=3
  %c = bf16[5,8,16]{{2,1,0}} get-tuple-element(%t), index=4
  %narrow.1 = bf16[64,32]{{1,0}} fusion(%w), kind=kLoop, calls=%wide
  %dot.2 = (bf16[8,32]{{1,0}}, s8[1000]{{0}}) custom-call(%x, %narrow.1), custom_call_target="__cublas$lt$matmul", backend_config={PRODUCT}
  %y = bf16[8,32]{{1,0}} get-tuple-element(%dot.2), index=0
  %layer.3 = bf16[32,16]{{1,0}} fusion(%s, %i), kind=kLoop, calls=%layer
  %dot.4 = (bf16[8,16]{{1,0}}, s8[1000]{{0}}) custom-call(%y, %layer.3), custom_call_target="__cublas$lt$matmul", backend_config={PRODUCT}
  %z = bf16[8,16]{{1,0}} get-tuple-element(%dot.4), index=0
  %write.5 = bf16[5,8,16]{{2,1,0}} fusion(%c, %z, %i), kind=kLoop, calls=%write
  %square.6 = bf16[8,64]{{1,0}} fusion(%x), kind=kLoop, calls=%square
  ROOT %next = (s32[], bf16[8,64]{{1,0}}, f32[64,32]{{1,0}}, bf16[5,32,16]{{2,1,0}}, bf16[5,8,16]{{2,1,0}}) tuple(%i, %square.6, %w, %s, %write.5)
}}

%condition (t: (s32[], bf16[8,64], f32[64,32], bf16[5,32,16], bf16[5,8,16])) -> pred[] {{
  %t = (s32[], bf16[8,64]{{1,0}}, f32[64,32]{{1,0}}, bf16[5,32,16]{{2,1,0}}, bf16[5,8,16]{{2,1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] constant(7)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}}

ENTRY %main (x: bf16[8,64], w: f32[64,32], s: bf16[5,32,16], c: bf16[5,8,16]) -> bf16[5,8,16] {{
  %x = bf16[8,64]{{1,0}} parameter(0)
  %w = f32[64,32]{{1,0}} parameter(1)
  %s = bf16[5,32,16]{{2,1,0}} parameter(2)
  %c = bf16[5,8,16]{{2,1,0}} parameter(3)
  %zero = s32[] constant(0)
  %t = (s32[], bf16[8,64]{{1,0}}, f32[64,32]{{1,0}}, bf16[5,32,16]{{2,1,0}}, bf16[5,8,16]{{2,1,0}}) tuple(%zero, %x, %w, %s, %c)
  %while.1 = (s32[], bf16[8,64]{{1,0}}, f32[64,32]{{1,0}}, bf16[5,32,16]{{2,1,0}}, bf16[5,8,16]{{2,1,0}}) while(%t), condition=%condition, body=%body
  ROOT %out = bf16[5,8,16]{{2,1,0}} get-tuple-element(%while.1), index=4
}}
"""  # noqa: E501

CALLS = f"""\
ENTRY %main (q: bf16[2,96,6,64], k: bf16[2,80,6,64], x: f32[2,6,6,4], g: f32[2,6,6,5]) -> bf16[] {{
  %q = bf16[2,96,6,64]{{3,2,1,0}} parameter(0)
  %k = bf16[2,80,6,64]{{3,2,1,0}} parameter(1)
  %x = f32[2,6,6,4]{{3,2,1,0}} parameter(2)
  %g = f32[2,6,6,5]{{3,2,1,0}} parameter(3)
  %a = (bf16[2,6,96,64]{{3,1,2,0}}, f32[2,6,96]{{2,1,0}}, u8[9]{{0}}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax", backend_config={ATTENTION}
  %w = (f32[5,3,3,4]{{3,2,1,0}}, u8[0]{{0}}) custom-call(%x, %g), window={{size=3x3 pad=1_1x1_1}}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
  ROOT %c = bf16[] constant(0)
}}
"""  # noqa: E501

SLICED = """\
%first (x: bf16[8,64], y: bf16[8], z: f32[8,64]) -> (f32[8,1], f32[8]) {
  %x = bf16[8,64]{1,0} parameter(0)
  %y = bf16[8]{0} parameter(1)
  %z = f32[8,64]{1,0} parameter(2)
  %wide = bf16[8,64]{1,0} broadcast(%y), dimensions={0}
  %sum = bf16[8,64]{1,0} add(%x, %wide)
  %sum32 = f32[8,64]{1,0} convert(%sum)
  %cut = f32[8,1]{1,0} slice(%sum32), slice={[0:8], [0:1]}
  %zero = f32[] constant(0)
  %total = f32[8]{0} reduce(%z, %zero), dimensions={1}, to_apply=%add
  ROOT %both = (f32[8,1]{1,0}, f32[8]{0}) tuple(%cut, %total)
}

ENTRY %main (x: bf16[8,64], y: bf16[8], z: f32[8,64]) -> (f32[8,1], f32[8]) {
  %x = bf16[8,64]{1,0} parameter(0)
  %y = bf16[8]{0} parameter(1)
  %z = f32[8,64]{1,0} parameter(2)
  ROOT %first.1 = (f32[8,1]{1,0}, f32[8]{0}) fusion(%x, %y, %z), kind=kInput, calls=%first
}
"""


def named(text):
    return {k.name: k for k in gpu_kernels.kernels(text)}


def test_kernels_of_a_loop_run_as_often_as_it_turns():
    found = named(LOOP)
    assert found["square.6"].loops == (7,)
    assert found["square.6"].bytes == 2 * 8 * 64 * 2
    assert found["square.6"].times == 7


def test_product_counts_no_workspace():
    product = named(LOOP)["dot.2"]
    assert (product.kind, product.dtype) == ("product", "bf16")
    assert product.flops == 2 * 8 * 64 * 32
    assert product.bytes == 2 * (8 * 64 + 64 * 32 + 8 * 32)


def test_slice_reads_what_it_gives_and_an_update_writes_what_it_changes():
    found = named(LOOP)
    assert found["layer.3"].bytes == 2 * 2 * 32 * 16 + 4  # and the number of the layer
    assert found["write.5"].bytes == 2 * 2 * 8 * 16 + 4


def test_what_is_computed_upon_before_it_is_sliced_is_read_in_part():
    read, written = 2 * 8 + 2 * 8 + 4 * 8 * 64, 4 * 8 + 4 * 8
    assert named(SLICED)["first.1"].bytes == read + written


def test_weights_that_every_turn_converts_or_copies_are_found():
    found = named(LOOP)
    assert found["narrow.1"].waste == "conversion"
    assert found["layer.3"].waste == "copy"
    assert {k for k, x in found.items() if x.waste} == {"narrow.1", "layer.3"}


def test_what_changes_in_the_loop_is_no_weight():
    text = LOOP.replace("tuple(%i, %square.6, %w, %s", "tuple(%i, %square.6, %w.2, %s")
    assert named(text)["narrow.1"].waste is None


def test_summary_counts_a_step_and_its_bound():
    found = gpu_kernels.kernels(LOOP)
    total = gpu_kernels.summary(found, 7)
    assert total["kernels_per_step"] == 7  # with the comparison that ends it
    assert total["conversions_per_step"] == total["copies_per_step"] == 1
    assert total["float32_products"] == 0
    bound = 7 * sum(
        max(k.bytes / gpu_kernels.BYTES_PER_SECOND, k.flops / gpu_kernels.FLOPS_PER_SECOND)
        for k in found
    )
    assert total["bound_seconds"] == pytest.approx(bound)
    slow = dataclasses.replace(found[0], flops=1e15, loops=())
    assert gpu_kernels.summary([slow])["bound_seconds"] == 1e15 / gpu_kernels.FLOPS_PER_SECOND


def test_steps_may_be_turns_of_several_loops_and_are_never_of_none():
    found = gpu_kernels.kernels(LOOP)
    other = [dataclasses.replace(k, loops=(3,)) for k in found if k.loops]
    total = gpu_kernels.summary(found + other, 7, 3)
    assert total["bytes_per_step"] == gpu_kernels.summary(found, 7)["bytes_per_step"] > 0
    assert total["copies_per_step"] == gpu_kernels.summary(found, 7)["copies_per_step"]
    for loops in [(10,), (7, 5)]:
        with pytest.raises(ValueError, match="do not turn"):
            gpu_kernels.summary(found, *loops)


def test_attention_is_two_products_and_half_of_them_when_causal():
    whole = 2 * 2 * 2 * 6 * 96 * 80 * 64
    assert named(CALLS)["a"].flops == whole
    assert named(CALLS.replace("NO_MASK", "CAUSAL"))["a"].flops == whole / 2
    backward = CALLS.replace("fmhaSoftmax", "fmhaSoftmaxBackward")
    assert named(backward)["a"].flops == 2.5 * whole


def test_gradient_of_a_convolution_has_the_flops_of_the_convolution():
    pairs = 6 * 3 - 2  # of output and kernel places along an axis, less those on the padding
    assert named(CALLS)["w"].flops == 2 * 2 * pairs**2 * 4 * 5
    assert gpu_kernels.summary(gpu_kernels.kernels(CALLS))["float32_convolutions"] == 1


def test_without_the_compiler_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(aot_gpu.importlib.util, "find_spec", lambda name: None)
    for name in ("JAX_PLATFORMS", "XLA_FLAGS"):
        monkeypatch.setenv(name, "")  # and put back
    with pytest.raises(SystemExit, match=r"pip install jax-cuda12-plugin==\d") as exit_:
        aot_gpu.prepare_environment()
    assert "\n" not in str(exit_.value)


def test_budget_allows_3_percent_more_and_no_new_waste():
    report = {"bytes_per_step": 1.03e9} | dict.fromkeys(check_budgets.FORBIDDEN, 0)
    budget = {"bytes_per_step": 1.0e9, "allowed": {"copies_per_step": 2}}
    assert check_budgets.faults("clip", report, budget) == []
    assert check_budgets.faults("clip", report | {"copies_per_step": 2}, budget) == []
    [line] = check_budgets.faults("clip", report | {"bytes_per_step": 1.031e9}, budget)
    assert line == "clip: 1.031 GB a step, 1.000 when last recorded"
    [line] = check_budgets.faults("clip", report | {"copies_per_step": 3}, budget)
    assert line == "clip: 3 copies per step, 2 allowed"
    [line] = check_budgets.faults("clip", report | {"float32_convolutions": 1}, budget)
    assert line == "clip: 1 float32 convolutions, 0 allowed"


def test_budgets_name_programs_that_there_are():
    for budget in json.loads(check_budgets.FILE.read_text()).values():
        assert budget["program"]["program"] in aot_gpu.PROGRAMS
        assert (ROOT / budget["program"]["config"]).is_file()
        assert budget["bytes_per_step"] > 0
