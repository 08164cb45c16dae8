# SPDX-License-Identifier: Apache-2.0
"""The gated activation, as the epilogues of all architectures apply it."""

from cutlass import Float32
from cutlass.cutlass_dsl import dsl_user_op

from jax_nvfp4.kernels.ptx import asm

LOG2_E = 1.4426950408889634


@dsl_user_op
def _gated(gate, up, limit, low, alpha, cubic, beta, *, loc=None, ip=None):
    text = """{
        .reg .f32 g, u, z;
        fma.rn.f32 g, $1, $2, $3;
        fma.rn.f32 u, $4, $5, $6;
        min.NaN.f32 g, g, $7;
        max.NaN.f32 u, u, $8;
        min.NaN.f32 u, u, $7;
        mul.rn.f32 z, g, g;
        min.NaN.f32 z, z, 0f7F7FFFFF;
        fma.rn.f32 z, z, $10, $9;
        mul.rn.f32 z, z, g;
        ex2.approx.f32 z, z;
        add.rn.f32 z, z, 0f3F800000;
        rcp.approx.f32 z, z;
        mul.rn.f32 g, g, z;
        add.rn.f32 u, u, $11;
        mul.rn.f32 $0, g, u;
    }"""
    operands = [*gate, *up, limit, low, alpha, cubic, beta]
    return asm([Float32], operands, text, "=f" + ",f" * 11, False, loc, ip)


def gated(gate, up, activation):
    """The Float32 gate * sigmoid(gate * (alpha + cubic * gate^2)) * (up + beta), both clamped.

    NaN passes through the clamps. The square is kept finite, so that a cubic of 0 stays 0.

    Args:
        gate: the three Float32 (a, b, c) of the gate a * b + c.
        up: those of up.
        activation: limit, alpha, cubic and beta.
    """
    a = activation
    # The exponential is of base 2, of the negative argument.
    return _gated(gate, up, a.limit, -a.limit, a.alpha * -LOG2_E, a.cubic * -LOG2_E, a.beta)
