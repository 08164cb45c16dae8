# SPDX-License-Identifier: Apache-2.0
"""Which GPUs run which kernels: Python's choice and the extension's own guard, for GPUs not here.

The guard is compiled with functions in the CUDA runtime's place that report any compute capability.
"""

import pathlib
import shutil
import subprocess
import sys
import types

import jax.ffi
import pytest

import kernel_objects
from jax_nvfp4.config import REFERENCE, arch_of_compute_capability, runnable_arches
from jax_nvfp4.ops import device

# Compute capabilities of public GPUs, the arch whose kernels serve them, and all arches that run.
GPUS = {
    (8, 0): REFERENCE,  # A100
    (8, 9): REFERENCE,  # L4, RTX 4090
    (9, 0): "sm_90a",  # H100, H200, GH200
    (10, 0): "sm_100f",  # B200, GB200
    (10, 3): "sm_100f",  # B300, GB300
    (11, 0): REFERENCE,  # Jetson Thor
    (12, 0): "sm_120f",  # RTX 5090, RTX PRO 6000
    (12, 1): "sm_120f",  # DGX Spark
}
ARCHES = ("sm_90a", "sm_100f", "sm_103a", "sm_120f")

PROGRAM = """
#include <cstdio>
#include <cstdlib>
#include "common.h"
static int major_version, minor_version;
extern "C" {
const char* cudaGetErrorName(cudaError_t) { return "error"; }
const char* cudaGetErrorString(cudaError_t) { return "error"; }
cudaError_t cudaGetLastError() { return 0; }
cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int) {
  *value = attribute == jax_nvfp4::kComputeCapabilityMajor   ? major_version
           : attribute == jax_nvfp4::kComputeCapabilityMinor ? minor_version
                                                             : 100;
  return 0;
}
}
static int loaded;
static void Init(void**) {}
static void Load(void**) { ++loaded; }
int main(int, char** argv) {
  major_version = std::atoi(argv[1]);
  minor_version = std::atoi(argv[2]);
  for (char** arch = argv + 3; *arch; ++arch) {
    jax_nvfp4::Kernel kernel(jax_nvfp4::Op::kGemm, "k", *arch, "bfloat16", false, false, Init, Load,
                             nullptr);
    loaded = 0;
    const bool failed = kernel.Load(0).failure();
    if (failed == (loaded > 0)) return 1;
    if (!failed) std::puts(*arch);
  }
  return 0;
}
"""


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A program: compute capability and arches in, those of them that run on it out."""
    compiler = shutil.which("c++")
    assert compiler, "no C++ compiler"
    folder = tmp_path_factory.mktemp("guard")
    (folder / "main.cc").write_text(PROGRAM)
    source = kernel_objects.ROOT / "ffi"
    enums = kernel_objects.ROOT / "jax_nvfp4" / "config" / "enums.py"
    generate = [sys.executable, str(source / "generate_enums.py"), str(enums)]
    subprocess.run([*generate, str(folder / "enums.h")], check=True)
    command = [compiler, "-std=c++17", "-O0"]
    command += [f"-I{path}" for path in (source, folder, jax.ffi.include_dir())]
    command += [str(folder / "main.cc"), str(source / "common.cc"), "-o", str(folder / "guard")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "guard"


@pytest.mark.parametrize(("version", "arch"), GPUS.items())
def test_a_gpu_runs_the_kernels_that_are_chosen_for_it(
    guard: pathlib.Path, version: tuple[int, int], arch: str
) -> None:
    assert arch_of_compute_capability(*version) == arch
    command = [str(guard), *map(str, version), *ARCHES]
    runs = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    # Family code runs on each later member, architecture-specific code on its own only.
    expected = {arch} - {REFERENCE} | ({"sm_103a"} if version == (10, 3) else set())
    assert set(runs) == expected


@pytest.mark.parametrize("built", [("sm_100f", "sm_120f"), ("sm_100f", "sm_103a", "sm_120f")])
@pytest.mark.parametrize(("version", "arch"), GPUS.items())
def test_a_gpu_with_kernels_beside_its_familys_gets_them(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, int], arch: str, built: tuple[str, ...]
) -> None:
    """Weights are repacked for the family; a graph may hold more specific kernels, if there are."""
    gpu = types.SimpleNamespace(
        platform="gpu", device_kind="NVIDIA", compute_capability="{}.{}".format(*version)
    )
    monkeypatch.setattr(device, "_cuda_device", lambda: gpu)
    monkeypatch.setattr(device.custom_calls, "available", lambda name: name in built)
    monkeypatch.setattr(device, "_warn_once", lambda message: None)
    of_103 = "sm_103a" if version == (10, 3) and "sm_103a" in built else "sm_100f"
    assert device.kernel_arch("sm_100f") == of_103
    assert device.kernel_arch("sm_120f") == "sm_120f"
    assert device.kernel_arch("sm_90a") is device.kernel_arch(REFERENCE) is None
    expected = {"sm_100f": of_103, "sm_120f": "sm_120f"}.get(arch)
    assert device.kernel_arch(None) == expected
    assert expected is None or runnable_arches(expected)[-1] == arch
