# SPDX-License-Identifier: Apache-2.0
"""`bench` on whatever device there is, with shapes small enough for a CPU."""

import json
import pathlib

import jax.numpy as jnp
import pytest

from jax_nvfp4 import cli
from jax_nvfp4.cli import bench, measurements, timing

SMALL = ["bench", "--shape", "512x1024", "--rows", "1,5", "--quantize-shape", "128x1024"]
SMALL += ["--layers", "1", "--layer-width", "64,96,128", "--rotate-mb", "1"]


def test_tables_json_and_picture_agree(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measurements, "CHAIN", 3)
    figures, picture = tmp_path / "bench.json", tmp_path / "roofline.png"
    assert cli.main([*SMALL, "--json", str(figures), "--plot", str(picture)]) == 0
    report = json.loads(figures.read_text())
    assert [(r["n"], r["k"], r["m"]) for r in report["linear"]] == [(512, 1024, 1), (512, 1024, 5)]
    assert [(r["m"], r["k"]) for r in report["quantize"]] == [(128, 1024)]
    assert report["stack"]["layers"] == 1
    times = [r[key] for r in report["linear"] for key in ("bf16", "w4a4")]
    times += [r[key] for r in report["quantize"] for key in ("static", "token", "tensor")]
    times += [*report["call"].values(), *report["stack"]["seconds"].values()]
    assert all(t > 0 for t in times)
    assert report["read_ceiling"] > 0 and report["copy_ceiling"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert report["device"] in printed
    assert f"{report['linear'][1]['bf16'] * 1e6:.1f}" in printed


def test_bytes_and_operations_of_a_call() -> None:
    row = measurements.LinearRow(n=32, k=64, m=4, w4a16=2.0, w4a4=1.0, invariant=None, bf16=3.0)
    assert row.bytes == 32 * 64 / 2 + 32 * 64 / 16 + 4 * 64 * 2 + 4 * 32 * 2
    assert row.flops == 2 * 32 * 64 * 4
    assert row.best == 1.0
    assert measurements.QuantizeRow(4, 64, 1, 1, 1).bytes == 4 * 64 * 2 + 4 * 64 / 2 + 4 * 64 / 16


def test_a_wrong_result_is_not_timed() -> None:
    x, w = jnp.ones((2, 32), jnp.bfloat16), jnp.ones((16, 32), jnp.bfloat16)
    y = x @ w.T
    measurements._check_result(y, x, w, True)
    for bad in (y.at[0, 0].add(8), y * jnp.nan):
        with pytest.raises(measurements.WrongResultError, match="linear is wrong"):
            measurements._check_result(bad, x, w, True)


def test_every_call_is_computed() -> None:
    xs = [jnp.full((2, 3), float(i)) for i in range(1, 4)]
    ws = [jnp.full((2, 3), float(i)) for i in (10, 100)]
    program = timing.compile_program(
        lambda xs, ws: timing.in_turn(lambda x, w: {"a": x * w, "b": x + w}, xs, ws), xs, ws
    )
    assert float(program(xs, ws)) == (10 + 200 + 30) + (11 + 102 + 13)
    timed = timing.measure(program, (xs, ws), 3)
    assert 0 < timed.best <= timed.median


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "64"], "expected NxK"),
        (["--rows", "1,x"], "expected numbers with commas"),
        (["--layer-width", "4,5"], "takes three numbers, got 2"),
        (["--json", "no/such/folder/file.json"], "there is no folder"),
    ],
)
def test_bad_arguments_are_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = cli.main(["bench", *arguments])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_default_shapes_are_distinct() -> None:
    shapes = sum(bench.SHAPES.values(), ())
    assert len(set(shapes)) == len(shapes) == 10
    assert all(k % 64 == 0 for _, k in shapes)
