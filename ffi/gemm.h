// SPDX-License-Identifier: Apache-2.0
// gemm, for the custom call of its own and for those that it is a part of.
#ifndef JAX_NVFP4_FFI_GEMM_H_
#define JAX_NVFP4_FFI_GEMM_H_

#include "common.h"

namespace jax_nvfp4 {

// The last four are read by gated kernels alone.
struct GemmAttributes {
  std::string_view kernel;
  int32_t num_sms;
  int32_t split_k;
  float limit, alpha, cubic, beta;
};

using GemmState = CallState<GemmAttributes>;

// The buffers of a call, in the order of the custom call's operands and results. Operands that are
// not given are empty.
struct GemmBuffers {
  ffi::AnyBuffer x, sfx, w, sfw, x_scale, w_scale, bias, group_sizes, group_offset;
  ffi::AnyBuffer y, scratch;
};

struct GemmSizes {
  int32_t m, n, k;
  int32_t x_scale_stride, w_scale_stride;
  DType bias_dtype, out_dtype;
  int32_t size_count, group_count, w_scale_group_stride;  // 0 where rows are in no groups
};

// Checks the attributes and finds the kernel. Errors name the call that was made, `caller`.
ffi::ErrorOr<GemmState> DecodeGemm(Op caller, GemmAttributes attributes);

// Checks all buffers against one another and against the kernel; reads no memory.
ffi::ErrorOr<GemmSizes> CheckGemm(Op caller, const GemmState& state, const GemmBuffers& buffers);

// Enqueues the work on buffers that were checked.
ffi::Error LaunchGemm(cudaStream_t stream, int32_t ordinal, const GemmState& state,
                      const GemmBuffers& buffers, const GemmSizes& sizes);

}  // namespace jax_nvfp4

#endif  // JAX_NVFP4_FFI_GEMM_H_
