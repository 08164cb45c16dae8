# SPDX-License-Identifier: Apache-2.0
"""Runs a kernel's real host code: records its launches and replays them on the machine.

``export_to_c`` of the CuTe DSL writes NAME.o, an x86-64 stub that computes the grid, encodes the
tensor maps and launches, and NAME.h, which declares it. The stub calls a few functions of the CUDA
runtime, and the driver's ``cuTensorMapEncodeTiled`` where the program does not encode its tensor
maps itself. Here a small C library defines them so that a launch calls back into Python instead.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from . import descriptor
from .errors import PtxError
from .machine import Machine, Pointer, launch, load_program
from .memory import GlobalMemory
from .tensormap import ELEMENT_TYPES, TensorMap

_SHIM = r"""
#include <stdint.h>
typedef int (*launch_hook)(const void *config, const void *kernel, void **args);
typedef int (*encode_hook)(void *map, int type, uint32_t rank, uint64_t address,
                           const uint64_t *dims, const uint64_t *strides, const uint32_t *box,
                           const uint32_t *steps, int interleave, int swizzle, int fill);
static launch_hook hook;
static encode_hook encode;
static char names[256][1024];
static int name_count;
static int sm_count = 132;
void ptx_machine_set(launch_hook h, encode_hook e, int sms) {
  hook = h;
  encode = e;
  sm_count = sms;
}
const char *ptx_machine_kernel_name(const void *kernel) { return (const char *)kernel; }

int _cudaGetDevice(int *device) { *device = 0; return 0; }
int _cudaDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  *value = attribute == 16 ? sm_count : attribute == 97 ? 232448 : attribute == 75 ? 9 : 0;
  return 0;
}
int _cudaFuncSetAttribute(const void *f, int a, int v) { (void)f; (void)a; (void)v; return 0; }
int _cudaKernelSetAttributeForDevice(const void *k, int a, int v, int d) {
  (void)k; (void)a; (void)v; (void)d;
  return 0;
}
int _cuKernelGetAttribute(int *value, int a, const void *k, int d) {
  (void)a; (void)k; (void)d;
  *value = 0;
  return 0;
}
int _cudaLibraryLoadData(void **library, const void *code) {
  *library = (void *)code;
  return 0;
}
int _cudaLibraryGetKernel(void **kernel, void *library, const char *name) {
  (void)library;
  int i = 0;
  char *slot = names[name_count++ & 255];
  for (; name[i] && i < 1023; ++i) slot[i] = name[i];
  slot[i] = 0;
  *kernel = slot;
  return 0;
}
int _cudaLaunchKernelEx(const void *config, const void *kernel, void **args) {
  return hook(config, kernel, args);
}
int _cuTensorMapEncodeTiled(void *map, int type, uint32_t rank, void *address,
                            const uint64_t *dims, const uint64_t *strides, const uint32_t *box,
                            const uint32_t *steps, int interleave, int swizzle, int promotion,
                            int fill) {
  (void)promotion;
  return encode(map, type, rank, (uint64_t)address, dims, strides, box, steps, interleave, swizzle,
                fill);
}
/* What failed is raised in Python once the stub returns. */
void cuda_dialect_assert_success(int result) { (void)result; }
"""


class _Config(ctypes.Structure):
    """cudaLaunchConfig_t."""

    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("dynamic_smem", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("count", ctypes.c_uint32),
    ]


ATTRIBUTE_BYTES, CLUSTER_DIMENSION, PROGRAMMATIC_SERIALIZATION = 72, 4, 6
_HOOK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(_Config), ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
)
_LONGS, _INTS = ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(ctypes.c_uint32)
_ENCODE = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.c_uint64,
    _LONGS, _LONGS, _INTS, _INTS, ctypes.c_int, ctypes.c_int, ctypes.c_int,
)  # fmt: skip
# CUtensorMapSwizzle
_SWIZZLES = ("none", "32B", "64B", "128B", "128B_ATOM_32B", "128B_ATOM_32B_FLIP_8B",
             "128B_ATOM_64B")  # fmt: skip


def encode_tiled(map_, type_, rank, address, dims, strides, box, steps, interleave, swizzle, fill):
    """``cuTensorMapEncodeTiled``; raises ValueError for what it would refuse."""
    names = {code: name for name, (_, code) in ELEMENT_TYPES.items()}
    tensor = TensorMap(
        array=None,
        dims=tuple(dims[:rank]),
        strides=tuple(strides[: rank - 1]),
        box=tuple(box[:rank]),
        element_strides=tuple(steps[:rank]),
        element_type=names.get(type_, f"code {type_}"),
        swizzle=_SWIZZLES[swizzle],
        fill="nan" if fill else "zero",
        interleave="none" if interleave == 0 else f"code {interleave}",
        address=address,
    )
    if address % (32 if tensor.element_type in ("16u4_align16b", "16u6_align16b") else 16):
        raise ValueError(f"tensor map: unaligned address {address:#x}")
    ctypes.memmove(map_, descriptor.encode(tensor), 128)


@dataclass
class RecordedLaunch:
    """One launch that the host code asked for.

    Attributes:
        kernel: entry name.
        grid, block, cluster: extents in x, y, z.
        dynamic_smem: bytes.
        params: the raw bytes of each kernel parameter.
        attributes: the launch attributes by id, 64 raw bytes each.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    dynamic_smem: int
    params: list[bytes]
    attributes: dict[int, bytes] = field(default_factory=dict)

    @property
    def overlaps(self) -> bool:
        """Whether it may start before the launch before is complete."""
        return any(self.attributes.get(PROGRAMMATIC_SERIALIZATION, b"")[:4])


