# SPDX-License-Identifier: Apache-2.0
"""Compiles the CuTeDSL kernels ahead of time: no GPU and no CUDA toolkit.

    python -m jax_nvfp4.kernels.build --arch sm_90a,sm_100f,sm_103a,sm_120f --out DIR

writes, for each kernel, `NAME.o` (host launch code with the cubin inside) and `NAME.h`, the
`manifest.json` that describes them all, and copies of the static libraries that linking them needs.
A kernel whose sources, config and compiler are unchanged is not compiled again.
"""

import argparse
import ast
import dataclasses
import fnmatch
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from typing import Any

from jax_nvfp4.config import ARCHES
from jax_nvfp4.integers import ceil_div
from jax_nvfp4.kernels import cubin
from jax_nvfp4.kernels.variant import ABI, KernelVariant

DEFAULT_ARCHES = ("sm_90a", "sm_100f", "sm_103a", "sm_120f")
MODULES = tuple(
    f"jax_nvfp4.kernels.{module}"
    for module in (
        "quantize.kernel",
        "gemm.sm90.kernel",
        "gemm.sm100.kernel",
        "gemm.sm120.kernel",
        "gemm.weight_only",
    )
)
MANIFEST = "manifest.json"
# What linking the objects needs, and the packages that carry it.
RUNTIME_LIBRARIES = {
    "libcuda_dialect_runtime_static.a": (
        "nvidia-cutlass-dsl-libs-cu12",
        "nvidia-cutlass-dsl-libs-base",
    ),
    "libcudart_static.a": ("nvidia-cuda-runtime-cu12",),
}
# Raised when the contents of an entry, or how a kernel is compiled, change.
FORMAT = 4

# The oldest CPU that host code is compiled for, by machine. Without one it would be the one that
# builds, and older ones would stop with SIGILL.
HOSTS = {"x86_64": "x86-64-v2", "aarch64": "generic"}

# More would each import CuTeDSL to compile a kernel or two.
_MOST_JOBS = 12


def _dsl_version() -> str:
    return importlib.metadata.version("nvidia-cutlass-dsl")


def _imported_sources(module: str, seen: dict[str, bytes]) -> None:
    """Adds the source of `module` and of all it imports of its own package to `seen`."""
    if module in seen:
        return
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return
    source = pathlib.Path(spec.origin).read_bytes()
    seen[module] = source
    package = module.partition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # `from a import b`: b may be a module or a name in a.
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            if name.partition(".")[0] == package != name and _is_module(name):
                _imported_sources(name, seen)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the parent is a module, not a package: `name` is a name in it
        return False


def _compile_options(host: str) -> str:
    return f"--host-target 'llvm -mtriple={host}-unknown-linux-gnu -mcpu={HOSTS[host]}'"


def _module_digest(module: str) -> str:
    sources: dict[str, bytes] = {}
    _imported_sources(module, sources)
    digest = hashlib.sha256()
    for name in sorted(sources):
        digest.update(name.encode() + b"\0" + sources[name] + b"\0")
    return digest.hexdigest()


