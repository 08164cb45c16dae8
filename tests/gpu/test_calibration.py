# SPDX-License-Identifier: Apache-2.0
"""The PTX machine against a GPU: same kernels, same inputs, the same bits.

The tests of this GPU's kernels run once more, and each launch they make on the PTX machine is made
on the GPU too, with the same bytes in all its arguments: through the object's own host code, once
with the machine code that we ship, and once with what the driver assembles from the PTX text that
the machine runs. Every byte of every output is compared.

On Hopper they have to be equal, sums included, save what an activation is approximated by. How the
tensor cores of later GPUs add is not modeled: there GEMM results may differ, and what the GPU
computed has to keep the tests' bounds.
"""

from __future__ import annotations

import ctypes
import functools
import pathlib
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import ml_dtypes
import mutation
import numpy as np
import pytest
from ptx_machine import Pointer
from ptx_machine.host import run_object

import kernel_objects
from jax_nvfp4.config import arch_of_compute_capability, configs
from jax_nvfp4.config.enums import OutFormat
from jax_nvfp4.config.quantize import quantize_configs

GUARD_BYTES = 256  # around each array on the GPU

# Host code goes through this on its way to the CUDA runtime: the text, if one was given, replaces
# the machine code in the object. The runtime assembles PTX when it loads it.
_SHIM = """
typedef int (*load)(void **, const void *, void *, void *, unsigned, void *, void *, unsigned);
int __real__cudaLibraryLoadData(void **, const void *, void *, void *, unsigned, void *, void *,
                                unsigned);
static const void *text;
void replace_code(const void *ptx) { text = ptx; }
int __wrap__cudaLibraryLoadData(void **library, const void *code, void *a, void *b, unsigned c,
                                void *d, void *e, unsigned f) {
  return __real__cudaLibraryLoadData(library, text ? text : code, a, b, c, d, e, f);
}
"""
NO_ASSEMBLER = (221, 222)
"""Errors of the driver: no assembler, or one too old for this version of PTX."""
OUTPUTS = {"quantize": (2, 3, 4), "gemm": (7,)}
"""Which arguments are outputs: data, block_scale and global_scale; y."""
LAUNCHING = (
    "test_each_way_to_end",
    "test_each_shape_of_threads",
    "test_gated_epilogue_matches_float64",
    "test_groups_match_float64",
    "test_matches_float64",
)
"""The tests, one of them each kernel's, that certainly launch it."""
APPROXIMATED = {4: 10, 2: 1}
"""Units of the last place, by an output's bytes, between two of a gated kernel's outputs.

The machine rounds `ex2.approx` and `rcp.approx` to nearest. A GPU's are off by at most 2^-22 and by
one unit (PTX ISA, "Floating Point Instructions"), and two additions or products after each round
once more: 2^-22 + 2^-23 + 4 * 2^-24 of the value in all, which is ten of the smallest units.
"""


