// SPDX-License-Identifier: Apache-2.0
// linear: quantize and gemm as one custom call, x (m, k) -> y (m, n) by way of scratch memory.
//
// XLA records a custom call as a part of a CUDA graph by itself, and runs such parts one after the
// other. Two kernels of one call can overlap: gemm is launched programmatically, so that its CTAs
// get ready while quantize runs, and waits for quantize's end before it reads.
#include "gemm.h"
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
};

struct LinearState {
  inline static ffi::TypeId id = {};
  QuantizeState quantize;
  GemmState gemm;
};

}  // namespace
}  // namespace jax_nvfp4

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    jax_nvfp4::LinearAttributes, ::xla::ffi::StructMember<std::string_view>("gemm_kernel"),
    ::xla::ffi::StructMember<int32_t>("num_sms"), ::xla::ffi::StructMember<int32_t>("out_format"),
    ::xla::ffi::StructMember<std::string_view>("quantize_kernel"),
    ::xla::ffi::StructMember<int32_t>("scaling"), ::xla::ffi::StructMember<int32_t>("split_k"));

namespace jax_nvfp4 {
namespace {

// The two calls, whose buffers fit: what quantize writes is what gemm reads.
struct Calls {
  QuantizeBuffers quantize;
  QuantizeSizes quantize_sizes;
  GemmBuffers gemm;
  GemmSizes gemm_sizes;
};

// Checks the attributes and finds the kernels.
ffi::ErrorOr<LinearState> Decode(const LinearAttributes& a) {
  ffi::ErrorOr<QuantizeState> quantize =
      DecodeQuantize({a.quantize_kernel, a.num_sms, a.out_format, a.scaling});
  if (quantize.has_error()) return ffi::Unexpected(quantize.error());
  ffi::ErrorOr<GemmState> gemm = DecodeGemm({a.gemm_kernel, a.num_sms, a.split_k});
  if (gemm.has_error()) return ffi::Unexpected(gemm.error());
  return LinearState{*quantize, *gemm};
}

// Checks all buffers; reads no memory.
ffi::ErrorOr<Calls> Check(const LinearState& state, const QuantizeBuffers& quantize,
                          const GemmBuffers& gemm) {
  ffi::ErrorOr<QuantizeSizes> quantize_sizes = CheckQuantize(state.quantize, quantize);
  if (quantize_sizes.has_error()) return ffi::Unexpected(quantize_sizes.error());
  ffi::ErrorOr<GemmSizes> gemm_sizes = CheckGemm(state.gemm, gemm);
  if (gemm_sizes.has_error()) return ffi::Unexpected(gemm_sizes.error());
  Checker check(Op::kGemm);
  check.That(gemm_sizes->m == quantize_sizes->m, "x",
             std::to_string(quantize_sizes->m) + " rows, as many as quantize's x", gemm.x);
  if (!check.ok()) return ffi::Unexpected(check.error());
  return Calls{quantize, *quantize_sizes, gemm, *gemm_sizes};
}

ffi::ErrorOr<std::unique_ptr<LinearState>> Instantiate(LinearAttributes attributes) {
  ffi::ErrorOr<LinearState> state = Decode(attributes);
  if (state.has_error()) return ffi::Unexpected(state.error());
  return std::make_unique<LinearState>(*state);
}

ffi::Error Initialize(int32_t device, LinearState* state) {
  ffi::Error error = LoadKernel(device, &state->quantize);
  return error.failure() ? error : LoadKernel(device, &state->gemm);
}

ffi::Error Execute(cudaStream_t stream, int32_t ordinal, LinearState* state, ffi::AnyBuffer x,
                   ffi::AnyBuffer scale_or_amax, ffi::AnyBuffer w, ffi::AnyBuffer sfw, ffi::AnyBuffer w_scale,
                   ffi::AnyBuffer bias, ffi::Result<ffi::AnyBuffer> y,
                   ffi::Result<ffi::AnyBuffer> data, ffi::Result<ffi::AnyBuffer> block_scale,
                   ffi::Result<ffi::AnyBuffer> global_scale,
                   ffi::Result<ffi::AnyBuffer> quantize_scratch,
                   ffi::Result<ffi::AnyBuffer> gemm_scratch) {
  ffi::ErrorOr<Calls> calls =
      Check(*state, {x, scale_or_amax, *data, *block_scale, *global_scale, *quantize_scratch},
            {*data, *block_scale, w, sfw, *global_scale, w_scale, bias, *y, *gemm_scratch});
  if (calls.has_error()) return calls.error();
  ffi::Error error = LaunchQuantize(stream, ordinal, state->quantize, calls->quantize,
                                    calls->quantize_sizes);
  if (error.failure()) return error;
  return LaunchGemm(stream, ordinal, state->gemm, calls->gemm, calls->gemm_sizes);
}

// On the host the same checks run, and then an error: there is no kernel to launch.
ffi::Error HostExecute(LinearAttributes attributes, ffi::AnyBuffer x,
                       ffi::AnyBuffer scale_or_amax,
                       ffi::AnyBuffer w, ffi::AnyBuffer sfw, ffi::AnyBuffer w_scale,
                       ffi::AnyBuffer bias, ffi::Result<ffi::AnyBuffer> y,
                       ffi::Result<ffi::AnyBuffer> data, ffi::Result<ffi::AnyBuffer> block_scale,
                       ffi::Result<ffi::AnyBuffer> global_scale,
                       ffi::Result<ffi::AnyBuffer> quantize_scratch,
                       ffi::Result<ffi::AnyBuffer> gemm_scratch) {
  ffi::ErrorOr<LinearState> state = Decode(attributes);
  if (state.has_error()) return state.error();
  ffi::ErrorOr<Calls> calls =
      Check(*state, {x, scale_or_amax, *data, *block_scale, *global_scale, *quantize_scratch},
            {*data, *block_scale, w, sfw, *global_scale, w_scale, bias, *y, *gemm_scratch});
  if (calls.has_error()) return calls.error();
  return CudaOnly(*state->gemm.kernel);
}

XLA_FFI_DEFINE_HANDLER(kInstantiate, Instantiate,
                       ffi::Ffi::BindInstantiate().Attrs<LinearAttributes>());
XLA_FFI_DEFINE_HANDLER(kInitialize, Initialize,
                       ffi::Ffi::BindInitialize()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Ctx<ffi::State<LinearState>>());

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxNvfp4Linear, Execute,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Ctx<ffi::State<LinearState>>()
                                  .Arg<ffi::AnyBuffer>()   // x
                                  .Arg<ffi::AnyBuffer>()   // global_scale or amax (given)
                                  .Arg<ffi::AnyBuffer>()   // w
                                  .Arg<ffi::AnyBuffer>()   // sfw
                                  .Arg<ffi::AnyBuffer>()   // w_scale
                                  .Arg<ffi::AnyBuffer>()   // bias
                                  .Ret<ffi::AnyBuffer>()   // y
                                  .Ret<ffi::AnyBuffer>()   // data
                                  .Ret<ffi::AnyBuffer>()   // block_scale
                                  .Ret<ffi::AnyBuffer>()   // global_scale
                                  .Ret<ffi::AnyBuffer>()   // quantize's scratch
                                  .Ret<ffi::AnyBuffer>(),  // gemm's scratch
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxNvfp4LinearHost, HostExecute,
                              ffi::Ffi::Bind()
                                  .Attrs<LinearAttributes>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

std::array<Target, 2> LinearTargets() {
  static ffi::TypeInfo info = ffi::MakeTypeInfo<LinearState>();
  return {
      Target{"jax_nvfp4_linear", "CUDA", kInstantiate, kInitialize, JaxNvfp4Linear,
             "jax_nvfp4_linear_state", &LinearState::id, &info},
      Target{"jax_nvfp4_linear", "cpu", nullptr, nullptr, JaxNvfp4LinearHost, nullptr, nullptr,
             nullptr},
  };
}

}  // namespace jax_nvfp4
