# SPDX-License-Identifier: Apache-2.0
"""The comparison of two sets of kernels: names are put aside, and nothing else."""

import pathlib

import pytest

from jax_nvfp4.kernels import compare

PTX = """.version 8.8
	// .globl	{name}_0
.visible .entry {name}_0(
	.param .u32 {name}_0_param_0
)
{{
	ld.param.b32 	%r1, [{name}_0_param_0];
	add.s32 	%r2, %r1, {addend};
	bra 	$L__BB{label}_1;
}}
.visible .entry {name}_1(
	.param .u32 {name}_1_param_0
)
{{
	ret;
}}
"""


def write(folder: pathlib.Path, **kernels: str) -> str:
    folder.mkdir()
    for name, text in kernels.items():
        (folder / f"{name}.ptx").write_text(text)
    return str(folder)


def ptx(name: str, addend: int = 1, label: int = 0) -> str:
    return PTX.format(name=name, addend=addend, label=label)


def test_names_are_put_aside(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write(tmp_path / "a", one=ptx("k"), two=ptx("k", 2))
    after = write(tmp_path / "b", one=ptx("other_module_k", label=3), three=ptx("k", 2))
    assert compare.main([before, after]) == 0
    assert "two is three now" in (printed := capsys.readouterr().out)
    assert "2 kernels: the same code" in printed


@pytest.mark.parametrize(
    "after",
    [
        {"one": ptx("k", 3)},
        {"one": ptx("k"), "two": ptx("k", 5)},
        {"renamed": ptx("k", 7)},
        {"one": ptx("k").replace("ret;", "exit;")},
        {"one": ptx("k").replace("k_1_param", "k_0_param")},
    ],
)
def test_other_code_is_told(tmp_path: pathlib.Path, after: dict[str, str]) -> None:
    folders = write(tmp_path / "a", one=ptx("k")), write(tmp_path / "b", **after)
    assert compare.main(list(folders)) == 1


def test_a_folder_without_ptx_is_refused(tmp_path: pathlib.Path) -> None:
    folders = write(tmp_path / "a", one=ptx("k")), write(tmp_path / "b")
    with pytest.raises(SystemExit, match="no PTX"):
        compare.main(list(folders))
    with pytest.raises(SystemExit, match=r"named 'two'"):
        compare.main([folders[0], folders[0], "--only", "two"])
