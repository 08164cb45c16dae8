# SPDX-License-Identifier: Apache-2.0
"""The ahead-of-time build: what it writes, when it compiles, and what is in the machine code."""

import dataclasses
import json
import pathlib
import re
import subprocess
import textwrap

import pytest

import kernel_objects
from jax_nvfp4 import config
from jax_nvfp4.config.quantize import quantize_configs
from jax_nvfp4.kernels import build, cubin

BLACKWELL = ("sm_100f", "sm_120f")

# A kernel of the quantize signature that does next to nothing.
TINY = """
import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.runtime import make_ptr
from jax_nvfp4.config import QuantizeConfig
from jax_nvfp4.kernels.variant import KernelVariant

@cute.kernel
def kernel(data: cute.Pointer):
    cute.make_tensor(data, cute.make_layout(1))[0] = cutlass.Uint8(VALUE)

@cute.jit
def host(x, scale_or_amax, data, block_scale, global_scale, scratch, m: Int32, k: Int32,
         x_dtype: Int32, scaling: Int32, LAST: Int32, num_sms: Int32, stream: cuda.CUstream):
    kernel(data).launch(grid=(1, 1, 1), block=(32, 1, 1), stream=stream)

def variants(arch):
    pointer = make_ptr(cutlass.Uint8, 1024, cute.AddressSpace.gmem, assumed_align=16)
    args = (pointer,) * 6 + (Int32(1),) * 6 + (cuda.CUstream(0),)
    found = []
    for name in NAMES:
        name = f"{name}_{arch}"
        c = QuantizeConfig(name, arch, "tiny", "float32", 32, 16)
        found.append(KernelVariant(name, "quantize", arch, c, host, args))
    return found
"""


