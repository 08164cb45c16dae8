// SPDX-License-Identifier: Apache-2.0
// gemm: y (m, n) = alpha * x (m, k) @ w (n, k).T + bias, the weight repacked for the architecture.
//
// A gated kernel makes one output of each gate and up row, y (m, n / 2). A grouped one has a weight
// for each group of rows, w (groups, n, k), and reads the groups' sizes on the device.
#include "gemm.h"

#include "handlers.h"

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    jax_nvfp4::GemmAttributes, ::xla::ffi::StructMember<std::string_view>("kernel"),
    ::xla::ffi::StructMember<int32_t>("num_sms"), ::xla::ffi::StructMember<int32_t>("split_k"),
    ::xla::ffi::StructMember<float>("limit"), ::xla::ffi::StructMember<float>("alpha"),
    ::xla::ffi::StructMember<float>("cubic"), ::xla::ffi::StructMember<float>("beta"));

namespace jax_nvfp4 {
namespace {

// The rows of a repacked weight: of a gated one each half is padded by itself.
int64_t PackedRows(const Kernel& kernel, int64_t n, int64_t multiple) {
  const int64_t halves = kernel.gated() ? 2 : 1;
  return CeilDiv(n / halves, multiple / halves) * multiple;
}

// Checks what says which rows are in which group, and what there is one of for each group.
void CheckGroups(Checker& check, const Kernel& kernel, const GemmBuffers& b, int64_t scale_rows,
                 GemmSizes& sizes) {
  if (!kernel.grouped()) {
    check.Count("group_sizes", b.group_sizes, 0, "none: the kernel is for rows in no groups");
    check.Count("group_offset", b.group_offset, 0, "none: the kernel is for rows in no groups");
    return;
  }
  check.Type("group_sizes", b.group_sizes, ffi::DataType::S32);
  const int64_t count = b.group_sizes.element_count();
  // Tiles are numbered by an int32, and so are the rows of two neighboring groups together.
  const int64_t tiles = (count + 1 + CeilDiv(sizes.m, 8)) * (CeilDiv(sizes.n, 128) * 2 + 2);
  check.That(count > 0 && tiles < (1 << 30) && sizes.m < (1 << 30), "group_sizes",
             "1 or more sizes, fewer than 2^30 rows and tiles", b.group_sizes);
  check.Type("group_offset", b.group_offset, ffi::DataType::S32);
  check.Count("group_offset", b.group_offset, 1, "one");
  const int64_t groups = sizes.group_count;
  const int64_t scales = b.w_scale.element_count();
  check.Type("w_scale", b.w_scale, ffi::DataType::F32);
  check.That(scales == groups || scales == groups * scale_rows, "w_scale",
             std::to_string(groups) + " or " + std::to_string(groups * scale_rows) + " elements",
             b.w_scale);
  sizes.size_count = static_cast<int32_t>(count);
  sizes.w_scale_stride = scales == groups ? 0 : 1;
  sizes.w_scale_group_stride = static_cast<int32_t>(scales / groups);
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

ffi::ErrorOr<GemmState> DecodeGemm(Op caller, GemmAttributes attributes) {
  Checker check(caller, Op::kGemm);
  check.Attribute("split_k", attributes.split_k, 1, 1 << 16);
  FFI_RETURN_IF_ERROR(check.error());
  return Resolve(Op::kGemm, caller, attributes);
}

ffi::ErrorOr<GemmSizes> CheckGemm(Op caller, const GemmState& state, const GemmBuffers& b) {
  const Kernel& kernel = *state.kernel;
  Checker check(caller, Op::kGemm);
  check.Matrix("x", b.x);
  check.Matrix("y", b.y);
  FFI_RETURN_IF_ERROR(check.error());
  const bool packed = kernel.x_dtype() == "e2m1";
  const int64_t m = b.x.dimensions()[0], n = b.y.dimensions()[1] * (kernel.gated() ? 2 : 1);
  const int64_t k = b.x.dimensions()[1] * (packed ? 2 : 1);
  check.That(b.y.dimensions()[0] == m, "y", std::to_string(m) + " rows, as many as x", b.y);
  check.That(k > 0 && k % 64 == 0 && k <= INT32_MAX, "x",
             "a positive multiple of 64 elements along k", b.x);
  FFI_RETURN_IF_ERROR(check.error());

  if (packed) {
    check.Type("x", b.x, ffi::DataType::U8);
    check.Bytes("sfx", b.sfx);
    check.Count("sfx", b.sfx, 128 * CeilDiv(m, 128) * (k / 16), "ceil(m/128)*128 * k/16");
  } else {
    const bool half = kernel.x_dtype() == "float16";
    check.Type("x", b.x, half ? ffi::DataType::F16 : ffi::DataType::BF16);
    check.Count("sfx", b.sfx, 0, "none: x holds values");
  }
  check.Type("w", b.w, ffi::DataType::U8);
  check.That(!kernel.grouped() || (b.w.dimensions().size() == 3 && b.w.dimensions()[0] > 0), "w",
             "a matrix for each group", b.w);
  FFI_RETURN_IF_ERROR(check.error());
  const int64_t groups = kernel.grouped() ? b.w.dimensions()[0] : 1;
  const WeightTile padding = WeightTileOf(kernel.arch());
  const int64_t rows = PackedRows(kernel, n, padding.n);
  const int64_t w_elements = groups * rows * CeilDiv(k, padding.k) * padding.k;
  const std::string of = " of " + (kernel.grouped() ? std::to_string(groups) + " times " : "") +
                         "(" + std::to_string(n) + "," + std::to_string(k) + ") padded to (" +
                         std::to_string(padding.n) + "," + std::to_string(padding.k) + ")";
  check.Count("w", b.w, w_elements / 2, "codes" + of);
  check.Bytes("sfw", b.sfw);
  check.Count("sfw", b.sfw, w_elements / 16, "scales" + of);

  GemmSizes sizes{};
  sizes.m = static_cast<int32_t>(m);
  sizes.n = static_cast<int32_t>(n);
  sizes.k = static_cast<int32_t>(k);
  sizes.x_scale_stride = -1;
  sizes.bias_dtype = kNone;
  sizes.group_count = kernel.grouped() ? static_cast<int32_t>(groups) : 0;
  // Those of a gated weight are in the order of its rows, padding included.
  const int64_t scale_rows = kernel.gated() ? rows : n;
  CheckGroups(check, kernel, b, scale_rows, sizes);
  if (!kernel.grouped()) {
    sizes.w_scale_stride = ScaleStride(check, "w_scale", b.w_scale, scale_rows);
  }
  if (b.x_scale.element_count() > 0) {
    sizes.x_scale_stride = ScaleStride(check, "x_scale", b.x_scale, m);
  }
  if (b.bias.element_count() > 0) {
    sizes.bias_dtype = check.Float("bias", b.bias);
    check.Count("bias", b.bias, groups * n, kernel.grouped() ? "groups * n" : "n");
  }
  sizes.out_dtype = check.Float("y", b.y);

  check.Aligned("x", b.x);
  check.Aligned("sfx", b.sfx);
  check.Aligned("w", b.w);
  check.Aligned("sfw", b.sfw);
  check.Aligned("y", b.y);
  check.Aligned("scratch", b.scratch);
  FFI_RETURN_IF_ERROR(check.error());
  return sizes;
}

ffi::Error LaunchGemm(cudaStream_t stream, int32_t ordinal, const GemmState& state,
                      const GemmBuffers& b, const GemmSizes& sizes) {
  if (sizes.m == 0 || sizes.n == 0) return ffi::Error::Success();
  // Loaded by Initialize: this only makes sure.
  FFI_RETURN_IF_ERROR(state.kernel->Load(ordinal));
  FFI_ASSIGN_OR_RETURN(const Device device, GetDevice(ordinal));
  return state.kernel->Launch(
      stream, b.x.untyped_data(), b.sfx.untyped_data(), b.w.untyped_data(), b.sfw.untyped_data(),
      b.x_scale.untyped_data(), b.w_scale.untyped_data(), b.bias.untyped_data(),
      b.y.untyped_data(), b.scratch.untyped_data(), b.group_sizes.untyped_data(),
      b.group_offset.untyped_data(), sizes.m, sizes.n, sizes.k,
      sizes.x_scale_stride, sizes.w_scale_stride, static_cast<int32_t>(sizes.bias_dtype),
      static_cast<int32_t>(sizes.out_dtype), state.attributes.split_k,
      UsableSms(state.attributes.num_sms, device), sizes.size_count, sizes.group_count,
      sizes.w_scale_group_stride, state.attributes.limit, state.attributes.alpha,
      state.attributes.cubic, state.attributes.beta);
}

namespace {

struct GemmCall {
  using Attributes = GemmAttributes;
  using State = GemmState;
  using Buffers = GemmBuffers;
  static constexpr int kOperands = 9, kResults = 2;
  static constexpr Op kOp = Op::kGemm;
  static constexpr char kTarget[] = "jax_nvfp4_gemm";
  static constexpr char kStateName[] = "jax_nvfp4_gemm_state";

  static auto Decode(const Attributes& attributes) { return DecodeGemm(kOp, attributes); }
  static auto Check(const State& state, const Buffers& buffers) {
    return CheckGemm(kOp, state, buffers);
  }
  static constexpr auto Launch = LaunchGemm;
};

}  // namespace

std::array<Target, 2> GemmTargets() { return TargetsOf<GemmCall>(); }

}  // namespace jax_nvfp4
