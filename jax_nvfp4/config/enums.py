# SPDX-License-Identifier: Apache-2.0
"""The enumerations, and a table, that Python, the custom calls' handlers and the kernels share.

`ffi/generate_enums.py` writes the handlers' C++ header from this file. It runs the file by itself,
so that nothing but the standard library may be imported here.
"""

import enum


class Scaling(enum.IntEnum):
    """The source of a quantized array's global scale: the kernels' `scaling` argument.

    Users name TOKEN, TENSOR, STATIC (by the scale itself) and NONE. The others stand for them where
    an operation is divided over devices or batched, or say the shape of what is given.
    """

    NONE = -1
    """None: the array stays as it is (weight-only)."""
    STATIC = 0
    """A global scale that is given."""
    STATIC_ROWS = 1
    """A global scale that is given for each row."""
    TOKEN = 2
    """Dynamic, from the amax of each row."""
    TENSOR = 3
    """Dynamic, from the amax of the tensor."""
    AMAX = 4
    """An amax that is given, of a tensor that the array is a part of."""
    AMAX_ROWS = 5
    """An amax that is given for each row, as of longer rows that the array's are parts of."""

    @property
    def per_row(self) -> bool:
        """Each row has a global scale of its own."""
        return self in (Scaling.STATIC_ROWS, Scaling.TOKEN, Scaling.AMAX_ROWS)

    @property
    def scale_given(self) -> bool:
        """The global scale is an operand."""
        return self in (Scaling.STATIC, Scaling.STATIC_ROWS)

    @property
    def amax_given(self) -> bool:
        """The amax is an operand."""
        return self in (Scaling.AMAX, Scaling.AMAX_ROWS)

    @property
    def given(self) -> bool:
        """There is an operand, the global scale or the amax."""
        return self.scale_given or self.amax_given


class OutFormat(enum.IntEnum):
    """The form of what a quantize kernel writes: its `out_format` argument."""

    LINEAR = 0
    """Codes and row-major block scales, rows padded to 16 columns."""
    OPERAND = 1
    """Codes with rows padded to 64 columns, block scales in the 128x4 order."""
    VALUES = 2
    """bfloat16 values code * block_scale, rows padded to 64 columns."""

    @classmethod
    def for_gemm(cls, x_dtype: str) -> "OutFormat":
        """The format that a GEMM reads whose x operand has this element type."""
        return cls.OPERAND if x_dtype == "e2m1" else cls.VALUES


WEIGHT_TILES = {
    "sm_90a": (128, 128),
    "sm_100f": (128, 64),
    "sm_103a": (128, 64),
    "sm_120f": (128, 64),
}
"""Rows and columns, by architecture, that a repacked weight is padded to multiples of."""
