# SPDX-License-Identifier: Apache-2.0
"""What a compiled kernel needs of the GPU, read from its ELF: no CUDA tool is run.

The object file that CuTeDSL exports holds the cubin, itself an ELF file, in its read-only data.
The cubin's `.nv.info` section lists, for each kernel, registers and stack frame as records of
(format byte, attribute byte, payload); `cuobjdump --dump-resource-usage` prints the same figures.
"""

import dataclasses
import struct
from collections.abc import Iterator

_ELF_MAGIC = b"\x7fELF"
_EM_HOSTS = {62: "x86-64", 183: "aarch64"}
_EM_CUDA = 190
_SHT_SYMTAB = 2
_SHT_NOBITS = 8

# Record formats of .nv.info: the payload is in the 2 bytes after the attribute, or, for SVAL, in
# as many bytes after those two as they say.
_EIFMT_SVAL = 4
_EIATTR_FRAME_SIZE = 0x11
_EIATTR_REGCOUNT = 0x2F


@dataclasses.dataclass(frozen=True)
class KernelResources:
    """Resources of one device kernel.

    Attributes:
        symbol: the kernel's name in the cubin.
        registers: registers of a thread.
        shared_bytes: statically allocated shared memory of a CTA, in bytes (what the launch asks
            for dynamically is not in the cubin).
        stack_bytes: stack frame of a thread, in bytes of local memory; spills live here.
        local_bytes: local memory of a thread outside the frame, in bytes.
        code_bytes: size of the machine code.
    """

    symbol: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    local_bytes: int
    code_bytes: int


@dataclasses.dataclass(frozen=True)
class _Section:
    name: str
    kind: int
    offset: int
    size: int
    link: int


class _Elf:
    """The few tables of a little-endian 64-bit ELF file that are needed here."""

    def __init__(self, image: bytes) -> None:
        if image[:6] != _ELF_MAGIC + b"\x02\x01":
            raise ValueError("not a little-endian 64-bit ELF file")
        self.image = image
        (self.machine,) = struct.unpack_from("<H", image, 18)
        segments, table = struct.unpack_from("<QQ", image, 32)
        segment_size, segment_count, entry_size, count, names_index = struct.unpack_from(
            "<HHHHH", image, 54
        )
        raw = [struct.unpack_from("<IIQQQQII", image, table + i * entry_size) for i in range(count)]
        names = raw[names_index]
        self.sections = [
            _Section(self._string(names[4] + r[0]), r[1], r[4], r[5], r[6]) for r in raw
        ]
        # The end of the file: the last byte of a table or of a section with contents.
        self.size = max(
            [table + entry_size * count, segments + segment_size * segment_count]
            + [s.offset + s.size for s in self.sections if s.kind != _SHT_NOBITS]
        )

    def _string(self, offset: int) -> str:
        return self.image[offset : self.image.index(b"\0", offset)].decode()

    def bytes_of(self, section: _Section) -> bytes:
        return self.image[section.offset : section.offset + section.size]

    def symbols(self) -> list[str]:
        """Names of the symbol table, by index."""
        table = next(s for s in self.sections if s.kind == _SHT_SYMTAB)
        strings = self.sections[table.link].offset
        return [
            self._string(strings + struct.unpack_from("<I", self.image, at)[0])
            for at in range(table.offset, table.offset + table.size, 24)
        ]


def cubin_of_object(object_file: bytes) -> bytes:
    """The cubin that a host object file exported by CuTeDSL carries.

    Args:
        object_file: contents of the `.o`.

    Raises:
        ValueError: not an ELF object for a known host, or it does not hold exactly one cubin.
    """
    host = _Elf(object_file)
    if host.machine not in _EM_HOSTS:
        known = ", ".join(f"{number} ({name})" for number, name in _EM_HOSTS.items())
        raise ValueError(f"host object is for ELF machine {host.machine}, expected one of {known}")
    found = []
    for section in host.sections:
        contents = b"" if section.kind == _SHT_NOBITS else host.bytes_of(section)
        start = contents.find(_ELF_MAGIC)
        while start >= 0:
            (machine,) = struct.unpack_from("<H", contents, start + 18)
            if machine == _EM_CUDA:
                cubin = contents[start:]
                found.append(cubin[: _Elf(cubin).size])
            start = contents.find(_ELF_MAGIC, start + 1)
    if len(found) != 1:
        raise ValueError(f"expected one cubin in the host object, found {len(found)}")
    return found[0]


def _info_records(info: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(info):
        form, attribute, value = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == _EIFMT_SVAL:
            yield attribute, info[at : at + value]
            at += value


def resources(cubin: bytes) -> tuple[KernelResources, ...]:
    """Resources of each kernel of a cubin, in the order of the file.

    Args:
        cubin: contents of the cubin.

    Raises:
        ValueError: not a cubin, or a kernel without its register count.
    """
    elf = _Elf(cubin)
    if elf.machine != _EM_CUDA:
        raise ValueError(f"cubin is for ELF machine {elf.machine}, expected {_EM_CUDA}")
    symbols = elf.symbols()
    sections = {s.name: s for s in elf.sections}
    per_kernel: dict[int, dict[str, int]] = {_EIATTR_REGCOUNT: {}, _EIATTR_FRAME_SIZE: {}}
    for attribute, payload in _info_records(elf.bytes_of(sections[".nv.info"])):
        if attribute in per_kernel:
            symbol, value = struct.unpack("<II", payload)
            per_kernel[attribute][symbols[symbol]] = value

    def size(name: str) -> int:
        return sections[name].size if name in sections else 0

    found = []
    for section in elf.sections:
        prefix, _, symbol = section.name.partition(".text.")
        if prefix or not symbol:
            continue
        if symbol not in per_kernel[_EIATTR_REGCOUNT]:
            raise ValueError(f"cubin does not say how many registers {symbol} takes")
        found.append(
            KernelResources(
                symbol=symbol,
                registers=per_kernel[_EIATTR_REGCOUNT][symbol],
                shared_bytes=size(f".nv.shared.{symbol}"),
                stack_bytes=per_kernel[_EIATTR_FRAME_SIZE].get(symbol, 0),
                local_bytes=size(f".nv.local.{symbol}"),
                code_bytes=section.size,
            )
        )
    return tuple(found)