class HostObject:
    """A kernel's host stub, linked with the recording shim and loaded."""

    def __init__(self, object_path: str | Path, ptx_text: str) -> None:
        self.path = Path(object_path)
        self.ptx_text = ptx_text
        header = self.path.with_suffix(".h").read_text()
        match = re.search(r"cute_dsl_(\w+)_wrapper\(\s*\w+\s*\*module\s*,([^)]*)\)", header)
        entry = re.search(r"void\s+(_mlir_\w+)\(void \*\*args, int32_t num_args\);", header)
        if not match or not entry:
            raise PtxError(f"{self.path.with_suffix('.h')}: no wrapper found")
        self.name = match[1]
        self.arguments = [_argument_type(a) for a in match[2].split(",") if a.strip()]
        self.library = _load(self.path)
        self.entry = getattr(self.library, entry[1])
        self.name_of = self.library.ptx_machine_kernel_name
        self.name_of.restype = ctypes.c_char_p
        self.name_of.argtypes = [ctypes.c_void_p]
        self._load_module()

    def _load_module(self) -> None:
        self.module = ctypes.c_void_p()
        pointer = ctypes.pointer(self.module)
        result = ctypes.c_int32(0)

        def call(name: str, *values: object) -> None:
            array = (ctypes.c_void_p * len(values))(*[ctypes.addressof(v) for v in values])
            getattr(self.library, name)(array)
            if result.value:
                raise PtxError(f"{name} returned {result.value}")

        call(f"_mlir_{self.name}_cuda_init", pointer, result)
        device = ctypes.c_int32(0)
        call(f"_mlir_{self.name}_cuda_load_to_device", pointer, device, result)

    def record(
        self, args: Sequence, memory: GlobalMemory, num_sms: int = 132
    ) -> list[RecordedLaunch]:
        """Calls the host function and returns what it would have launched.

        Args:
            args: one value per argument of the wrapper, without the module; a trailing stream may
                be left out. Arrays and ``Pointer`` become device addresses in ``memory``; None is
                a null pointer.
            memory: where the arrays are registered.
            num_sms: what the runtime reports as the number of SMs.
        """
        values = list(args)
        if len(values) == len(self.arguments) - 1:
            values.append(None)
        if len(values) != len(self.arguments):
            raise ValueError(f"{self.name} takes {len(self.arguments)} arguments, got {len(args)}")
        boxes = []
        for i, (kind, value) in enumerate(zip(self.arguments, values, strict=True)):
            if isinstance(value, np.ndarray | Pointer):
                array = value.array if isinstance(value, Pointer) else value
                shift = value.offset if isinstance(value, Pointer) else 0
                value = memory.register(array, f"array of argument {i}").base + shift
            boxes.append(kind(0 if value is None else value))
        launches: list[RecordedLaunch] = []
        failure: list[Exception] = []

        def hook(config, kernel, params) -> int:
            try:
                launches.append(self._recorded(config.contents, kernel, params))
            except Exception as error:  # an exception must not cross the C frame
                failure.append(error)
                return 1
            return 0

        def encode(*fields) -> int:
            try:
                encode_tiled(*fields)
            except Exception as error:
                failure.append(error)
                return 1
            return 0

        callbacks = _HOOK(hook), _ENCODE(encode)
        self.library.ptx_machine_set(*callbacks, num_sms)
        result = ctypes.c_int32(0)
        slots = [ctypes.addressof(b) for b in boxes] + [ctypes.addressof(result)]
        self.entry((ctypes.c_void_p * len(slots))(*slots), len(slots))
        if failure:
            raise failure[0]
        if result.value:
            raise PtxError(f"{self.name} returned {result.value}")
        return launches

    def _recorded(self, config: _Config, kernel: int, params) -> RecordedLaunch:
        name = self.name_of(kernel).decode()
        _, program, _ = load_program(self.ptx_text, name)
        raw = [
            ctypes.string_at(params[i], variable.size)
            for i, variable in enumerate(program.function.params)
        ]
        attributes = {}
        cluster = (1, 1, 1)
        for i in range(config.count):
            data = ctypes.string_at(config.attributes + i * ATTRIBUTE_BYTES, ATTRIBUTE_BYTES)
            identity = int.from_bytes(data[:4], "little")
            attributes[identity] = data[8:]
            if identity == CLUSTER_DIMENSION:
                x, y, z = (int(v) for v in np.frombuffer(data[8:20], np.uint32))
                cluster = (max(x, 1), max(y, 1), max(z, 1))
        return RecordedLaunch(
            name, tuple(config.grid), tuple(config.block), cluster, config.dynamic_smem, raw,
            attributes,
        )  # fmt: skip


