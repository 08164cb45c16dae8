# SPDX-License-Identifier: Apache-2.0
"""NVFP4 quantize kernels for every architecture, in CuTeDSL.

    s = e4m3(min(block_amax * (S * (1/6)), 448))
    q = e2m1(x * min(1 / (s * D), FLT_MAX))          S = 2688 / amax or 1 / g,  D = 1 / S

A thread quantizes whole blocks of 16 elements, so that nothing but the amax of a row or of the
tensor crosses threads (`block`). Three kinds of kernel share that, one launch each:

    flat    The scale or the amax is given, for the tensor or per row. Blocks are numbered through;
            a thread takes one or two and loads them before it uses the first.
    rows    Dynamic per row. One or more warps hold a row in registers, reduce its amax and
            quantize what they hold. Of a row that is longer than the registers the last chunk
            stays in them and the others are read again, backwards, from the L1 cache mostly.
            Where rows are few, several CTAs share one: each reads all of it, so that it knows the
            amax without the others, and quantizes a part.
    grid    Dynamic per tensor. A co-resident grid (cooperative launch, one CTA for each
            multiprocessor at most) does the same with the whole tensor; `share_in_grid` says how
            the CTAs agree on the amax through uninitialized scratch memory. A small tensor is left
            to one cluster, which agrees through its shared memory. In 16 bits and without padding
            x is one run of blocks ("whole"), which takes the second pass, all issue slots, fewer
            instructions.

Rows are read by 16-byte loads where k and the address of x allow it ("vector"), and element by
element elsewhere. Blocks that pad a row to 64 columns are loaded as zeros and quantized like any
other, which writes zeros; the scale bytes that pad the rows to a multiple of 128 are written by
spare CTAs. There are no atomics: a row's result depends on its elements and the global scale alone.

Each kernel begins by letting a programmatic launch behind it start (`launch_dependents`). It is no
such launch itself, so that by then all that came before it is complete: what it leads starts early
beside this kernel alone, and waits for its end (`griddepcontrol.wait`) before it reads.
"""

import cuda.bindings.driver as cuda
import cutlass.cute as cute
from cutlass import Int32, Uint8, const_expr
from cutlass.cute.runtime import make_ptr

from jax_nvfp4.config import QuantizeConfig
from jax_nvfp4.config.enums import OutFormat
from jax_nvfp4.config.quantize import BLOCK, quantize_configs
from jax_nvfp4.kernels.quantize.base import QuantizeKernel, Request, Shape
from jax_nvfp4.kernels.quantize.flat import FlatKernel
from jax_nvfp4.kernels.quantize.grid import GridKernel
from jax_nvfp4.kernels.quantize.rows import RowsKernels
from jax_nvfp4.kernels.variant import KernelVariant

KINDS: dict[str, type[QuantizeKernel]] = {
    "flat": FlatKernel,
    "rows": RowsKernels,
    "grid": GridKernel,
}

# CTAs that a multiprocessor should have registers for, by kind and whether x is float32.
MIN_CTAS = {
    ("flat", False): 6,
    ("flat", True): 4,
    ("rows", False): 2,
    ("rows", True): 2,
    ("grid", False): 1,
    ("grid", True): 1,
}


class QuantizeHost:
    """The host function of one config.

    Attributes:
        kernel: the kernels of its kind.
    """

    def __init__(self, config: QuantizeConfig):
        units = config.elements_per_thread // BLOCK
        min_ctas = MIN_CTAS[config.kind, config.x_dtype == "float32"]
        self.kernel = KINDS[config.kind](config, Shape(units, config.threads, min_ctas))

    @cute.jit
    def __call__(
        self,
        x: cute.Pointer,
        scale_or_amax: cute.Pointer,
        data: cute.Pointer,
        block_scale: cute.Pointer,
        global_scale: cute.Pointer,
        scratch: cute.Pointer,
        m: Int32,
        k: Int32,
        x_dtype: Int32,
        scaling: Int32,
        out_format: Int32,
        num_sms: Int32,
        stream: cuda.CUstream,
    ):
        """The host function.

        The caller picks the config by the scaling, of which the kernel of another kind would take
        no notice. m >= 0, k >= 1, and m * ceil(k / 64) * 4 < 2**31 - 2**16.
        """
        real_blocks = (k + 15) >> 4
        blocks = real_blocks
        if out_format != OutFormat.LINEAR:
            blocks = ((k + 63) >> 6) * 4
        pointers = (x, scale_or_amax, data, block_scale, global_scale, scratch)
        sizes = (m, k, blocks, real_blocks, out_format == OutFormat.OPERAND)
        pad_items = Int32(0)
        if (out_format == OutFormat.OPERAND) & ((m & 127) != 0):
            pad_items = (blocks >> 2) * 32
        aligned = x.toint() % 16 == 0
        vector = ((k * self.kernel.item) % 16 == 0) & aligned
        request = Request(pointers, sizes, pad_items, scaling, out_format, num_sms, vector, stream)
        if const_expr(isinstance(self.kernel, GridKernel) and self.kernel.item == 2):
            whole = aligned & (k == blocks * BLOCK)
            whole = whole & ~self.kernel.fits_cluster(m * blocks, num_sms)
            if whole & (out_format == OutFormat.LINEAR):
                self.kernel.launch_whole(request, OutFormat.LINEAR)
            elif whole & (out_format == OutFormat.OPERAND):
                self.kernel.launch_whole(request, OutFormat.OPERAND)
            else:
                self.launch(request)
        else:
            self.launch(request)

    @cute.jit
    def launch(self, request: Request):
        """Launches the kernel that is compiled for these loads and these outputs."""
        if request.vector:
            if request.out_format == OutFormat.VALUES:
                self.kernel.launch(request, True, True)
            else:
                self.kernel.launch(request, True, False)
        else:
            if request.out_format == OutFormat.VALUES:
                self.kernel.launch(request, False, True)
            else:
                self.kernel.launch(request, False, False)


def variants(arch: str) -> list[KernelVariant]:
    """The quantize kernels of an architecture."""

    def pointer(align: int) -> cute.Pointer:
        return make_ptr(Uint8, 1024, cute.AddressSpace.gmem, assumed_align=align)

    found = []
    for config in quantize_configs(arch):
        pointers = (pointer(2), *(pointer(16) for _ in range(5)))
        sizes = (Int32(4), Int32(64), Int32(0), Int32(0), Int32(0), Int32(132))
        arguments = (*pointers, *sizes, cuda.CUstream(0))
        host = QuantizeHost(config)
        found.append(KernelVariant(config.name, "quantize", arch, config, host, arguments))
    return found