def _source_hash(variant: KernelVariant, module_digest: str, host: str) -> str:
    """Hash of all that decides what a kernel's object file holds."""
    parts = (
        FORMAT,
        _dsl_version(),
        _compile_options(host),
        module_digest,
        variant.name,
        variant.op,
        variant.arch,
        repr(variant.config),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _entry_symbol(variant: KernelVariant, header: str) -> str:
    """Checks the exported header against the op's signature; returns the host entry's symbol."""
    wrapper = re.search(
        rf"cute_dsl_{variant.name}_wrapper\({variant.name}_Kernel_Module_t \*module, (.*?)\) {{",
        header,
    )
    entry = re.search(rf"void (_mlir_{variant.name}__mlir_ciface_\w+)\(void \*\*args", header)
    if wrapper is None or entry is None:
        raise RuntimeError(f"kernel {variant.name}: unknown form of the exported header")
    expected = ", ".join(c_type + name for c_type, name in ABI[variant.op])
    if wrapper[1] != expected:
        raise TypeError(
            f"kernel {variant.name}: host function of op {variant.op} has parameters\n"
            f"  {wrapper[1]}\nexpected\n  {expected}"
        )
    return entry[1]


def _compile(
    variant: KernelVariant, host: str, source_hash: str, out: pathlib.Path, keep: bool
) -> dict:
    """Compiles one kernel into `out`; returns its manifest entry."""
    import cutlass.cute as cute

    started = time.perf_counter()
    compiled = cute.compile(variant.host, *variant.args, options=_compile_options(host))
    compiled.export_to_c(str(out), variant.name, variant.name)
    image = cubin.cubin_of_object((out / f"{variant.name}.o").read_bytes())
    if keep:
        (out / f"{variant.name}.ptx").write_text(compiled.__ptx__)
        (out / f"{variant.name}.cubin").write_bytes(image)
    kernels = cubin.resources(image)
    return {
        "name": variant.name,
        "op": variant.op,
        "arch": variant.arch,
        "host": host,
        "config": dataclasses.asdict(variant.config),
        "entry": _entry_symbol(variant, (out / f"{variant.name}.h").read_text()),
        "registers": max(k.registers for k in kernels),
        "shared_bytes": max(k.shared_bytes for k in kernels),
        "stack_bytes": max(k.stack_bytes for k in kernels),
        "local_bytes": max(k.local_bytes for k in kernels),
        "launch": dataclasses.asdict(variant.launch) if variant.launch else None,
        "kernels": [dataclasses.asdict(k) for k in kernels],
        "dsl_version": _dsl_version(),
        "source_hash": source_hash,
        "compile_seconds": round(time.perf_counter() - started, 2),
    }


def collect(arch: str, modules: Sequence[str] = MODULES) -> list[tuple[str, KernelVariant]]:
    """The kernels of `arch`, each with the module it comes from.

    Raises:
        ValueError: two kernels of one name, or a module that returns another arch's kernel.
    """
    found: list[tuple[str, KernelVariant]] = []
    for module in modules:
        for variant in importlib.import_module(module).variants(arch):
            if variant.arch != arch:
                raise ValueError(
                    f"{module}: kernel {variant.name} is for {variant.arch}, asked for {arch}"
                )
            found.append((module, variant))
    names = [variant.name for _, variant in found]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"{arch}: more than one kernel named {', '.join(twice)}")
    return found


def _selected(name: str, only: Sequence[str]) -> bool:
    return not only or any(fnmatch.fnmatchcase(name, pattern) for pattern in only)


def _unchanged(old: dict | None, source_hash: str, out: pathlib.Path, keep: bool) -> bool:
    if old is None or old["source_hash"] != source_hash:
        return False
    suffixes = (".o", ".h", ".ptx", ".cubin") if keep else (".o", ".h")
    return all((out / f"{old['name']}{suffix}").exists() for suffix in suffixes)


def _work(args: argparse.Namespace) -> int:
    """A worker process: compiles its share of one arch's kernels.

    CuTeDSL reads its architecture from the environment of the process, hence a process each.
    """
    (arch,) = args.arch
    shard, shards = args.worker
    previous = {entry["name"]: entry for entry in read_manifest(args.out)["kernels"]}
    digests = {module: _module_digest(module) for module in args.module}
    entries, failures = [], []
    mine = [pair for pair in collect(arch, args.module) if _selected(pair[1].name, args.only)]
    for module, variant in mine[shard::shards]:
        source_hash = _source_hash(variant, digests[module], args.host)
        old = previous.get(variant.name)
        if _unchanged(old, source_hash, args.out, args.keep_ptx):
            entries.append(old)
            continue
        try:
            entry = _compile(variant, args.host, source_hash, args.out, args.keep_ptx)
        except Exception:
            traceback.print_exc()
            failures.append(variant.name)
            continue
        entries.append(entry)
        print(
            f"{arch} {entry['name']}: {entry['registers']} registers, "
            f"{entry['stack_bytes']} bytes of stack, {entry['compile_seconds']} s",
            flush=True,
        )
    args.result.write_text(json.dumps({"entries": entries, "failures": failures}))
    return 1 if failures else 0