def _argument_type(declaration: str) -> type:
    text = declaration.strip()
    if "*" in text or "Stream" in text:
        return ctypes.c_void_p
    types = {
        "int8_t": ctypes.c_int8, "int16_t": ctypes.c_int16, "int32_t": ctypes.c_int32,
        "int64_t": ctypes.c_int64, "uint8_t": ctypes.c_uint8, "uint16_t": ctypes.c_uint16,
        "uint32_t": ctypes.c_uint32, "uint64_t": ctypes.c_uint64, "float": ctypes.c_float,
        "double": ctypes.c_double, "bool": ctypes.c_bool,
    }  # fmt: skip
    name = text.split()[-2] if len(text.split()) > 1 else text
    if name not in types:
        raise PtxError(f"argument {text!r}: unknown type")
    return types[name]


_LIBRARIES: dict[str, ctypes.CDLL] = {}
_FOLDER: list[tempfile.TemporaryDirectory] = []


def _load(path: Path) -> ctypes.CDLL:
    key = hashlib.sha256(path.read_bytes()).hexdigest()
    if key in _LIBRARIES:
        return _LIBRARIES[key]
    if not _FOLDER:
        _FOLDER.append(tempfile.TemporaryDirectory(prefix="ptx_machine_"))
    folder = Path(_FOLDER[0].name)
    source = folder / "shim.c"
    shim = folder / "shim.o"
    if not shim.exists():
        source.write_text(_SHIM)
        subprocess.run(["gcc", "-O1", "-fPIC", "-c", source, "-o", shim], check=True)
    library = folder / f"{key[:16]}.so"
    # Bsymbolic: the CuTe DSL, if loaded in this process, exports functions of the same names.
    subprocess.run(["gcc", "-shared", "-Wl,-Bsymbolic", "-o", library, path, shim], check=True)
    _LIBRARIES[key] = ctypes.CDLL(str(library))
    return _LIBRARIES[key]


def record_launches(
    object_path: str | Path,
    ptx_text: str,
    args: Sequence,
    memory: GlobalMemory,
    num_sms: int = 132,
) -> list[RecordedLaunch]:
    """What the host code of an exported kernel launches for these arguments."""
    return HostObject(object_path, ptx_text).record(args, memory, num_sms)


def run_object(
    object_path: str | Path,
    ptx_text: str,
    args: Sequence,
    *,
    arrays: Sequence[np.ndarray] = (),
    uninitialized: Sequence[np.ndarray] = (),
    schedule_seed: int = 0,
    num_sms: int = 132,
    resident_clusters: int = 160,
    strict_exit: bool = True,
    races: bool = True,
    coverage: set[int] | None = None,
    previous: Sequence[np.ndarray] = (),
    tensor_fences: bool | None = None,
    scopes: bool = True,
) -> list[Machine]:
    """Runs an exported kernel: its host code on this machine, its PTX on the PTX machine.

    Args:
        object_path: NAME.o; NAME.h is expected next to it.
        ptx_text: PTX of the same compilation.
        args: arguments of ``cute_dsl_NAME_wrapper`` without the module; a trailing stream may be
            left out. NumPy arrays are device memory, written in place.
        arrays: further arrays that kernel arguments may point to by address.
        uninitialized: arrays whose bytes count as unwritten: reading before writing is an error.
        schedule_seed: order in which warps and asynchronous operations progress.
        num_sms: what the host code sees as the number of SMs.
        resident_clusters: how many clusters run at a time.
        strict_exit: as for ``launch``.
        races: as for ``launch``.
        coverage: as for ``launch``.
        previous: as for ``launch``, for the first launch; a later one that may overlap the one
            before it (programmatic stream serialization) gets the arrays which that one wrote.
        tensor_fences: as for ``launch``.
        scopes: as for ``launch``.

    Returns:
        One machine per launch, in order.
    """
    memory = GlobalMemory()
    for i, array in enumerate(uninitialized):
        memory.register(array, f"uninitialized array {i}", uninitialized=True)
    for i, array in enumerate(arrays):
        memory.register(array, f"array {i}")
    machines = []
    for recorded in record_launches(object_path, ptx_text, args, memory, num_sms):
        if machines:
            previous = machines[-1].written_arrays() if recorded.overlaps else []
        machines.append(
            launch(
                ptx_text,
                kernel=recorded.kernel,
                grid=recorded.grid,
                block=recorded.block,
                cluster=recorded.cluster,
                dynamic_smem=recorded.dynamic_smem,
                params=recorded.params,
                schedule_seed=schedule_seed,
                memory=memory,
                resident_clusters=resident_clusters,
                strict_exit=strict_exit,
                races=races,
                coverage=coverage,
                previous=previous,
                tensor_fences=tensor_fences,
                scopes=scopes,
            )
        )
    return machines
