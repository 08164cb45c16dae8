// SPDX-License-Identifier: Apache-2.0
// The extension module jax_nvfp4._ffi: registrations of custom call targets, and the manifest.
#include "common.h"
#include "nanobind/nanobind.h"
#include "nanobind/stl/string_view.h"

namespace nb = nanobind;

namespace jax_nvfp4 {
namespace {

// A list of {name, platform, handlers: {stage: capsule}, state_name, state: {type_id, type_info}},
// the inner dictionaries being those that jax.ffi.register_ffi_target and register_ffi_type take;
// state_name and state are None for a target without.
nb::list Targets() {
  nb::list list;
  for (const auto& targets : {QuantizeTargets(), GemmTargets(), LinearTargets()}) {
    for (const Target& target : targets) {
      nb::dict handlers;
      const std::pair<const char*, XLA_FFI_Handler*> stages[] = {
          {"instantiate", target.instantiate},
          {"initialize", target.initialize},
          {"execute", target.execute},
      };
      for (const auto& [stage, handler] : stages) {
        if (handler != nullptr) {
          handlers[stage] = nb::capsule(reinterpret_cast<const void*>(handler));
        }
      }
      nb::dict entry;
      entry["name"] = target.name;
      entry["platform"] = target.platform;
      entry["handlers"] = handlers;
      entry["state_name"] = target.state_name;
      entry["state"] = nb::none();
      if (target.state_id != nullptr) {
        nb::dict state;
        state["type_id"] = nb::capsule(target.state_id);
        state["type_info"] = nb::capsule(target.state_info);
        entry["state"] = state;
      }
      list.append(entry);
    }
  }
  return list;
}

}  // namespace
}  // namespace jax_nvfp4

NB_MODULE(_ffi, module) {
  module.def("targets", &jax_nvfp4::Targets);
  module.def("manifest", &jax_nvfp4::Manifest);
}
