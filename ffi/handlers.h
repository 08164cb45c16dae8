// SPDX-License-Identifier: Apache-2.0
// The stages of a custom call, the same for every op.
//
// A call is described by a struct:
//   Attributes, State            what Decode takes and what it leaves for the other stages
//   Buffers                      an aggregate of ffi::AnyBuffer: the operands, then the results
//   kOperands, kResults          how many of each
//   kOp, kTarget, kStateName     its names
//   Decode(attributes)           checks the attributes and finds the kernels
//   Check(state, buffers)        checks all buffers, reads no memory; returns sizes
//   Launch(stream, ordinal, state, buffers, sizes)
#ifndef JAX_NVFP4_FFI_HANDLERS_H_
#define JAX_NVFP4_FFI_HANDLERS_H_

#include <initializer_list>
#include <memory>
#include <utility>

#include "common.h"

namespace jax_nvfp4 {

inline ffi::AnyBuffer Buffer(ffi::AnyBuffer operand) { return operand; }
inline ffi::AnyBuffer Buffer(ffi::Result<ffi::AnyBuffer> result) { return *result; }

// A handler, of a binding to which the buffers of a call are added.
template <int operands, int results, typename Binding, typename Function>
auto* WithBuffers(Binding&& binding, Function function, std::initializer_list<ffi::Traits> traits) {
  if constexpr (operands > 0) {
    return WithBuffers<operands - 1, results>(
        std::move(binding).template Arg<ffi::AnyBuffer>(), function, traits);
  } else if constexpr (results > 0) {
    return WithBuffers<0, results - 1>(std::move(binding).template Ret<ffi::AnyBuffer>(), function,
                                       traits);
  } else {
    return std::move(binding).To(function, traits).release();
  }
}

template <typename Call>
XLA_FFI_Error* Instantiate(XLA_FFI_CallFrame* frame) {
  using State = typename Call::State;
  const auto decode =
      [](typename Call::Attributes attributes) -> ffi::ErrorOr<std::unique_ptr<State>> {
    FFI_ASSIGN_OR_RETURN(State state, Call::Decode(attributes));
    return std::make_unique<State>(std::move(state));
  };
  static auto* handler =
      ffi::Ffi::BindInstantiate().Attrs<typename Call::Attributes>().To(decode).release();
  return handler->Call(frame);
}

// The one stage that may load, since Execute may run under graph capture.
template <typename Call>
XLA_FFI_Error* Initialize(XLA_FFI_CallFrame* frame) {
  using State = typename Call::State;
  const auto load = [](int32_t device, State* state) { return state->Load(device); };
  static auto* handler = ffi::Ffi::BindInitialize()
                             .Ctx<ffi::DeviceOrdinal>()
                             .Ctx<ffi::State<State>>()
                             .To(load)
                             .release();
  return handler->Call(frame);
}

template <typename Call>
XLA_FFI_Error* Execute(XLA_FFI_CallFrame* frame) {
  using State = typename Call::State;
  const auto run = [](cudaStream_t stream, int32_t ordinal, State* state,
                      auto... arguments) -> ffi::Error {
    const typename Call::Buffers buffers{Buffer(arguments)...};
    FFI_ASSIGN_OR_RETURN(const auto sizes, Call::Check(*state, buffers));
    return Call::Launch(stream, ordinal, *state, buffers, sizes);
  };
  static auto* handler = WithBuffers<Call::kOperands, Call::kResults>(
      ffi::Ffi::Bind()
          .Ctx<ffi::PlatformStream<cudaStream_t>>()
          .Ctx<ffi::DeviceOrdinal>()
          .Ctx<ffi::State<State>>(),
      run, {ffi::Traits::kCmdBufferCompatible});
  return handler->Call(frame);
}

// On the host the same checks run, and then an error: there is no kernel to launch.
template <typename Call>
XLA_FFI_Error* HostExecute(XLA_FFI_CallFrame* frame) {
  const auto check = [](typename Call::Attributes attributes, auto... arguments) -> ffi::Error {
    FFI_ASSIGN_OR_RETURN(const typename Call::State state, Call::Decode(attributes));
    FFI_ASSIGN_OR_RETURN([[maybe_unused]] const auto sizes,
                         Call::Check(state, typename Call::Buffers{Buffer(arguments)...}));
    return CudaOnly(Call::kOp, state.MainKernel());
  };
  static auto* handler = WithBuffers<Call::kOperands, Call::kResults>(
      ffi::Ffi::Bind().Attrs<typename Call::Attributes>(), check, {});
  return handler->Call(frame);
}

// The targets of a call, on a GPU and on the host.
template <typename Call>
std::array<Target, 2> TargetsOf() {
  static ffi::TypeInfo info = ffi::MakeTypeInfo<typename Call::State>();
  return {
      Target{Call::kTarget, "CUDA", Instantiate<Call>, Initialize<Call>, Execute<Call>,
             Call::kStateName, &Call::State::id, &info},
      Target{Call::kTarget, "cpu", nullptr, nullptr, HostExecute<Call>, nullptr, nullptr, nullptr},
  };
}

}  // namespace jax_nvfp4

#endif  // JAX_NVFP4_FFI_HANDLERS_H_
