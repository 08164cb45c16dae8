// SPDX-License-Identifier: Apache-2.0
// The extension module jax_nvfp4._ffi: registrations of custom call targets, and the manifest.
#include "common.h"
#include "nanobind/nanobind.h"
#include "nanobind/stl/string_view.h"

namespace nb = nanobind;

namespace jax_nvfp4 {
namespace {

nb::capsule Capsule(const void* pointer) { return nb::capsule(pointer); }

// A list of {name, platform, handlers: {stage: capsule}, state_name, state: {type_id, type_info}},
// the dictionaries being those that jax.ffi.register_ffi_target and register_ffi_type take.
nb::list Targets() {
  nb::list list;
  for (const auto& targets : {QuantizeTargets(), GemmTargets()}) {
    for (const Target& target : targets) {
      nb::dict handlers;
      handlers["instantiate"] = Capsule(reinterpret_cast<void*>(target.instantiate));
      if (target.initialize != nullptr) {
        handlers["initialize"] = Capsule(reinterpret_cast<void*>(target.initialize));
      }
      handlers["execute"] = Capsule(reinterpret_cast<void*>(target.execute));
      nb::dict state;
      state["type_id"] = Capsule(target.state_id);
      state["type_info"] = Capsule(target.state_info);
      nb::dict entry;
      entry["name"] = target.name;
      entry["platform"] = target.platform;
      entry["handlers"] = handlers;
      entry["state_name"] = target.state_name;
      entry["state"] = state;
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
