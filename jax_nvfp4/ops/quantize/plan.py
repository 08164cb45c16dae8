# SPDX-License-Identifier: Apache-2.0
"""The kernel that quantizes a matrix: a value that `cuda` carries out."""

import dataclasses

from jax_nvfp4.config import OutFormat, QuantizeConfig, Scaling
from jax_nvfp4.config.limits import Limits
from jax_nvfp4.config.quantize import SHARED_ROW, select_quantize


@dataclasses.dataclass(frozen=True)
class QuantizePlan:
    """The kernel that a quantization runs, and how.

    Attributes:
        config: the kernel.
        scaling: what the kernel is asked for.
        out_format: what it writes.
        num_sms: multiprocessors it is planned for.
    """

    config: QuantizeConfig
    scaling: Scaling
    out_format: OutFormat
    num_sms: int


def plan(
    scaling: Scaling,
    shape: tuple[int, ...],
    x_dtype: str,
    *,
    per_row: bool,
    arch: str,
    limits: Limits,
    out_format: OutFormat,
) -> QuantizePlan:
    """Decides how a matrix is quantized.

    Args:
        scaling: of the primitive: TENSOR, TOKEN, STATIC or AMAX.
        shape: of x, (m, k).
        x_dtype: name of x's dtype.
        per_row: the scale or amax that is given, if any, is one for each row.
        arch: whose kernels.
        limits: of the device.
        out_format: what is to be written.
    """
    m, k = shape
    if per_row:
        scaling = {Scaling.STATIC: Scaling.STATIC_ROWS, Scaling.AMAX: Scaling.AMAX_ROWS}[scaling]
    elif scaling == Scaling.TENSOR and m == 1 and k <= SHARED_ROW and k % 8 == 0:
        scaling = Scaling.TOKEN  # the same for one row, and faster
    config = select_quantize(arch, x_dtype, scaling)
    return QuantizePlan(config, scaling, out_format, limits.num_sms)