class Tiny:
    """A kernel module outside the package and a folder that it is built into."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.out = path / "out"

    def build(
        self,
        *args: str,
        names: tuple[str, ...] = ("a", "b"),
        value: int = 1,
        last: str = "out_format",
    ) -> subprocess.CompletedProcess[str]:
        text = TINY.replace("NAMES", repr(names)).replace("VALUE", str(value))
        (self.path / "tiny_kernels.py").write_text(text.replace("LAST", last))
        return kernel_objects.run_build(
            *("--out", str(self.out), "--module", "tiny_kernels", "--arch", "sm_90a", *args),
            env={"PYTHONPATH": f"{self.path}:{kernel_objects.ROOT}"},
        )

    def names(self) -> list[str]:
        return [k["name"] for k in json.loads((self.out / "manifest.json").read_text())["kernels"]]


@pytest.fixture
def tiny(tmp_path: pathlib.Path) -> Tiny:
    return Tiny(tmp_path)


def test_unchanged_kernels_are_not_compiled_again(tiny: Tiny) -> None:
    first = tiny.build()
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("registers") == 2
    before = (tiny.out / "a_sm_90a.o").stat().st_mtime_ns
    assert "registers" not in tiny.build().stdout
    assert (tiny.out / "a_sm_90a.o").stat().st_mtime_ns == before
    assert tiny.build(value=2).stdout.count("registers") == 2
    assert (tiny.out / "a_sm_90a.o").stat().st_mtime_ns > before


def test_a_lost_object_is_compiled_again(tiny: Tiny) -> None:
    tiny.build()
    (tiny.out / "b_sm_90a.o").unlink()
    assert "b_sm_90a" in tiny.build().stdout
    assert (tiny.out / "b_sm_90a.o").exists()


def test_only_leaves_the_other_kernels_alone(tiny: Tiny) -> None:
    tiny.build()
    again = tiny.build("--only", "a_*", value=3)
    assert "a_sm_90a" in again.stdout and "b_sm_90a" not in again.stdout
    assert tiny.names() == ["a_sm_90a", "b_sm_90a"]


def test_kernels_of_another_arch_stay_and_those_that_are_gone_go(tiny: Tiny) -> None:
    tiny.build("--arch", "sm_90a,sm_120f")
    assert tiny.names() == ["a_sm_120f", "a_sm_90a", "b_sm_120f", "b_sm_90a"]
    tiny.build(names=("b",))
    assert tiny.names() == ["a_sm_120f", "b_sm_120f", "b_sm_90a"]
    assert not (tiny.out / "a_sm_90a.o").exists()


def test_a_kernel_that_strays_from_the_signature_is_refused(tiny: Tiny) -> None:
    result = tiny.build(last="format")
    assert result.returncode == 1
    assert "host function of op quantize has parameters" in result.stderr
    assert "failed: a_sm_90a, b_sm_90a" in result.stderr
    assert tiny.names() == []


def test_a_name_used_twice_is_refused(tiny: Tiny) -> None:
    result = tiny.build(names=("a", "a"))
    assert result.returncode == 1
    assert "more than one kernel named a_sm_90a" in result.stderr


def test_an_unknown_arch_is_refused(tmp_path: pathlib.Path) -> None:
    result = kernel_objects.run_build("--out", str(tmp_path), "--arch", "sm_90")
    assert result.returncode == 2
    assert "arch 'sm_90' is none of sm_90a" in result.stderr


def test_host_code_for_another_machine_carries_the_same_device_code(tiny: Tiny) -> None:
    cubins = {}
    for host, machine in (("x86_64", 62), ("aarch64", 183)):
        done = tiny.build("--host", host)
        assert done.returncode == 0, done.stderr
        image = (tiny.out / "a_sm_90a.o").read_bytes()
        assert int.from_bytes(image[18:20], "little") == machine
        cubins[host] = cubin.cubin_of_object(image)
        entries = json.loads((tiny.out / "manifest.json").read_text())["kernels"]
        assert {entry["host"] for entry in entries} == {host}
    assert cubins["x86_64"] == cubins["aarch64"]
    assert tiny.build("--host", "riscv64").returncode == 2


def test_the_folder_holds_what_linking_needs() -> None:
    folder = kernel_objects.folder()
    for library in build.RUNTIME_LIBRARIES:
        assert (folder / library).stat().st_size > 0
    for kernel in kernel_objects.manifest()["kernels"]:
        assert (folder / f"{kernel['name']}.o").exists()
        assert (folder / f"{kernel['name']}.h").exists()


# sm_103a has GEMMs alone, to choose beside those of its family.
BUILT = [
    (op, arch)
    for arch in build.DEFAULT_ARCHES
    for op in ("quantize", "gemm")
    if (op, arch) != ("quantize", "sm_103a")
]


@pytest.mark.parametrize(("op", "arch"), BUILT)
def test_every_config_is_compiled(op: str, arch: str) -> None:
    built = {k["name"]: k["config"] for k in kernel_objects.kernels(op, [arch])}
    expected = quantize_configs(arch) if op == "quantize" else config.configs(arch)
    assert built == {c.name: dataclasses.asdict(c) for c in expected}


@pytest.mark.parametrize(("op", "arch"), BUILT)
def test_no_kernel_spills(op: str, arch: str) -> None:
    for kernel in kernel_objects.kernels(op, [arch]):
        assert kernel["stack_bytes"] == 0, kernel["name"]
        assert kernel["local_bytes"] == 0, kernel["name"]
        local = re.findall(r"\b(?:LDL|STL)\b.*", kernel_objects.sass(kernel["name"]))
        assert not local, (kernel["name"], local[:3])


@pytest.mark.parametrize("op", ["quantize", "gemm"])
def test_resources_are_what_cuobjdump_says(op: str) -> None:
    folder = kernel_objects.folder()
    for kernel in kernel_objects.kernels(op, build.DEFAULT_ARCHES):
        path = folder / f"{kernel['name']}.cubin"
        text = subprocess.run(
            [kernel_objects.tool("cuobjdump"), "--dump-resource-usage", str(path)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        said = {
            symbol: tuple(map(int, figures))
            for symbol, *figures in re.findall(
                r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text
            )
        }
        read = {
            r.symbol: (r.registers, r.stack_bytes, r.shared_bytes, r.local_bytes)
            for r in cubin.resources(path.read_bytes())
        }
        assert read == said


# What the machine code must hold, by op, architectures and whether x is 16-bit. The names are those
# of nvdisasm: HGMMA is wgmma in bf16 or f16, UTCOMMA tcgen05.mma and OMMA.SF mma.sync with
# block-scaled FP4, HMMA mma.sync in bf16 or f16 (weight-only on Blackwell).
INSTRUCTIONS = [
    ("gemm", ("sm_90a",), True, r"\bHGMMA\."),
    ("gemm", ("sm_100f", "sm_103a"), False, r"\bUTCOMMA\."),
    ("gemm", ("sm_120f",), False, r"\bOMMA\.SF\."),
    ("gemm", BLACKWELL, True, r"\bHMMA\.16816\."),
    ("quantize", BLACKWELL, None, r"\bF2FP\.\S*E2M1"),
]


@pytest.mark.parametrize(("op", "arches", "wide_x", "pattern"), INSTRUCTIONS)
def test_the_instructions_counted_on_are_there(
    op: str, arches: tuple, wide_x: bool | None, pattern: str
) -> None:
    found = [
        kernel["name"]
        for kernel in kernel_objects.kernels(op, arches)
        if wide_x in (None, kernel["config"]["x_dtype"] != "e2m1")
    ]
    assert found
    for name in found:
        assert re.search(pattern, kernel_objects.sass(name)), name


def test_cubin_reader_refuses_what_is_not_one() -> None:
    with pytest.raises(ValueError, match="not a little-endian 64-bit ELF"):
        cubin.cubin_of_object(b"not an object file at all, but long enough to look at it as one")
    path = kernel_objects.folder() / f"{kernel_objects.manifest()['kernels'][0]['name']}.cubin"
    with pytest.raises(ValueError, match="for ELF machine 190, expected one of 62"):
        cubin.cubin_of_object(path.read_bytes())


def test_source_hash_follows_imports(tmp_path: pathlib.Path, monkeypatch) -> None:
    package = tmp_path / "hashed_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "top.py").write_text("from hashed_package import helper\n")
    (package / "helper.py").write_text("import hashed_package.data\n")
    (package / "data.py").write_text("X = 1\n")
    (package / "other.py").write_text("Y = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = build._module_digest("hashed_package.top")
    (package / "other.py").write_text("Y = 2\n")
    assert build._module_digest("hashed_package.top") == before
    (package / "data.py").write_text(textwrap.dedent("X = 2\n"))
    assert build._module_digest("hashed_package.top") != before
