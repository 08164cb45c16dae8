// SPDX-License-Identifier: Apache-2.0
#include "common.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <limits>
#include <sstream>

namespace jax_nvfp4 {
namespace {

constexpr int32_t kMaxDevices = 64;

std::string CudaMessage(std::string_view what, cudaError_t error) {
  // Clears the error, so that the next call of another library does not find it.
  cudaGetLastError();
  return std::string("jax_nvfp4: ") + std::string(what) + ": " + cudaGetErrorName(error) + ": " +
         cudaGetErrorString(error);
}

// Whether a device runs code of `arch`: "sm_90a" only exactly 9.0; "sm_100f", a family, also later
// minor versions of the same major one.
bool Runs(const Device& device, std::string_view arch) {
  const int32_t number = std::atoi(arch.data() + 3);
  const int32_t major = number / 10, minor = number % 10;
  if (device.major != major) return false;
  return arch.back() == 'f' ? device.minor >= minor : device.minor == minor;
}

// What is wrong with the driver, where that may be why a kernel does not load; else nothing.
std::string DriverNote(std::string_view arch) {
  // Family targets, which Blackwell's kernels are for, came with CUDA 12.9.
  const int needed = arch.substr(0, 5) == "sm_90" ? 12000 : 12090;
  int version = 0;
  if (cudaDriverGetVersion(&version) != kCudaSuccess || version >= needed) return "";
  const auto text = [](int v) {
    return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10);
  };
  return " (the driver is for CUDA " + text(version) + ", and kernels for " + std::string(arch) +
         " need one for CUDA " + text(needed) + " or newer)";
}

}  // namespace

ffi::Error Kernel::LaunchError(cudaError_t error) const {
  return ffi::Error(ffi::ErrorCode::kInternal,
                    CudaMessage(std::string("launch of ") + name_, error));
}

ffi::Error Kernel::Load(int32_t device) {
  if (device < 0 || device >= kMaxDevices) {
    return ffi::Error(ffi::ErrorCode::kUnimplemented,
                      "jax_nvfp4: device ordinal " + std::to_string(device) + " is not below " +
                          std::to_string(kMaxDevices));
  }
  const uint64_t bit = uint64_t{1} << device;
  if (loaded_.load(std::memory_order_acquire) & bit) return ffi::Error::Success();

  FFI_ASSIGN_OR_RETURN(const Device properties, GetDevice(device));
  if (!Runs(properties, arch_)) {
    return ffi::Error(ffi::ErrorCode::kFailedPrecondition,
                      std::string("jax_nvfp4: kernel ") + name_ + " is for " + arch_ + ", and device " + std::to_string(device) +
                          " has compute capability " + std::to_string(properties.major) + "." +
                          std::to_string(properties.minor));
  }
  std::lock_guard<std::mutex> lock(mutex_);
  cudaError_t error = kCudaSuccess;
  cudaLibrary_t* library = &library_;
  if (library_ == nullptr) {
    void* args[] = {&library, &error};
    init_(args);
    if (error != kCudaSuccess) {
      library_ = nullptr;
      return ffi::Error(ffi::ErrorCode::kInternal,
                        CudaMessage(std::string("loading of ") + name_, error) + DriverNote(arch_));
    }
  }
  void* args[] = {&library, &device, &error};
  load_(args);
  if (error != kCudaSuccess) {
    return ffi::Error(ffi::ErrorCode::kInternal,
                      CudaMessage(std::string("loading of ") + name_ + " on device " +
                                      std::to_string(device),
                                  error) +
                          DriverNote(arch_));
  }
  loaded_.fetch_or(bit, std::memory_order_release);
  return ffi::Error::Success();
}

ffi::ErrorOr<Device> GetDevice(int32_t ordinal) {
  static std::mutex mutex;
  static std::array<Device, kMaxDevices> devices{};
  if (ordinal < 0 || ordinal >= kMaxDevices) {
    return Failure{ffi::Error(ffi::ErrorCode::kUnimplemented,
                              "jax_nvfp4: device ordinal " + std::to_string(ordinal) +
                                  " is not below " + std::to_string(kMaxDevices))};
  }
  std::lock_guard<std::mutex> lock(mutex);
  Device& device = devices[ordinal];
  if (device.num_sms == 0) {
    Device read{};
    cudaError_t error = cudaDeviceGetAttribute(&read.num_sms, kMultiProcessorCount, ordinal);
    if (error == kCudaSuccess) {
      error = cudaDeviceGetAttribute(&read.major, kComputeCapabilityMajor, ordinal);
    }
    if (error == kCudaSuccess) {
      error = cudaDeviceGetAttribute(&read.minor, kComputeCapabilityMinor, ordinal);
    }
    if (error != kCudaSuccess) {
      return Failure{ffi::Error(ffi::ErrorCode::kInternal,
                                CudaMessage("reading the device's properties", error))};
    }
    device = read;
  }
  return device;
}

