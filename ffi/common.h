// SPDX-License-Identifier: Apache-2.0
// What the handlers share: the table of kernels, their loading, and checks of buffers.
#ifndef JAX_NVFP4_FFI_COMMON_H_
#define JAX_NVFP4_FFI_COMMON_H_

#include <array>
#include <atomic>
#include <cstdint>
#include <iterator>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>

#include "cudart.h"
#include "enums.h"
#include "xla/ffi/api/ffi.h"

// The error macros of XLA's and JAX's own handlers, whose header is not among the public ones. They
// return from functions of ffi::Error and of ffi::ErrorOr.
#define FFI_RETURN_IF_ERROR(expression) \
  if (ffi::Error error_ = (expression); error_.failure()) return jax_nvfp4::Failure{error_}
#define FFI_ASSIGN_OR_RETURN(variable, expression) \
  FFI_ASSIGN_OR_RETURN_(FFI_CONCATENATE(result_, __LINE__), variable, expression)
#define FFI_ASSIGN_OR_RETURN_(result, variable, ...)                      \
  auto result = __VA_ARGS__;                                               \
  if (result.has_error()) return jax_nvfp4::Failure{result.error()}; \
  variable = *std::move(result)
#define FFI_CONCATENATE(a, b) FFI_CONCATENATE_(a, b)
#define FFI_CONCATENATE_(a, b) a##b

namespace jax_nvfp4 {

namespace ffi = ::xla::ffi;

// An error, as a function returns it whether or not it returns a value else.
struct Failure {
  ffi::Error error;
  operator ffi::Error() const { return error; }  // NOLINT
  template <typename T>
  operator ffi::ErrorOr<T>() const {  // NOLINT
    return ffi::Unexpected(error);
  }
};

// The custom calls. Kernels are of the first two; errors name the call that was made.
enum class Op { kQuantize, kGemm, kLinear };

// Element types as the kernels number them.
enum DType : int32_t { kNone = -1, kF32 = 0, kBF16 = 1, kF16 = 2 };

// A compiled kernel: host functions that CuTeDSL exported, and on which devices it is ready.
class Kernel {
 public:
  using Init = void (*)(void** args);                 // (cudaLibrary_t**, cudaError_t*)
  using LoadToDevice = void (*)(void** args);         // (cudaLibrary_t**, int32_t*, cudaError_t*)
  using Entry = void (*)(void** args, int32_t size);  // the op's operands, the stream, the result

  constexpr Kernel(Op op, const char* name, const char* arch, const char* x_dtype, bool gated,
                   bool grouped, Init init, LoadToDevice load, Entry entry)
      : op_(op), name_(name), arch_(arch), x_dtype_(x_dtype), gated_(gated), grouped_(grouped),
        init_(init), load_(load), entry_(entry) {}
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;

  Op op() const { return op_; }
  const char* name() const { return name_; }
  const char* arch() const { return arch_; }
  // The element type of x it was compiled for.
  std::string_view x_dtype() const { return x_dtype_; }
  // Of a GEMM: makes one output of each gate and up row.
  bool gated() const { return gated_; }
  // Of a GEMM: has a weight for each group of rows.
  bool grouped() const { return grouped_; }

  // Makes the kernel ready on a device; returns at once where it is. From any thread.
  ffi::Error Load(int32_t device);

  // Enqueues the kernel. `operands` are the op's, in the order of its signature.
  template <typename... Operands>
  ffi::Error Launch(cudaStream_t stream, Operands... operands) const {
    cudaError_t result = kCudaSuccess;
    void* args[] = {static_cast<void*>(&operands)..., &stream, &result};
    entry_(args, static_cast<int32_t>(std::size(args)));
    return result == kCudaSuccess ? ffi::Error::Success() : LaunchError(result);
  }

 private:
  ffi::Error LaunchError(cudaError_t error) const;