def _start_worker(
    args: argparse.Namespace, arch: str, shard: int, shards: int, scratch: pathlib.Path
) -> tuple[subprocess.Popen, pathlib.Path]:
    result = scratch / f"{arch}.{shard}.json"
    command = [sys.executable, str(pathlib.Path(__file__).parent), "--arch", arch]
    command += ["--out", str(args.out), "--worker", f"{shard}/{shards}", "--result", str(result)]
    command += ["--host", args.host]
    command += [word for name in args.module for word in ("--module", name)]
    command += [word for pattern in args.only for word in ("--only", pattern)]
    environment = os.environ | {"CUTE_DSL_ARCH": arch}
    if args.keep_ptx:
        dump = scratch / f"{arch}.{shard}"
        dump.mkdir()
        command.append("--keep-ptx")
        environment |= {"CUTE_DSL_KEEP": "ptx", "CUTE_DSL_DUMP_DIR": str(dump)}
    return subprocess.Popen(command, env=environment), result


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
    """The manifest of a folder of kernels; one without kernels where there is none yet."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text()) if path.exists() else {}
    if manifest.get("format") != FORMAT:
        return {"format": FORMAT, "dsl_version": "", "kernels": []}
    return manifest


def _copy_runtime_libraries(out: pathlib.Path) -> None:
    for library, distributions in RUNTIME_LIBRARIES.items():
        found = _file_of_distributions(library, distributions)
        if found is None:
            raise FileNotFoundError(f"{library} is in no installed {' or '.join(distributions)}")
        shutil.copyfile(found, out / library)


def _file_of_distributions(name: str, distributions: Sequence[str]) -> pathlib.Path | None:
    for distribution in distributions:
        try:
            files = importlib.metadata.files(distribution) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            if file.name == name:
                return pathlib.Path(str(file.locate()))
    return None


def build(args: argparse.Namespace) -> int:
    """Runs the workers, merges what they report and writes the manifest; 0 if all compiled."""
    started = time.perf_counter()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    # Two shares of each arch even for few jobs: one arch can have more kernels than all the others.
    shards = max(min(2, args.jobs), ceil_div(args.jobs, len(args.arch)))
    waiting = [(arch, shard) for shard in range(shards) for arch in args.arch]
    running: list[tuple[subprocess.Popen, pathlib.Path]] = []
    done: list[tuple[int, pathlib.Path]] = []
    with tempfile.TemporaryDirectory(prefix="kernels-") as temporary:
        scratch = pathlib.Path(temporary)
        while waiting or running:
            while waiting and len(running) < args.jobs:
                arch, shard = waiting.pop(0)
                running.append(_start_worker(args, arch, shard, shards, scratch))
            time.sleep(0.02)
            for worker in [w for w in running if w[0].poll() is not None]:
                running.remove(worker)
                done.append((worker[0].returncode, worker[1]))
        reports = [json.loads(path.read_text()) for _, path in done if path.exists()]
    entries = {entry["name"]: entry for report in reports for entry in report["entries"]}
    failures = sorted(name for report in reports for name in report["failures"])
    crashed = len(done) - len(reports)
    # Kernels outside this call's selection stay as they are; the others that no longer exist go.
    for old in read_manifest(args.out)["kernels"]:
        if old["arch"] not in args.arch or not _selected(old["name"], args.only) or crashed:
            entries.setdefault(old["name"], old)
        elif old["name"] not in entries:
            for path in args.out.glob(f"{old['name']}.*"):
                path.unlink()
    if args.host == platform.machine():
        _copy_runtime_libraries(args.out)
    manifest = {
        "format": FORMAT,
        "dsl_version": _dsl_version(),
        "kernels": sorted(entries.values(), key=lambda entry: entry["name"]),
    }
    temporary_path = args.out / f".{MANIFEST}"
    temporary_path.write_text(json.dumps(manifest, indent=1) + "\n")
    temporary_path.replace(args.out / MANIFEST)
    print(f"{len(entries)} kernels in {args.out}, {time.perf_counter() - started:.1f} s")
    if failures or crashed:
        print(f"failed: {', '.join(failures) or 'a worker process'}", file=sys.stderr)
        return 1
    return 0


def _arches(text: str) -> tuple[str, ...]:
    arches = tuple(dict.fromkeys(text.split(",")))
    for arch in arches:
        if arch not in ARCHES:
            raise argparse.ArgumentTypeError(f"arch {arch!r} is none of {', '.join(ARCHES)}")
    return arches


def _shard(text: str) -> tuple[int, int]:
    shard, _, shards = text.partition("/")
    return int(shard), int(shards)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jax_nvfp4.kernels.build", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--arch",
        type=_arches,
        default=DEFAULT_ARCHES,
        help=f"architectures, comma-separated (default: {','.join(DEFAULT_ARCHES)})",
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write to")
    parser.add_argument(
        "--host",
        choices=HOSTS,
        default=platform.machine(),
        help="machine that the host code is for (default: this one); of another one the static "
        "libraries are not copied",
    )
    parser.add_argument("--keep-ptx", action="store_true", help="write NAME.ptx and NAME.cubin too")
    parser.add_argument(
        "--jobs",
        type=int,
        default=min(os.cpu_count() or 1, _MOST_JOBS),
        help=f"processes (default: one per CPU, {_MOST_JOBS} at most)",
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="kernel name or pattern"
    )
    parser.add_argument(
        "--module", action="append", metavar="MODULE", help="kernel module (default: the package's)"
    )
    parser.add_argument("--worker", type=_shard, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=pathlib.Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.module = args.module or list(MODULES)
    return _work(args) if args.worker else build(args)


if __name__ == "__main__":
    sys.exit(main())