int32_t UsableSms(int32_t planned, const Device& device) {
  return planned > 0 ? std::min(planned, device.num_sms) : device.num_sms;
}

std::string CallName(Op caller, Op op) {
  constexpr const char* kNames[] = {"quantize", "gemm", "linear"};
  const std::string name = kNames[static_cast<int>(op)];
  return caller == op ? name : kNames[static_cast<int>(caller)] + (" (" + name + ")");
}

ffi::Error Mismatch(std::string_view call, std::string_view operand, std::string_view expected,
                    std::string_view got) {
  std::ostringstream message;
  message << "jax_nvfp4 " << call << ": operand " << operand << ": expected " << expected
          << ", got " << got;
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, message.str());
}

ffi::Error CudaOnly(Op op, const Kernel& kernel) {
  return ffi::Error(ffi::ErrorCode::kUnimplemented, "jax_nvfp4 " + CallName(op, op) +
                                                        ": kernel " +
                                                        kernel.name() +
                                                        " runs on CUDA devices only");
}

std::string Describe(const ffi::AnyBuffer& buffer) {
  std::ostringstream text;
  text << static_cast<XLA_FFI_DataType>(buffer.element_type()) << "[";
  const char* separator = "";
  for (int64_t size : buffer.dimensions()) {
    text << separator << size;
    separator = ",";
  }
  text << "]";
  return text.str();
}

void Checker::Add(ffi::Error error) {
  if (ok()) error_ = std::move(error);
}

void Checker::That(bool holds, std::string_view operand, std::string_view expected,
                   const ffi::AnyBuffer& buffer) {
  if (!holds && ok()) error_ = Mismatch(call_, operand, expected, Describe(buffer));
}

void Checker::Attribute(std::string_view name, int32_t value, int32_t low, int32_t high) {
  if (value >= low && value <= high) return;
  Add(Mismatch(call_, name, std::to_string(low) + " to " + std::to_string(high),
               std::to_string(value)));
}

DType Checker::Float(std::string_view operand, const ffi::AnyBuffer& buffer) {
  switch (buffer.element_type()) {
    case ffi::DataType::F32:
      return kF32;
    case ffi::DataType::BF16:
      return kBF16;
    case ffi::DataType::F16:
      return kF16;
    default:
      That(false, operand, "F32, BF16 or F16 elements", buffer);
      return kNone;
  }
}

void Checker::Bytes(std::string_view operand, const ffi::AnyBuffer& buffer) {
  const ffi::DataType dtype = buffer.element_type();
  That(dtype == ffi::DataType::U8 || dtype == ffi::DataType::F8E4M3FN, operand,
       "U8 or F8E4M3FN elements", buffer);
}

void Checker::Type(std::string_view operand, const ffi::AnyBuffer& buffer, ffi::DataType dtype) {
  if (buffer.element_type() == dtype) return;
  std::ostringstream expected;
  expected << static_cast<XLA_FFI_DataType>(dtype) << " elements";
  That(false, operand, expected.str(), buffer);
}

void Checker::Matrix(std::string_view operand, const ffi::AnyBuffer& buffer) {
  constexpr int64_t kLimit = std::numeric_limits<int32_t>::max();
  const auto sizes = buffer.dimensions();
  That(sizes.size() == 2 && sizes[0] <= kLimit && sizes[1] <= kLimit, operand,
       "a matrix with both sizes below 2^31", buffer);
}

void Checker::Count(std::string_view operand, const ffi::AnyBuffer& buffer, int64_t elements,
                    std::string_view meaning) {
  if (static_cast<int64_t>(buffer.element_count()) == elements) return;
  That(false, operand, std::to_string(elements) + " elements (" + std::string(meaning) + ")",
       buffer);
}

void Checker::Aligned(std::string_view operand, const ffi::AnyBuffer& buffer, uintptr_t bytes) {
  if (buffer.element_count() == 0 || !ok()) return;
  const uintptr_t address = reinterpret_cast<uintptr_t>(buffer.untyped_data());
  if (address % bytes == 0) return;
  std::ostringstream got;
  got << "address 0x" << std::hex << address;
  error_ = Mismatch(call_, operand, "alignment to " + std::to_string(bytes) + " bytes", got.str());
}

}  // namespace jax_nvfp4
