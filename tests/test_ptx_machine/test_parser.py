# SPDX-License-Identifier: Apache-2.0
"""The PTX machine's parser, and that nothing unknown is ever skipped."""

import numpy as np
import pytest
from ptx_machine import PtxError, PtxSyntaxError, launch
from ptx_machine.parser import Imm, Mem, Pair, Reg, Vec, parse
from ptx_machine.testing import kernel, run


def parse_body(body: str):
    return parse(kernel(body)).entry("k").instructions


def test_operands():
    ld, shfl, bra = parse_body(
        "ld.global.v2.b32 {%r1, %r2}, [%rd3+-8];\n"
        "@!%p1 shfl.sync.idx.b32 %r1|%p2, %r3, 0x1F, 31, -1;\n"
        "L: bra L;"
    )[:3]
    assert ld.operands == [Vec((Reg("%r1"), Reg("%r2"))), Mem(Reg("%rd3"), -8)]
    assert shfl.guard == Reg("%p1", True)
    assert shfl.operands[0] == Pair(Reg("%r1"), Reg("%p2"))
    assert shfl.operands[2] == Imm(31)
    assert shfl.operands[4] == Imm(-1)
    assert bra.opcode == "bra"


def test_float_literals():
    moves = parse_body("mov.f32 %r1, 0f3F800000; mov.f64 %rd1, 0d3FF0000000000000;")
    assert moves[0].operands[1] == Imm(0x3F800000, 32)
    assert moves[1].operands[1] == Imm(0x3FF0000000000000, 64)


def test_scopes_shadow_registers_and_labels():
    # Inline assembly repeats the same names in block after block.
    out = np.zeros(2, np.uint32)
    block = (
        "{ .reg .b32 t; mov.b32 t, %d; bra.uni DONE; mov.b32 t, 9; DONE: add.u32 %%r1, t, %%r1; }"
    )
    text = kernel(
        "mov.b32 %r1, 0;"
        + block % 5
        + block % 7
        + "ld.param.u64 %rd1, [p0]; st.global.u32 [%rd1], %r1;",
        ["u64"],
    )
    run(text.replace("%%", "%"), [out], block=1)
    assert out[0] == 12


def test_line_numbers_survive_comments():
    text = kernel("/* two\nlines */ // more\nadd.u32 %r1, %r2, %r3;\nnonsense.u32 %r1, %r2;")
    line = next(i for i, t in enumerate(text.split("\n"), 1) if "nonsense" in t)
    with pytest.raises(PtxSyntaxError, match=f"line {line}: unknown instruction 'nonsense.u32'"):
        launch(text, grid=1, block=32)


@pytest.mark.parametrize(
    "body",
    [
        "tex.2d.v4.f32.f32 {%r1, %r2, %r3, %r4}, [tex, {%r5, %r6}];",
        "mbarrier.pending_count.b64 %r1, %rd1;",
        "cp.async.bulk.tensor.3d.shared::cta.global.im2col.mbarrier::complete_tx::bytes "
        "[%r1], [%rd1, {%r2, %r3, %r4}], [%r5];",
        "tcgen05.shift.cta_group::1.down [%r1];",
        "tcgen05.mma.ws.cta_group::1.kind::f16 [%r1], %rd1, %rd2, %r2, %p1;",
        "cvt.rs.satfinite.e2m1x4.f32 %rs1, {%r1, %r2, %r3, %r4}, %r5;",
        "mov.u32 %r1, %no_such_register;",
        "bra NOWHERE;",
        "add.u32 %r1, %unknown, %r2;",
    ],
)
def test_what_is_not_modeled_is_an_error(body):
    with pytest.raises(PtxError):
        launch(kernel(body), grid=1, block=32)


def test_launch_bounds_are_checked():
    with pytest.raises(PtxError, match="64"):
        launch(kernel("", threads=64), grid=1, block=128)
    with pytest.raises(PtxError, match="multiple of cluster"):
        launch(kernel(""), grid=3, block=32, cluster=(2, 1, 1))
    with pytest.raises(PtxError, match="shared memory"):
        launch(
            kernel("", shared=".extern .shared .align 16 .b8 s[];", target="sm_120a"),
            grid=1, block=32, dynamic_smem=110 * 1024,
        )  # fmt: skip
    with pytest.raises(ValueError, match="parameters"):
        launch(kernel("", ["u64"]), grid=1, block=32)


def test_calls():
    function = """
.func (.param .b32 out) twice(.param .b32 x)
{
    .reg .b32 %r<3>;
    ld.param.b32 %r1, [x];
    add.u32 %r2, %r1, %r1;
    st.param.b32 [out], %r2;
    ret;
}
"""
    body = """
mov.u32 %r1, %tid.x;
{ .param .b32 arg; .param .b32 res;
  st.param.b32 [arg], %r1;
  call.uni (res), twice, (arg);
  ld.param.b32 %r2, [res]; }
ld.param.u64 %rd1, [p0];
mad.wide.u32 %rd1, %r1, 4, %rd1;
st.global.u32 [%rd1], %r2;
"""
    out = np.zeros(32, np.uint32)
    run(kernel(body, ["u64"], shared=function), [out])
    np.testing.assert_array_equal(out, 2 * np.arange(32))
