// SPDX-License-Identifier: Apache-2.0
// gemm: y (m, n) = alpha * x (m, k) @ w (n, k).T + bias, the weight repacked for the architecture.
#include "gemm.h"

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(jax_nvfp4::GemmAttributes,
                                      ::xla::ffi::StructMember<std::string_view>("kernel"),
                                      ::xla::ffi::StructMember<int32_t>("num_sms"),
                                      ::xla::ffi::StructMember<int32_t>("split_k"));

namespace jax_nvfp4 {
namespace {

// What a repacked weight's sizes are rounded up to.
struct Padding {
  int64_t n, k;
};

Padding WeightPadding(const Kernel& kernel) {
  return kernel.arch() == std::string_view("sm_90a") ? Padding{128, 128} : Padding{128, 64};
}

// 0 for one value, 1 for one per row; an operand of another size fails the check.
int32_t ScaleStride(Checker& check, std::string_view operand, const ffi::AnyBuffer& scale,
                    int64_t rows) {
  check.Type(operand, scale, ffi::DataType::F32);
  const int64_t count = scale.element_count();
  check.That(count == 1 || count == rows, operand, "1 or " + std::to_string(rows) + " elements",
             scale);
  return count == 1 ? 0 : 1;
}

}  // namespace

ffi::ErrorOr<GemmState> DecodeGemm(GemmAttributes attributes) {
  Checker check(Op::kGemm);
  check.Attribute("split_k", attributes.split_k, 1, 1 << 16);
  if (!check.ok()) return ffi::Unexpected(check.error());
  return Resolve(Op::kGemm, attributes);
}

ffi::ErrorOr<GemmSizes> CheckGemm(const GemmState& state, const GemmBuffers& b) {
  const Kernel& kernel = *state.kernel;
  Checker check(Op::kGemm);
  check.Matrix("x", b.x);
  check.Matrix("y", b.y);
  if (!check.ok()) return ffi::Unexpected(check.error());
  const bool packed = kernel.x_dtype() == "e2m1";
  const int64_t m = b.x.dimensions()[0], n = b.y.dimensions()[1];
  const int64_t k = b.x.dimensions()[1] * (packed ? 2 : 1);
  check.That(b.y.dimensions()[0] == m, "y", std::to_string(m) + " rows, as many as x", b.y);
  check.That(k > 0 && k % 64 == 0 && k <= INT32_MAX, "x",
             "a positive multiple of 64 elements along k", b.x);
  if (!check.ok()) return ffi::Unexpected(check.error());

  if (packed) {
    check.Type("x", b.x, ffi::DataType::U8);
    check.Bytes("sfx", b.sfx);
    check.Count("sfx", b.sfx, 128 * CeilDiv(m, 128) * (k / 16), "ceil(m/128)*128 * k/16");
  } else {
    const bool half = kernel.x_dtype() == "float16";
    if (kernel.x_dtype() != "any") {
      check.Type("x", b.x, half ? ffi::DataType::F16 : ffi::DataType::BF16);
    }
    check.Count("sfx", b.sfx, 0, "none: x holds values");
  }
  const Padding padding = WeightPadding(kernel);
  const int64_t w_elements = CeilDiv(n, padding.n) * padding.n * CeilDiv(k, padding.k) * padding.k;
  const std::string of = " of (" + std::to_string(n) + "," + std::to_string(k) + ") padded to (" +
                         std::to_string(padding.n) + "," + std::to_string(padding.k) + ")";
  check.Type("w", b.w, ffi::DataType::U8);
  check.Count("w", b.w, w_elements / 2, "codes" + of);
  check.Bytes("sfw", b.sfw);
  check.Count("sfw", b.sfw, w_elements / 16, "scales" + of);

  GemmSizes sizes{static_cast<int32_t>(m), static_cast<int32_t>(n), static_cast<int32_t>(k), -1, 0,
                  kNone, kNone};
  sizes.w_scale_stride = ScaleStride(check, "w_scale", b.w_scale, n);
  if (b.x_scale.element_count() > 0) {
    sizes.x_scale_stride = ScaleStride(check, "x_scale", b.x_scale, m);
  }
  if (b.bias.element_count() > 0) {
    sizes.bias_dtype = check.Float("bias", b.bias);
    check.Count("bias", b.bias, n, "n");
  }
  sizes.out_dtype = check.Float("y", b.y);

  check.Aligned("x", b.x);
  check.Aligned("sfx", b.sfx);
  check.Aligned("w", b.w);
  check.Aligned("sfw", b.sfw);
  check.Aligned("y", b.y);
  check.Aligned("scratch", b.scratch);
  if (!check.ok()) return ffi::Unexpected(check.error());
  return sizes;
}

ffi::Error LaunchGemm(cudaStream_t stream, int32_t ordinal, const GemmState& state,
                      const GemmBuffers& b, const GemmSizes& sizes) {
  if (sizes.m == 0 || sizes.n == 0) return ffi::Error::Success();
  // Loaded by Initialize: this only makes sure.
  if (ffi::Error error = state.kernel->Load(ordinal); error.failure()) return error;
  ffi::ErrorOr<Device> device = GetDevice(ordinal);
  if (device.has_error()) return device.error();
  return state.kernel->Launch(
      stream, b.x.untyped_data(), b.sfx.untyped_data(), b.w.untyped_data(), b.sfw.untyped_data(),
      b.x_scale.untyped_data(), b.w_scale.untyped_data(), b.bias.untyped_data(),
      b.y.untyped_data(), b.scratch.untyped_data(), sizes.m, sizes.n, sizes.k,
      sizes.x_scale_stride, sizes.w_scale_stride, static_cast<int32_t>(sizes.bias_dtype),
      static_cast<int32_t>(sizes.out_dtype), state.attributes.split_k,
      UsableSms(state.attributes.num_sms, *device));
}

namespace {

ffi::ErrorOr<std::unique_ptr<GemmState>> Instantiate(GemmAttributes attributes) {
  ffi::ErrorOr<GemmState> state = DecodeGemm(attributes);
  if (state.has_error()) return ffi::Unexpected(state.error());
  return std::make_unique<GemmState>(*state);
}

ffi::Error Execute(cudaStream_t stream, int32_t ordinal, GemmState* state, ffi::AnyBuffer x,
                   ffi::AnyBuffer sfx, ffi::AnyBuffer w, ffi::AnyBuffer sfw,
                   ffi::AnyBuffer x_scale, ffi::AnyBuffer w_scale, ffi::AnyBuffer bias,
                   ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> scratch) {
  const GemmBuffers buffers{x, sfx, w, sfw, x_scale, w_scale, bias, *y, *scratch};
  ffi::ErrorOr<GemmSizes> sizes = CheckGemm(*state, buffers);
  if (sizes.has_error()) return sizes.error();
  return LaunchGemm(stream, ordinal, *state, buffers, *sizes);
}

// On the host the same checks run, and then an error: there is no kernel to launch.
ffi::Error HostExecute(GemmAttributes attributes, ffi::AnyBuffer x, ffi::AnyBuffer sfx,
                       ffi::AnyBuffer w, ffi::AnyBuffer sfw, ffi::AnyBuffer x_scale,
                       ffi::AnyBuffer w_scale, ffi::AnyBuffer bias, ffi::Result<ffi::AnyBuffer> y,
                       ffi::Result<ffi::AnyBuffer> scratch) {
  ffi::ErrorOr<GemmState> state = DecodeGemm(attributes);
  if (state.has_error()) return state.error();
  ffi::ErrorOr<GemmSizes> sizes =
      CheckGemm(*state, {x, sfx, w, sfw, x_scale, w_scale, bias, *y, *scratch});
  if (sizes.has_error()) return sizes.error();
  return CudaOnly(*state->kernel);
}

XLA_FFI_DEFINE_HANDLER(kInstantiate, Instantiate,
                       ffi::Ffi::BindInstantiate().Attrs<GemmAttributes>());
XLA_FFI_DEFINE_HANDLER(kInitialize, LoadKernel<GemmState>,
                       ffi::Ffi::BindInitialize()
                           .Ctx<ffi::DeviceOrdinal>()
                           .Ctx<ffi::State<GemmState>>());

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxNvfp4Gemm, Execute,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Ctx<ffi::State<GemmState>>()
                                  .Arg<ffi::AnyBuffer>()   // x
                                  .Arg<ffi::AnyBuffer>()   // sfx
                                  .Arg<ffi::AnyBuffer>()   // w
                                  .Arg<ffi::AnyBuffer>()   // sfw
                                  .Arg<ffi::AnyBuffer>()   // x_scale
                                  .Arg<ffi::AnyBuffer>()   // w_scale
                                  .Arg<ffi::AnyBuffer>()   // bias
                                  .Ret<ffi::AnyBuffer>()   // y
                                  .Ret<ffi::AnyBuffer>(),  // scratch
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxNvfp4GemmHost, HostExecute,
                              ffi::Ffi::Bind()
                                  .Attrs<GemmAttributes>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

std::array<Target, 2> GemmTargets() {
  static ffi::TypeInfo info = ffi::MakeTypeInfo<GemmState>();
  return {
      Target{"jax_nvfp4_gemm", "CUDA", kInstantiate, kInitialize, JaxNvfp4Gemm,
             "jax_nvfp4_gemm_state", &GemmState::id, &info},
      Target{"jax_nvfp4_gemm", "cpu", nullptr, nullptr, JaxNvfp4GemmHost, nullptr, nullptr,
             nullptr},
  };
}

}  // namespace jax_nvfp4