class Driver:
    """The few calls of the CUDA driver that this needs."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")
        self("cuInit", 0)
        device = ctypes.c_int()
        self("cuDeviceGet", ctypes.byref(device), 0)
        capability = self._attribute(75, device), self._attribute(76, device)
        self.arch = arch_of_compute_capability(*capability)
        name = ctypes.create_string_buffer(256)
        self("cuDeviceGetName", name, 256, device)
        self.name = name.value.decode()
        version = ctypes.c_int()
        self("cuDriverGetVersion", ctypes.byref(version))
        self.version = version.value
        self.device, self.context = device, ctypes.c_void_p()

    def __call__(self, function: str, *args: Any) -> None:
        status = getattr(self.library, function)(*args)
        if status:
            raise RuntimeError(f"{function} returned {status}")

    def _attribute(self, which: int, device: ctypes.c_int) -> int:
        value = ctypes.c_int()
        self("cuDeviceGetAttribute", ctypes.byref(value), which, device)
        return value.value

    def use(self) -> None:
        """Makes the device's primary context the thread's."""
        if not self.context:
            self("cuDevicePrimaryCtxRetain", ctypes.byref(self.context), self.device)
        self("cuCtxSetCurrent", self.context)

    def allocate(self, data: bytes) -> ctypes.c_uint64:
        """Device memory that holds these bytes."""
        address = ctypes.c_uint64()
        self("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(len(data), 1)))
        self("cuMemcpyHtoD_v2", address, data, ctypes.c_size_t(len(data)))
        return address

    def read(self, address: ctypes.c_uint64, size: int) -> bytes:
        data = ctypes.create_string_buffer(size)
        self("cuMemcpyDtoH_v2", data, address, ctypes.c_size_t(size))
        return data.raw

    def free(self, address: ctypes.c_uint64) -> None:
        self("cuMemFree_v2", address)


@functools.cache
def driver() -> Driver | str:
    """The driver of the first GPU, or why there is nothing to compare with."""
    try:
        found = Driver()
    except (OSError, RuntimeError) as error:
        return f"no NVIDIA GPU: {error}"
    if found.arch == "reference":
        return f"no kernels for {found.name}"
    return found


GPU = driver()
pytestmark = pytest.mark.skipif(isinstance(GPU, str), reason=str(GPU))
KERNELS = () if isinstance(GPU, str) else (*quantize_configs(GPU.arch), *configs(GPU.arch))


class DeviceKernel:
    """An exported kernel on the GPU.

    Args:
        name: the kernel.
        folder: where its object file is.
        scratch: a folder to link in.
        ptx: the text to assemble; by default the machine code of the object is used.
    """

    def __init__(
        self, name: str, folder: pathlib.Path, scratch: pathlib.Path, ptx: str | None = None
    ) -> None:
        (scratch / "shim.c").write_text(_SHIM)
        path = scratch / f"{name}{'_ptx' if ptx else ''}.so"
        libraries = [folder / "libcuda_dialect_runtime_static.a", folder / "libcudart_static.a"]
        subprocess.run(
            ["gcc", "-shared", "-fPIC", "-Wl,-Bsymbolic", "-Wl,--wrap=_cudaLibraryLoadData",
             "-o", path, folder / f"{name}.o", scratch / "shim.c", *libraries,
             "-lstdc++", "-lpthread", "-ldl", "-lrt"],
            check=True,
        )  # fmt: skip
        self.library = ctypes.CDLL(str(path))
        (entry,) = (k for k in kernel_objects.manifest()["kernels"] if k["name"] == name)
        self.entry = getattr(self.library, entry["entry"])
        self.name = name
        self.text = ctypes.c_char_p(ptx.encode()) if ptx else None
        if self.text:
            self.library.replace_code(self.text)
        module, status = ctypes.c_void_p(), ctypes.c_int32()
        pointer, device = ctypes.pointer(module), ctypes.c_int32(0)
        for step, values in (
            ("init", (pointer, status)),
            ("load_to_device", (pointer, device, status)),
        ):
            self._call(getattr(self.library, f"_mlir_{name}_cuda_{step}"), values)
            if status.value:
                raise RuntimeError(f"{name}: cuda_{step} returned {status.value}")

    @staticmethod
    def _call(function: Any, boxes: Sequence[Any], *rest: Any) -> None:
        function((ctypes.c_void_p * len(boxes))(*map(ctypes.addressof, boxes)), *rest)

    def run(self, args: Sequence[Any]) -> dict[int, bytes]:
        """What is in the arguments' arrays after a run, by the array's id; arrays stay as is.

        Raises:
            RuntimeError: the launch failed, or something was written outside of the arrays.
        """
        assert isinstance(GPU, Driver)
        gpu = GPU
        gpu.use()
        guard = b"\xa5" * GUARD_BYTES
        arrays: dict[int, tuple[ctypes.c_uint64, int]] = {}
        boxes: list[Any] = []
        for value in args:
            if isinstance(value, np.ndarray | Pointer):
                array = value.array if isinstance(value, Pointer) else value
                if id(array) not in arrays:
                    address = gpu.allocate(guard + array.tobytes() + guard)
                    arrays[id(array)] = address, array.nbytes
                shift = value.offset if isinstance(value, Pointer) else 0
                boxes.append(ctypes.c_void_p(arrays[id(array)][0].value + GUARD_BYTES + shift))
            elif value is None:
                boxes.append(ctypes.c_void_p(0))
            else:
                number = ctypes.c_float if isinstance(value, float) else ctypes.c_int32
                boxes.append(number(value))
        status = ctypes.c_int32()
        self._call(self.entry, [*boxes, ctypes.c_void_p(0), status], len(boxes) + 2)
        if status.value:
            raise RuntimeError(f"{self.name} returned {status.value}")
        gpu("cuCtxSynchronize")
        contents = {}
        for key, (address, size) in arrays.items():
            data = gpu.read(address, size + 2 * GUARD_BYTES)
            if data[:GUARD_BYTES] != guard or data[GUARD_BYTES + size :] != guard:
                raise RuntimeError(f"{self.name} wrote outside of an array")
            contents[key] = data[GUARD_BYTES : GUARD_BYTES + size]
            gpu.free(address)
        return contents


class Comparison:
    """A `run_object` that runs on the GPU too, and compares what both leave in the outputs.

    The outputs then hold what the GPU computed: that is what the tests check.

    Attributes:
        launches: runs of the kernel.
        values: elements of outputs compared.
        different: how many of them had other bits on the GPU.
        worst: the largest difference, in units of the last place of the GPU's value.
        beyond: how many differ by more than `APPROXIMATED`.
    """

    def __init__(self, kernels: Sequence[DeviceKernel]) -> None:
        self.kernels = kernels
        self.launches = self.values = self.different = self.beyond = 0
        self.worst = 0.0

    def run_object(self, path: Any, text: str, args: Sequence[Any], **options: Any) -> Any:
        name = self.kernels[0].name
        if pathlib.Path(path).stem != name:
            return run_object(path, text, args, **options)
        after = [kernel.run(args) for kernel in self.kernels]
        result = run_object(path, text, args, **options)
        self.launches += 1
        for index in OUTPUTS[name.partition("_")[0]]:
            output = args[index]
            if output is None:
                continue
            dtype = output.dtype
            if name.startswith("quantize") and index == 2 and args[10] == OutFormat.VALUES:
                dtype = np.dtype(ml_dtypes.bfloat16)
            on_gpu = [np.frombuffer(a[id(output)], dtype) for a in after]
            for other in on_gpu[1:]:
                np.testing.assert_array_equal(_bits(on_gpu[0]), _bits(other), "ours, the driver's")
            self._compare(output.reshape(-1).view(dtype), on_gpu[0])
            output.reshape(-1).view(np.uint8)[:] = on_gpu[0].view(np.uint8)
        return result

    def _compare(self, got: np.ndarray, expected: np.ndarray) -> None:
        self.values += got.size
        wrong = _bits(got) != _bits(expected)
        self.different += int(wrong.sum())
        if wrong.any() and got.dtype.itemsize > 1:
            a, b = got[wrong].astype(np.float64), expected[wrong].astype(np.float64)
            spacing = np.spacing(np.abs(expected[wrong])).astype(np.float64)
            units = np.abs(a - b) / spacing
            self.worst = max(self.worst, float(np.max(units)))
            self.beyond += int(np.sum(~(units <= APPROXIMATED[got.dtype.itemsize])))


def _bits(values: np.ndarray) -> np.ndarray:
    """Bits of values, all NaNs alike: which NaN an operation gives is not defined."""
    bits = values.view(f"u{values.dtype.itemsize}").copy()
    if values.dtype.itemsize > 1:
        bits[np.isnan(values.astype(np.float64))] = np.iinfo(bits.dtype).max
    return bits


def _calls() -> Iterator[Any]:
    """Each call of each kernel's tests, those of large tiles, which take the longest, first."""

    def work(config: Any) -> int:
        return getattr(config, "tile_m", 0) * getattr(config, "tile_n", 0)

    for config in sorted(KERNELS, key=work, reverse=True):
        for call in mutation.calls_of(config.name, unnamed=False):
            yield pytest.param(config.name, call, id=f"{config.name}-{call.name}")


