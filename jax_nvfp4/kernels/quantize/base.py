# SPDX-License-Identifier: Apache-2.0
"""What the quantize kernels share: shapes, the arguments of a call, the amax of a CTA."""

import dataclasses

import cuda.bindings.driver as cuda
import cutlass.cute as cute
from cutlass import Boolean, Int32

from jax_nvfp4.config import QuantizeConfig
from jax_nvfp4.config.enums import OutFormat
from jax_nvfp4.kernels.quantize.block import BlockQuantizer, Call

WARP = 32


@dataclasses.dataclass(frozen=True)
class Shape:
    """How a kernel's work is spread over threads.

    Attributes:
        units: blocks that a thread holds.
        threads: threads of a CTA, at most.
        min_ctas: CTAs that a multiprocessor should have registers for.
        shared: "rows": several CTAs may share a row.
    """

    units: int
    threads: int
    min_ctas: int
    shared: bool = False


@dataclasses.dataclass(frozen=True)
class Request:
    """What the host function is asked for.

    Attributes:
        pointers: x, scale_or_amax, data, block_scale, global_scale, scratch.
        sizes: m, k, blocks of a row with and without padding, whether block scales are swizzled.
        pad_items: 16-byte items of padding of the block scales.
        scaling: a `Scaling`.
        out_format: an `OutFormat`.
        num_sms: multiprocessors that may be used.
        vector: x is read by 16-byte loads.
        stream: to launch on.
    """

    pointers: tuple
    sizes: tuple
    pad_items: Int32
    scaling: Int32
    out_format: Int32
    num_sms: Int32
    vector: Boolean
    stream: cuda.CUstream

    @property
    def m(self) -> Int32:
        """Rows."""
        return self.sizes[0]

    @property
    def blocks(self) -> Int32:
        """Blocks of a row, padding included."""
        return self.sizes[2]


class QuantizeKernel(BlockQuantizer):
    """The kernels of one config; each kind (`flat`, `rows`, `grid`) adds its own and `launch`.

    Attributes:
        config: the config.
        threads: threads of a CTA, at most.
        min_ctas: CTAs that a multiprocessor should have registers for.
        shared: "rows": several CTAs may share a row.
    """

    def __init__(self, config: QuantizeConfig, shape: Shape):
        super().__init__(config.x_dtype, shape.units, has_e2m1(config.arch))
        self.config = config
        self.threads, self.min_ctas, self.shared = shape.threads, shape.min_ctas, shape.shared

    @cute.jit
    def warps_max(self, value: Int32, warps: Int32, first_warp: Int32, shared: cute.Pointer):
        """The maximum over `warps` warps from `first_warp` on; all of the CTA's threads call it."""
        shared = cute.make_tensor(shared, cute.make_layout(WARP))
        lane = cute.arch.lane_idx()
        thread = cute.arch.thread_idx()
        warp = (thread[0] + thread[1] * cute.arch.block_dim()[0]) >> 5
        value = cute.arch.warp_redux_sync(value, "max")
        if lane == 0:
            shared[warp] = value
        cute.arch.sync_threads()
        value = Int32(0)
        if lane < warps:
            value = shared[first_warp + lane]
        return cute.arch.warp_redux_sync(value, "max")

    def limits(self) -> dict:
        """Launch arguments that bound the registers; the L1 cache takes all of its memory."""
        return {
            "max_number_threads": [self.threads, 1, 1],
            "min_blocks_per_mp": self.min_ctas,
            "preferred_smem_carveout": 0,
        }


def has_e2m1(arch: str) -> bool:
    """Whether an arch converts to e2m1 in hardware."""
    return not arch.startswith("sm_90")


def ceil_div(a, b):
    """The quotient of two positive integers, rounded up."""
    return (a + b - 1) // b


def unpack(pointers, sizes, vector: bool, values: bool, whole: OutFormat | None = None):
    """A kernel's arguments: (Call, address of scale_or_amax, of global_scale, of scratch)."""
    x, scale_or_amax, data, block_scale, global_scale, scratch = (
        pointer.toint() for pointer in pointers
    )
    m, k, blocks, real_blocks, swizzled = sizes
    call = Call(x, data, block_scale, m, k, blocks, real_blocks, swizzled, vector, values, whole)
    return call, scale_or_amax, global_scale, scratch
