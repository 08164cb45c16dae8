// SPDX-License-Identifier: Apache-2.0
// quantize: x (m, k) and, where given, a global scale or amax -> data, block_scale, global_scale.
#include "quantize.h"

#include "handlers.h"

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    jax_nvfp4::QuantizeAttributes, ::xla::ffi::StructMember<std::string_view>("kernel"),
    ::xla::ffi::StructMember<int32_t>("num_sms"), ::xla::ffi::StructMember<int32_t>("out_format"),
    ::xla::ffi::StructMember<int32_t>("scaling"));

namespace jax_nvfp4 {
namespace {

// The global scale of an x without elements: the one given, or that of an amax of 0, which is 1.
ffi::Error WriteScaleOfNothing(const QuantizeAttributes& attributes, const ffi::AnyBuffer& scale_or_amax,
                               ffi::AnyBuffer global_scale, cudaStream_t stream) {
  const size_t count = global_scale.element_count();
  if (count == 0) return ffi::Error::Success();
  char* out = static_cast<char*>(global_scale.untyped_data());
  cudaError_t error = kCudaSuccess;
  if (ScaleGiven(attributes.Scale())) {
    error = cudaMemcpyAsync(out, scale_or_amax.untyped_data(), count * sizeof(float),
                            kMemcpyDeviceToDevice, stream);
  } else {
    // 1.0f is the bytes 00 00 80 3f.
    error = cudaMemset2DAsync(out, sizeof(float), 0x00, 2, count, stream);
    if (error == kCudaSuccess) {
      error = cudaMemset2DAsync(out + 2, sizeof(float), 0x80, 1, count, stream);
    }
    if (error == kCudaSuccess) {
      error = cudaMemset2DAsync(out + 3, sizeof(float), 0x3f, 1, count, stream);
    }
  }
  if (error == kCudaSuccess) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kInternal,
                    std::string("jax_nvfp4 quantize: ") + cudaGetErrorString(error));
}

}  // namespace

ffi::ErrorOr<QuantizeState> DecodeQuantize(Op caller, QuantizeAttributes attributes) {
  Checker check(caller, Op::kQuantize);
  check.Attribute("scaling", attributes.scaling, Scaling::kStatic, Scaling::kAmaxRows);
  check.Attribute("out_format", attributes.out_format, OutFormat::kLinear, OutFormat::kValues);
  FFI_RETURN_IF_ERROR(check.error());
  return Resolve(Op::kQuantize, caller, attributes);
}

ffi::ErrorOr<QuantizeSizes> CheckQuantize(Op caller, const QuantizeState& state,
                                          const QuantizeBuffers& buffers) {
  const Kernel& kernel = *state.kernel;
  const QuantizeAttributes& attributes = state.attributes;
  const auto& [x, scale_or_amax, data, block_scale, global_scale, scratch] = buffers;
  Checker check(caller, Op::kQuantize);
  const DType dtype = check.Float("x", x);
  check.Matrix("x", x);
  FFI_RETURN_IF_ERROR(check.error());
  constexpr std::string_view kNames[] = {"float32", "bfloat16", "float16"};
  check.That(kernel.x_dtype() == kNames[dtype], "x",
             std::string(kernel.x_dtype()) + " for kernel " + kernel.name(), x);

  const int64_t m = x.dimensions()[0], k = x.dimensions()[1];
  const int64_t blocks = CeilDiv(k, 16), padded_blocks = 4 * CeilDiv(k, 64);
  const Scaling scaling = attributes.Scale();
  const bool per_row = PerRow(scaling), of_amax = AmaxGiven(scaling), given = Given(scaling);
  const std::string_view name_of_given = of_amax ? "amax" : "global_scale (given)";
  check.Type(name_of_given, scale_or_amax, ffi::DataType::F32);
  check.Count(name_of_given, scale_or_amax, given ? (per_row ? m : 1) : 0,
              given ? (per_row ? "one per row of x" : "one") : "none: it is computed");
  check.That(!of_amax || m * k != 0, "x", "elements, of which there is an amax", x);
  check.Type("global_scale", global_scale, ffi::DataType::F32);
  check.Count("global_scale", global_scale, per_row ? m : 1,
              per_row ? "one per row of x" : "one");
  switch (static_cast<OutFormat>(attributes.out_format)) {
    case OutFormat::kLinear:
      check.Bytes("data", data);
      check.Count("data", data, m * blocks * 8, "m * ceil(k/16) * 8");
      check.Bytes("block_scale", block_scale);
      check.Count("block_scale", block_scale, m * blocks, "m * ceil(k/16)");
      break;
    case OutFormat::kOperand:
      check.Bytes("data", data);
      check.Count("data", data, m * padded_blocks * 8, "m * ceil(k/64) * 32");
      check.Bytes("block_scale", block_scale);
      check.Count("block_scale", block_scale, 128 * CeilDiv(m, 128) * padded_blocks,
                  "ceil(m/128)*128 * ceil(k/64)*4");
      break;
    default:
      check.Type("data", data, ffi::DataType::BF16);
      check.Count("data", data, m * padded_blocks * 16, "m * ceil(k/64) * 64");
      check.Count("block_scale", block_scale, 0, "none: data holds values");
  }
  check.Aligned("x", x, dtype == kF32 ? 4 : 2);
  check.Aligned("data", data);
  check.Aligned("block_scale", block_scale);
  check.Aligned("scratch", scratch);
  FFI_RETURN_IF_ERROR(check.error());
  return QuantizeSizes{static_cast<int32_t>(m), static_cast<int32_t>(k), dtype};
}

ffi::Error LaunchQuantize(cudaStream_t stream, int32_t ordinal, const QuantizeState& state,
                          const QuantizeBuffers& buffers, const QuantizeSizes& sizes) {
  const QuantizeAttributes& attributes = state.attributes;
  const auto& [x, scale_or_amax, data, block_scale, global_scale, scratch] = buffers;
  if (sizes.m == 0 || sizes.k == 0) {
    return WriteScaleOfNothing(attributes, scale_or_amax, global_scale, stream);
  }
  // Loaded by Initialize: this only makes sure.
  FFI_RETURN_IF_ERROR(state.kernel->Load(ordinal));
  FFI_ASSIGN_OR_RETURN(const Device device, GetDevice(ordinal));
  return state.kernel->Launch(stream, x.untyped_data(), scale_or_amax.untyped_data(), data.untyped_data(),
                              block_scale.untyped_data(), global_scale.untyped_data(),
                              scratch.untyped_data(), sizes.m, sizes.k,
                              static_cast<int32_t>(sizes.x_dtype), attributes.scaling,
                              attributes.out_format, UsableSms(attributes.num_sms, device));
}

namespace {

struct QuantizeCall {
  using Attributes = QuantizeAttributes;
  using State = QuantizeState;
  using Buffers = QuantizeBuffers;
  static constexpr int kOperands = 2, kResults = 4;
  static constexpr Op kOp = Op::kQuantize;
  static constexpr char kTarget[] = "jax_nvfp4_quantize";
  static constexpr char kStateName[] = "jax_nvfp4_quantize_state";

  static auto Decode(const Attributes& attributes) { return DecodeQuantize(kOp, attributes); }
  static auto Check(const State& state, const Buffers& buffers) {
    return CheckQuantize(kOp, state, buffers);
  }
  static constexpr auto Launch = LaunchQuantize;
};

}  // namespace

std::array<Target, 2> QuantizeTargets() { return TargetsOf<QuantizeCall>(); }

}  // namespace jax_nvfp4