@functools.cache
def device_kernels(kernel: str) -> tuple[DeviceKernel, ...]:
    """A kernel as we ship it and, where the driver can assemble its PTX, as the driver does."""
    assert isinstance(GPU, Driver)
    GPU.use()
    folder = kernel_objects.folder()
    with tempfile.TemporaryDirectory() as scratch:
        path = pathlib.Path(scratch)
        shipped = DeviceKernel(kernel, folder, path)
        try:
            return shipped, DeviceKernel(kernel, folder, path, mutation.text_of(kernel))
        except RuntimeError as error:
            if int(str(error).rpartition(" ")[2]) not in NO_ASSEMBLER:
                raise
    print(f"the driver (CUDA {GPU.version}) cannot assemble this PTX: shipped code alone")
    return (shipped,)


@pytest.mark.parametrize(("kernel", "call"), tuple(_calls()))
def test_machine_and_gpu_agree(kernel: str, call: mutation.Call) -> None:
    assert isinstance(GPU, Driver)
    kernels = device_kernels(kernel)
    comparison = Comparison(kernels)
    with mutation.Interception(kernel, comparison.run_object):
        call.run()
    print(
        f"{GPU.name}: {kernel}: {len(kernels)} codes, {comparison.launches} launches,"
        f" {comparison.values} values, {comparison.different} differ, by {comparison.worst} ulp"
    )
    if not comparison.launches:
        assert not call.name.startswith(LAUNCHING)
        pytest.skip("it looks at the kernel without running it")
    if "_gated_" in kernel:
        assert GPU.arch != "sm_90a" or comparison.beyond == 0
    elif GPU.arch == "sm_90a" or kernel.startswith("quantize"):
        assert comparison.different == 0


@pytest.mark.parametrize("kernel", [c.name for c in KERNELS])
def test_each_kernel_is_compared(kernel: str) -> None:
    names = [call.name for call in mutation.calls_of(kernel, unnamed=False)]
    assert any(name.startswith(LAUNCHING) for name in names)
