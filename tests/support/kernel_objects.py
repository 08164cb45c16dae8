# SPDX-License-Identifier: Apache-2.0
"""The compiled kernels and the extension, for the tests: built once, then only what changed."""

import contextlib
import fcntl
import functools
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import types
import unittest.mock
from collections.abc import Iterator, Sequence
from types import ModuleType

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = pathlib.Path(os.environ.get("JAX_NVFP4_KERNELS_DIR", ROOT / "kernel_objects"))


@contextlib.contextmanager
def _lock(name: str) -> Iterator[None]:
    """Keeps test processes from building the same folder at once."""
    (ROOT / "build").mkdir(exist_ok=True)
    with open(ROOT / "build" / f"{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _skip(reason: str) -> None:
    """Skips the test, or the module that is being collected: this machine lacks what it needs.

    It fails in CI, which installs all of it (`JAX_NVFP4_REQUIRE_TOOLS=1`).
    """
    if os.environ.get("JAX_NVFP4_REQUIRE_TOOLS", "0") != "0":
        pytest.fail(reason)
    pytest.skip(reason, allow_module_level=True)


def run_build(*args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the kernel build's command line."""
    if importlib.util.find_spec("cutlass") is None:
        _skip("nvidia-cutlass-dsl, which compiles the kernels, is not installed")
    command = [sys.executable, "-m", "jax_nvfp4.kernels.build", *args]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | (env or {})
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@functools.cache
def folder() -> pathlib.Path:
    """The folder with every kernel's object, cubin and PTX, up to date.

    Where the compiler is not installed, the folder has to be complete and up to date already.
    """
    if importlib.util.find_spec("cutlass") is None and FOLDER.exists():
        _assert_up_to_date()
        return FOLDER
    with _lock("kernels"):
        result = run_build("--out", str(FOLDER), "--keep-ptx", "--jobs", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    return FOLDER


def _assert_up_to_date() -> None:
    """Each kernel of the manifest is there, with its PTX, and its sources have not changed."""
    from jax_nvfp4.config import configs
    from jax_nvfp4.config.quantize import QUANTIZE_CONFIGS
    from jax_nvfp4.kernels import build

    known = {c.name: c for c in (*QUANTIZE_CONFIGS, *(c for a in build.ARCHES for c in configs(a)))}
    digests = [build._module_digest(module) for module in build.MODULES]
    entries = build.read_manifest(FOLDER)["kernels"]
    assert entries, f"nvidia-cutlass-dsl is not installed, and {FOLDER} has no kernels"
    for entry in entries:
        name, version = entry["name"], entry["dsl_version"]
        missing = [s for s in (".o", ".h", ".ptx") if not (FOLDER / (name + s)).exists()]
        assert not missing, f"{FOLDER}: kernel {name} has no {', '.join(missing)}"
        variant = types.SimpleNamespace(
            name=name, op=entry["op"], arch=entry["arch"], config=known.get(name)
        )
        with unittest.mock.patch.object(build, "_dsl_version", lambda version=version: version):
            current = {build._source_hash(variant, digest, entry["host"]) for digest in digests}
        assert entry["source_hash"] in current, (
            f"{FOLDER}: the sources of {name} have changed since, and nvidia-cutlass-dsl, which"
            " would compile them, is not installed"
        )


@functools.cache
def manifest() -> dict:
    """The manifest of `folder()`."""
    return json.loads((folder() / "manifest.json").read_text())


def kernels(op: str, arches: Sequence[str]) -> list[dict]:
    """Manifest entries of an op on some architectures; never none."""
    found = [k for k in manifest()["kernels"] if k["op"] == op and k["arch"] in arches]
    assert found, f"no {op} kernels for {arches}"
    return found


def tool(name: str) -> str:
    """The path of a CUDA binary tool: its wheel's, or the one on the PATH."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files(f"nvidia-cuda-{name}") or []:
            if file.name == name and file.parent.name == "bin":
                return str(file.locate())
    found = shutil.which(name)
    if found is None:
        _skip(f"{name} is not installed: pip install nvidia-cuda-{name}")
    return str(found)


def cmake(*args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs CMake, with Ninja and this Python."""
    # The wheels' programs, where the environment is not activated, and then the system's.
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    program, ninja = shutil.which("cmake", path=path), shutil.which("ninja", path=path)
    if program is None or ninja is None:
        _skip("cmake or ninja is not installed: pip install cmake ninja")
    compilers = (os.environ.get("CXX", "c++"), "g++", "clang++")
    if not any(map(shutil.which, compilers)):
        _skip("there is no C++ compiler")
    command = [str(program), *args]
    if args[0] == "-S":
        command += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        command += [f"-DPython_EXECUTABLE={sys.executable}"]
    return subprocess.run(command, env=os.environ | (env or {}), capture_output=True, text=True)


@functools.cache
def sass(name: str) -> str:
    """The disassembly of a kernel's cubin."""
    command = [tool("nvdisasm"), "-c", str(folder() / f"{name}.cubin")]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@functools.cache
def extension_path() -> pathlib.Path:
    """The extension module: the installed one, or one linked here from `folder()`."""
    installed = importlib.util.find_spec("jax_nvfp4._ffi")
    if installed is not None and installed.origin is not None:
        return pathlib.Path(installed.origin)
    binary = ROOT / "build" / f"test-ffi-{sys.implementation.cache_tag}"
    options = [f"-DJAX_NVFP4_KERNELS_DIR={folder()}", "-DJAX_NVFP4_REQUIRE_EXTENSION=ON"]
    with _lock("extension"):
        for args in (
            ("-S", str(ROOT), "-B", str(binary), *options),
            ("--build", str(binary), "--parallel", "2"),
        ):
            result = cmake(*args)
            assert result.returncode == 0, result.stdout + result.stderr
    (path,) = binary.glob("_ffi*.so")
    return path


@functools.cache
def custom_calls() -> ModuleType:
    """`jax_nvfp4.custom_calls` with the extension: the installed one, or one built here."""
    from jax_nvfp4 import custom_calls as installed

    if installed.arches():
        return installed
    extension = _load("jax_nvfp4._ffi", extension_path())
    sys.modules["jax_nvfp4._ffi"] = extension
    try:
        return _load("custom_calls_with_extension", pathlib.Path(installed.__file__))
    finally:
        del sys.modules["jax_nvfp4._ffi"]


def _load(name: str, path: pathlib.Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
