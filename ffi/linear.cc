// SPDX-License-Identifier: Apache-2.0
// linear: quantize and gemm as one custom call, x (m, k) -> y (m, n) by way of scratch memory.
//
// XLA records a custom call as a part of a CUDA graph by itself, and runs such parts one after the
// other. Two kernels of one call can overlap: gemm is launched programmatically, so that its CTAs
// get ready while quantize runs, and waits for quantize's end before it reads.
#include "gemm.h"
#include "handlers.h"
#include "quantize.h"

namespace jax_nvfp4 {
namespace {

struct LinearAttributes {
  std::string_view gemm_kernel;
  int32_t num_sms;
  int32_t out_format;
  std::string_view quantize_kernel;
  int32_t scaling;
  int32_t split_k;
  float limit, alpha, cubic, beta;
};

struct LinearState {
  inline static ffi::TypeId id = {};
  QuantizeState quantize;
  GemmState gemm;

  const Kernel& MainKernel() const { return gemm.MainKernel(); }
  ffi::Error Load(int32_t device) {
    FFI_RETURN_IF_ERROR(quantize.Load(device));
    return gemm.Load(device);
  }
};

}  // namespace
}  // namespace jax_nvfp4

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    jax_nvfp4::LinearAttributes, ::xla::ffi::StructMember<std::string_view>("gemm_kernel"),
    ::xla::ffi::StructMember<int32_t>("num_sms"), ::xla::ffi::StructMember<int32_t>("out_format"),
    ::xla::ffi::StructMember<std::string_view>("quantize_kernel"),
    ::xla::ffi::StructMember<int32_t>("scaling"), ::xla::ffi::StructMember<int32_t>("split_k"),
    ::xla::ffi::StructMember<float>("limit"), ::xla::ffi::StructMember<float>("alpha"),
    ::xla::ffi::StructMember<float>("cubic"), ::xla::ffi::StructMember<float>("beta"));

namespace jax_nvfp4 {
namespace {

// The buffers of the call, and those of the two calls in it: what quantize writes, gemm reads.
struct LinearBuffers {
  ffi::AnyBuffer x, scale_or_amax, w, sfw, w_scale, bias, group_sizes, group_offset;
  ffi::AnyBuffer y, data, block_scale, global_scale, quantize_scratch, gemm_scratch;

  QuantizeBuffers Quantize() const {
    return {x, scale_or_amax, data, block_scale, global_scale, quantize_scratch};
  }
  GemmBuffers Gemm() const {
    return {data, block_scale, w,           sfw,          global_scale, w_scale,
            bias, group_sizes, group_offset, y,           gemm_scratch};
  }
};

struct LinearSizes {
  QuantizeSizes quantize;
  GemmSizes gemm;
};

struct LinearCall {
  using Attributes = LinearAttributes;
  using State = LinearState;
  using Buffers = LinearBuffers;
  static constexpr int kOperands = 8, kResults = 6;
  static constexpr Op kOp = Op::kLinear;
  static constexpr char kTarget[] = "jax_nvfp4_linear";
  static constexpr char kStateName[] = "jax_nvfp4_linear_state";

  static ffi::ErrorOr<State> Decode(const Attributes& a) {
    FFI_ASSIGN_OR_RETURN(
        QuantizeState quantize,
        DecodeQuantize(kOp, {a.quantize_kernel, a.num_sms, a.out_format, a.scaling}));
    FFI_ASSIGN_OR_RETURN(GemmState gemm,
                         DecodeGemm(kOp, {a.gemm_kernel, a.num_sms, a.split_k, a.limit, a.alpha,
                                          a.cubic, a.beta}));
    return State{quantize, gemm};
  }

  static ffi::ErrorOr<LinearSizes> Check(const State& state, const Buffers& buffers) {
    const GemmBuffers gemm_buffers = buffers.Gemm();
    FFI_ASSIGN_OR_RETURN(const QuantizeSizes quantize,
                         CheckQuantize(kOp, state.quantize, buffers.Quantize()));
    FFI_ASSIGN_OR_RETURN(const GemmSizes gemm, CheckGemm(kOp, state.gemm, gemm_buffers));
    Checker check(kOp, Op::kGemm);
    check.That(gemm.m == quantize.m, "x",
               std::to_string(quantize.m) + " rows, as many as quantize's x", gemm_buffers.x);
    FFI_RETURN_IF_ERROR(check.error());
    return LinearSizes{quantize, gemm};
  }

  static ffi::Error Launch(cudaStream_t stream, int32_t ordinal, const State& state,
                           const Buffers& buffers, const LinearSizes& sizes) {
    FFI_RETURN_IF_ERROR(
        LaunchQuantize(stream, ordinal, state.quantize, buffers.Quantize(), sizes.quantize));
    return LaunchGemm(stream, ordinal, state.gemm, buffers.Gemm(), sizes.gemm);
  }
};

}  // namespace

std::array<Target, 2> LinearTargets() { return TargetsOf<LinearCall>(); }

}  // namespace jax_nvfp4