  const Op op_;
  const char* const name_;
  const char* const arch_;
  const std::string_view x_dtype_;
  const bool gated_;
  const bool grouped_;
  const Init init_;
  const LoadToDevice load_;
  const Entry entry_;
  std::mutex mutex_;
  cudaLibrary_t library_ = nullptr;   // guarded by mutex_
  std::atomic<uint64_t> loaded_ = 0;  // bit d: ready on device d
};

// The kernels of this build (generated from the manifest), and the manifest itself as JSON.
Kernel* FindKernel(Op op, std::string_view name);
std::string_view Manifest();

struct Device {
  int32_t num_sms;
  int32_t major;
  int32_t minor;
};

// Properties of a device, read once.
ffi::ErrorOr<Device> GetDevice(int32_t ordinal);

// The number of multiprocessors a call may count on: what the caller planned with (0: no plan), but
// never more than the device has, since kernels with grid-wide barriers need all CTAs resident.
int32_t UsableSms(int32_t planned, const Device& device);

// What errors call an op: "gemm" or, as a part of the call that was made, "linear (gemm)".
std::string CallName(Op caller, Op op);

// InvalidArgument naming the call, the operand, and both sides.
ffi::Error Mismatch(std::string_view call, std::string_view operand, std::string_view expected,
                    std::string_view got);

// The error of a call that ended up on the host.
ffi::Error CudaOnly(Op op, const Kernel& kernel);

// "BF16[16,4096]"
std::string Describe(const ffi::AnyBuffer& buffer);

// Checks that collect: the first that fails is the error, later ones do nothing.
class Checker {
 public:
  Checker(Op caller, Op op) : call_(CallName(caller, op)) {}

  // One of the element types the kernels number; kNone and an error if it is another.
  DType Float(std::string_view operand, const ffi::AnyBuffer& buffer);
  // One-byte elements: codes and scales, whichever way they are typed.
  void Bytes(std::string_view operand, const ffi::AnyBuffer& buffer);
  void Type(std::string_view operand, const ffi::AnyBuffer& buffer, ffi::DataType dtype);
  // A matrix, both sizes within int32.
  void Matrix(std::string_view operand, const ffi::AnyBuffer& buffer);
  void Count(std::string_view operand, const ffi::AnyBuffer& buffer, int64_t elements,
             std::string_view meaning);
  // Empty, or aligned as the kernels assume.
  void Aligned(std::string_view operand, const ffi::AnyBuffer& buffer, uintptr_t bytes = 16);
  void Attribute(std::string_view name, int32_t value, int32_t low, int32_t high);
  template <typename Enum>
  void Attribute(std::string_view name, int32_t value, Enum low, Enum high) {
    Attribute(name, value, static_cast<int32_t>(low), static_cast<int32_t>(high));
  }
  // A condition on an operand that the above do not cover.
  void That(bool holds, std::string_view operand, std::string_view expected,
            const ffi::AnyBuffer& buffer);
  void Add(ffi::Error error);

  bool ok() const { return error_.success(); }
  const ffi::Error& error() const { return error_; }

 private:
  std::string call_;
  ffi::Error error_ = ffi::Error::Success();
};

inline int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What an op's Instantiate stage leaves for the others: its attributes, decoded, and its kernel.
template <typename Attributes>
struct CallState {
  inline static ffi::TypeId id = {};
  Attributes attributes;
  Kernel* kernel;

  const Kernel& MainKernel() const { return *kernel; }
  ffi::Error Load(int32_t device) { return kernel->Load(device); }
};

// The state of a call whose kernel is of `op`; errors name the call that was made, `caller`.
template <typename Attributes>
ffi::ErrorOr<CallState<Attributes>> Resolve(Op op, Op caller, Attributes attributes) {
  Kernel* kernel = FindKernel(op, attributes.kernel);
  if (kernel == nullptr) {
    return Failure{ffi::Error(ffi::ErrorCode::kNotFound,
                              "jax_nvfp4 " + CallName(caller, op) + ": no kernel named '" +
                                  std::string(attributes.kernel) + "' is built in")};
  }
  attributes.kernel = kernel->name();  // the name in the call frame does not outlive this stage
  return CallState<Attributes>{attributes, kernel};
}

// A custom call target on one platform, as module.cc hands it to JAX. On the host it only checks: its
// state type could not be registered in time, since JAX hands the CPU runtime targets before types.
struct Target {
  const char* name;
  const char* platform;
  XLA_FFI_Handler* instantiate;  // null: no such stage
  XLA_FFI_Handler* initialize;
  XLA_FFI_Handler* execute;
  const char* state_name;
  ffi::TypeId* state_id;
  ffi::TypeInfo* state_info;
};

std::array<Target, 2> QuantizeTargets();
std::array<Target, 2> GemmTargets();
std::array<Target, 2> LinearTargets();

}  // namespace jax_nvfp4

#endif  // JAX_NVFP4_FFI_COMMON_H_
