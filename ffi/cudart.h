// SPDX-License-Identifier: Apache-2.0
// The few functions of the CUDA runtime that the extension calls itself, declared here: their C ABI
// is the same in CUDA 12 and 13, and the build needs no CUDA headers. The definitions come from
// libcudart_static.a, which loads the driver on the first call and not at import.
#ifndef JAX_NVFP4_FFI_CUDART_H_
#define JAX_NVFP4_FFI_CUDART_H_

#include <cstddef>

extern "C" {

typedef struct CUstream_st* cudaStream_t;
typedef struct CUlib_st* cudaLibrary_t;
typedef int cudaError_t;

const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int device);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, int kind, cudaStream_t);
cudaError_t cudaMemset2DAsync(void* to, size_t pitch, int value, size_t width, size_t height,
                              cudaStream_t);

}  // extern "C"

namespace jax_nvfp4 {

inline constexpr cudaError_t kCudaSuccess = 0;
inline constexpr int kMultiProcessorCount = 16;     // cudaDevAttrMultiProcessorCount
inline constexpr int kComputeCapabilityMajor = 75;  // cudaDevAttrComputeCapabilityMajor
inline constexpr int kComputeCapabilityMinor = 76;  // cudaDevAttrComputeCapabilityMinor
inline constexpr int kMemcpyDeviceToDevice = 3;     // cudaMemcpyDeviceToDevice

}  // namespace jax_nvfp4

#endif  // JAX_NVFP4_FFI_CUDART_H_
