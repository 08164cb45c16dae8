// SPDX-License-Identifier: Apache-2.0
// quantize, for the custom call of its own and for those that it is a part of.
#ifndef JAX_NVFP4_FFI_QUANTIZE_H_
#define JAX_NVFP4_FFI_QUANTIZE_H_

#include "common.h"

namespace jax_nvfp4 {

struct QuantizeAttributes {
  std::string_view kernel;
  int32_t num_sms;
  int32_t out_format;
  int32_t scaling;

  Scaling Scale() const { return static_cast<Scaling>(scaling); }
};

using QuantizeState = CallState<QuantizeAttributes>;

// The buffers of a call, in the order of the custom call's operands and results.
struct QuantizeBuffers {
  ffi::AnyBuffer x, scale_or_amax;  // empty where neither is given
  ffi::AnyBuffer data, block_scale, global_scale, scratch;
};

struct QuantizeSizes {
  int32_t m;
  int32_t k;
  DType x_dtype;
};

// Checks the attributes and finds the kernel. Errors name the call that was made, `caller`.
ffi::ErrorOr<QuantizeState> DecodeQuantize(Op caller, QuantizeAttributes attributes);

// Checks all buffers against one another and against the kernel; reads no memory.
ffi::ErrorOr<QuantizeSizes> CheckQuantize(Op caller, const QuantizeState& state,
                                          const QuantizeBuffers& buffers);

// Enqueues the work on buffers that were checked.
ffi::Error LaunchQuantize(cudaStream_t stream, int32_t ordinal, const QuantizeState& state,
                          const QuantizeBuffers& buffers, const QuantizeSizes& sizes);

}  // namespace jax_nvfp4

#endif  // JAX_NVFP4_FFI_QUANTIZE_H_
