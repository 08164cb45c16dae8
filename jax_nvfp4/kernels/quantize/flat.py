# SPDX-License-Identifier: Apache-2.0
"""The "flat" quantize kernels: the scale or the amax is given."""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int64, range_constexpr

from jax_nvfp4.config.enums import Scaling
from jax_nvfp4.kernels.quantize import ptx as ops
from jax_nvfp4.kernels.quantize.base import QuantizeKernel, Request, ceil_div, unpack
from jax_nvfp4.kernels.quantize.block import Scales, dynamic_scales, given_scales, place_of


class FlatKernel(QuantizeKernel):
    """Blocks are numbered through; a thread takes one or two."""

    @cute.kernel
    def flat_kernel(
        self,
        pointers: tuple,
        sizes: tuple,
        divisor: cute.FastDivmodDivisorV2,
        per_row: Boolean,
        is_amax: cutlass.Constexpr,
        vector: cutlass.Constexpr,
        values: cutlass.Constexpr,
    ):
        """The global scale or amax is given; CTAs past the last block write the scales' padding."""
        cute.arch.griddepcontrol_launch_dependents()
        call, scale_or_amax, global_scale, _ = unpack(pointers, sizes, vector, values)
        thread, _, _ = cute.arch.thread_idx()
        cta, _, _ = cute.arch.block_idx()
        units = call.m * call.blocks
        first = cta * (self.threads * self.units)
        if first < units:
            places = [
                place_of(first + i * self.threads + thread, divisor, units)
                for i in range(self.units)
            ]
            words = [self.load(call, place) for place in places]
            scales, g = self.flat_scales(scale_or_amax, is_amax)
            if (first + thread == 0) & ~per_row:
                ops.store_f32(global_scale, g)
            for i in range_constexpr(self.units):
                place = places[i]
                if place.active:
                    sixth, decode, valid = scales.sixth, scales.decode, scales.valid
                    if per_row:
                        offset = Int64(place.row) * 4
                        own, own_g = self.flat_scales(scale_or_amax + offset, is_amax)
                        sixth, decode, valid = own.sixth, own.decode, own.valid
                        if place.block == 0:
                            ops.store_f32(global_scale + offset, own_g)
                    own_scales = Scales(sixth, decode, valid)
                    largest = ops.amax_bits(words[i], self.dtype)
                    self.quantize_and_store(call, place, words[i], largest, own_scales)
        else:
            per_cta = self.threads * self.units
            spare = cta - (units + per_cta - 1) // per_cta
            self.pad_scales(call, spare * self.threads + thread)

    def flat_scales(self, address: Int64, is_amax: bool):
        """(the scales by the amax or global scale at an address, the global scale to report)."""
        given = ops.load_f32(address)
        if is_amax:
            scales = dynamic_scales(ops.bits(given))
            return scales, scales.decode
        return given_scales(given), given

    @cute.jit
    def launch(self, request: Request, vector: cutlass.Constexpr, values: cutlass.Constexpr):
        """Launches the kernel."""
        blocks, scaling = request.blocks, request.scaling
        units = request.m * blocks
        divisor = cute.FastDivmodDivisorV2(blocks)
        ctas = ceil_div(units, self.threads * self.units)
        ctas = ctas + ceil_div(request.pad_items, self.threads)
        per_row = (scaling == Scaling.STATIC_ROWS) | (scaling == Scaling.AMAX_ROWS)
        limits = self.limits() | {
            "stream": request.stream,
            "grid": [cutlass.max(ctas, 1), 1, 1],
            "block": [self.threads, 1, 1],
        }
        pointers, sizes = request.pointers, request.sizes
        if (scaling == Scaling.AMAX) | (scaling == Scaling.AMAX_ROWS):
            kernel = self.flat_kernel(pointers, sizes, divisor, per_row, True, vector, values)
            kernel.launch(**limits)
        else:
            kernel = self.flat_kernel(pointers, sizes, divisor, per_row, False, vector, values)
            kernel.launch(**limits)
