# SPDX-License-Identifier: Apache-2.0
"""Runs the compiled host code of a kernel without a GPU, and records the launches it asks for.

An exported object calls nine functions of the CUDA runtime. Linked with the stand-ins below, its
host function runs as in the extension: it picks a kernel and computes the grid and the kernel's
parameters, and the launch ends in a callback that copies them. What the PTX machine then runs is
what a GPU would have been given.
"""

import ctypes
import dataclasses
import functools
import pathlib
import re
import subprocess
from collections.abc import Sequence

_STUB = r"""
#include <stdint.h>
#include <string.h>
typedef void (*Callback)(const char*, const void*, void**);
static Callback callback;
void set_callback(Callback c) { callback = c; }
int _cudaLibraryLoadData(void** library, const void* code, void* a, void* b, unsigned c, void* d,
                         void* e, unsigned f) { *library = (void*)code; return 0; }
int _cudaLibraryGetKernel(void** kernel, void* library, const char* name) {
  *kernel = strdup(name);
  return 0;
}
int _cudaKernelSetAttributeForDevice(void* k, int a, int v, int d) { return 0; }
int _cudaFuncSetAttribute(void* f, int a, int v) { return 0; }
int _cudaGetDevice(int* device) { *device = 0; return 0; }
int _cudaDeviceGetAttribute(int* value, int a, int d) { *value = 232448; return 0; }
int _cuKernelGetAttribute(int* value, int a, void* k, int d) { *value = 0; return 0; }
int _cudaLaunchKernelEx(const void* config, void* kernel, void** args) {
  callback(kernel, config, args);
  return 0;
}
"""
_CLUSTER, _COOPERATIVE = 4, 2  # cudaLaunchAttributeID
_CALLBACK = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
)


class _Config(ctypes.Structure):
    """cudaLaunchConfig_t."""

    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("dynamic_shared", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint32),
    ]


class _Attribute(ctypes.Structure):
    """cudaLaunchAttribute."""

    _fields_ = [("id", ctypes.c_int32), ("value", ctypes.c_int32 * 17)]


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel launch as the host code asks for it.

    Attributes:
        kernel: name of the entry in the PTX.
        grid: CTAs along x, y, z.
        block: threads along x, y, z.
        cluster: CTAs of a cluster along x, y, z.
        cooperative: all CTAs are to be resident.
        dynamic_shared: bytes of dynamic shared memory.
        params: bytes of each kernel parameter.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    cooperative: bool
    dynamic_shared: int
    params: tuple[bytes, ...]


@functools.cache
def param_sizes(ptx: str) -> dict[str, tuple[int, ...]]:
    """Bytes of the parameters of each entry of a PTX module."""
    widths = {"u8": 1, "b8": 1, "u16": 2, "u32": 4, "b32": 4, "f32": 4, "s32": 4, "u64": 8, "b64": 8}
    sizes = {}
    for name, declared in re.findall(r"\.entry (\S+?)\((.*?)\)", ptx, re.DOTALL):
        params = re.findall(r"\.param (?:\.align \d+ )?\.(\w+).*?(?:\[(\d+)\])?\s*(?:,|$)", declared)
        sizes[name] = tuple(widths[kind] * int(count or 1) for kind, count in params)
    return sizes


class Host:
    """The host code of one kernel.

    Args:
        entry: the kernel's manifest entry.
        folder: the folder with its object file and PTX.
        work: a folder to link in.
    """

    def __init__(self, entry: dict, folder: pathlib.Path, work: pathlib.Path) -> None:
        name = entry["name"]
        self.ptx = (folder / f"{name}.ptx").read_text()
        stub, library = work / "stub.c", work / f"{name}.so"
        stub.write_text(_STUB)
        command = ["gcc", "-O1", "-shared", "-fPIC", str(stub), str(folder / f"{name}.o")]
        subprocess.run([*command, "-o", str(library)], check=True)
        self._library = ctypes.CDLL(str(library))
        self._function = getattr(self._library, entry["entry"])
        module = ctypes.c_void_p()
        pointer, result, device = ctypes.pointer(module), ctypes.c_int(), ctypes.c_int()
        for symbol, arguments in (("init", [pointer]), ("load_to_device", [pointer, device])):
            load = getattr(self._library, f"_mlir_{name}_cuda_{symbol}")
            _pass(load, [ctypes.pointer(arguments[0]), *arguments[1:], result])
            assert result.value == 0

    def launches(self, pointers: Sequence[int], integers: Sequence[int]) -> list[Launch]:
        """Calls the host function; the launches it makes, in order."""
        found = []

        def record(kernel: bytes, config: int, args) -> None:
            launch = _Config.from_address(config)
            cluster, cooperative = (1, 1, 1), False
            for i in range(launch.attribute_count):
                attribute = _Attribute.from_address(
                    launch.attributes + i * ctypes.sizeof(_Attribute)
                )
                if attribute.id == _CLUSTER:
                    cluster = tuple(attribute.value[1:4])
                elif attribute.id == _COOPERATIVE:
                    cooperative = bool(attribute.value[1])
            sizes = param_sizes(self.ptx)[kernel.decode()]
            found.append(
                Launch(
                    kernel=kernel.decode(),
                    grid=tuple(launch.grid),
                    block=tuple(launch.block),
                    cluster=cluster,
                    cooperative=cooperative,
                    dynamic_shared=launch.dynamic_shared,
                    params=tuple(ctypes.string_at(args[i], size) for i, size in enumerate(sizes)),
                )
            )

        callback = _CALLBACK(record)
        self._library.set_callback(callback)
        result = ctypes.c_int32(-1)
        values = [
            *(ctypes.c_void_p(p) for p in pointers),
            *(ctypes.c_int32(i) for i in integers),
            ctypes.c_void_p(0),  # the stream
            result,
        ]
        packed = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        self._function(packed, ctypes.c_int32(len(values)))
        assert result.value == 0, f"host function returned {result.value}"
        return found


def _pass(function, arguments) -> None:
    """Calls a function that takes an array of pointers to its arguments."""
    packed = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
    function(packed)
