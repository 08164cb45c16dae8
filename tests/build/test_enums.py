# SPDX-License-Identifier: Apache-2.0
"""The C++ header that the build writes from `config/enums.py`, compiled and asked."""

import pathlib
import shutil
import subprocess
import sys

import pytest

import kernel_objects
from jax_nvfp4.config.enums import WEIGHT_TILES, OutFormat, Scaling

PROPERTIES = ("per_row", "scale_given", "amax_given", "given")


def camel(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("_"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    found = tmp_path_factory.mktemp("enums")
    source = kernel_objects.ROOT / "jax_nvfp4" / "config" / "enums.py"
    script = kernel_objects.ROOT / "ffi" / "generate_enums.py"
    # As CMake runs it: by path, without the package; -S keeps even installed packages away.
    command = [sys.executable, "-I", "-S", str(script), str(source), str(found / "enums.h")]
    subprocess.run(command, check=True)
    return found


def test_the_header_says_what_python_says(folder: pathlib.Path) -> None:
    compiler = shutil.which("c++")
    assert compiler, "no C++ compiler"
    facts = []
    for member in Scaling:
        name = f"Scaling::k{camel(member.name)}"
        facts.append(f"static_cast<int>({name}) == {int(member)}")
        for function in PROPERTIES:
            facts.append(f"{camel(function)}({name}) == {str(getattr(member, function)).lower()}")
    for form in OutFormat:
        facts.append(f"static_cast<int>(OutFormat::k{camel(form.name)}) == {int(form)}")
    for arch, (rows, columns) in WEIGHT_TILES.items():
        facts.append(f'WeightTileOf("{arch}").n == {rows}')
        facts.append(f'WeightTileOf("{arch}").k == {columns}')
    facts.append('WeightTileOf("sm_80").n == 0')
    lines = ['#include "enums.h"', "using namespace jax_nvfp4;"]
    lines += [f"static_assert({fact});" for fact in facts]
    (folder / "facts.cc").write_text("\n".join((*lines, "")))
    command = [
        compiler,
        "-std=c++17",
        "-Wall",
        "-Werror",
        "-fsyntax-only",
        str(folder / "facts.cc"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_properties_that_are_written_are_those_of_the_class() -> None:
    """A property that is added to `Scaling` is added above, too."""
    assert [n for n, v in vars(Scaling).items() if isinstance(v, property)] == list(PROPERTIES)
