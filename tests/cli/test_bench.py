# SPDX-License-Identifier: Apache-2.0
"""`bench` on whatever device there is, with shapes small enough for a CPU."""

import argparse
import dataclasses
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_nvfp4 import cli
from jax_nvfp4.bench import experts, measurements, model, timing
from jax_nvfp4.bench.report import LinearRow, QuantizeRow, linear_line, stack_lines
from jax_nvfp4.cli import bench

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
    assert set(report["stack"]["seconds"]) == {"bf16", "W4A4", "W4A16"}
    names = ("bf16", "w4a4", "w4a16", "invariant")
    times = [r[key] for r in report["linear"] for key in names]
    times += [r[key] for r in report["quantize"] for key in ("static", "token", "tensor", "copy")]
    times += [*report["call"].values(), *report["stack"]["seconds"].values()]
    assert len(report["call"]) == 4
    assert all(t > 0 for t in (*times, *report["ceilings"].values()))
    assert report["errors"] == []
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert report["device"] in printed
    row = report["linear"][1]
    assert f"{row['bf16'] * 1e6:.1f}" in printed
    assert f"{row['invariant'] / row['w4a16']:.2f}x" in printed


def test_the_steps_of_a_model(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = model.Sizes(layers=1, width=64, heads=4, kv_heads=2, hidden=96, vocab=128)
    figures = tmp_path / "model.json"
    options = ["--batches", "2", "--prompt", "6", "--cache", "8", "--steps", "2"]
    options += ["--rotate-mb", "1", "--json", str(figures)]
    assert cli.main(["bench", "--model", "1,64,4,2,96,128", *options]) == 0
    rows = json.loads(figures.read_text())["model"]
    assert [(r["name"], r["fused"], r["batch"], r["prompt"]) for r in rows] == [
        (name, fused, *use)
        for fused in (False, True)
        for name in ("bf16", "W4A16", "W4A4")
        for use in ((2, 0), (1, 6))
    ]
    linears = 64 * (64 + 2 * 32 + 64) + 3 * 64 * 96 + 64 * 128
    rest = 128 * 64 + 3 * 64  # the embedding and the norms
    for r in rows:
        assert r["seconds"] > 0
        assert r["program_bytes"] > r["weight_bytes"]
        products = 5 if r["fused"] else 8
        packed = linears * 9 // 16 + 4 * products
        assert r["weight_bytes"] == 2 * rest + (2 * linears if r["name"] == "bf16" else packed)
    printed = capsys.readouterr().out
    assert str(sizes) in printed
    assert len([line for line in printed.splitlines() if "GB" in line]) == len(rows)


def test_layers_of_experts(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "experts.json"
    options = ["--tokens", "3", "--rotate-mb", "1", "--json", str(figures)]
    assert cli.main(["bench", "--experts", "tiny", *options]) == 0
    report = json.loads(figures.read_text())
    (row,) = report["experts"]
    assert (row.pop("model"), row.pop("tokens"), row.pop("equal")) == ("tiny", 3, False)
    assert 2 <= row.pop("touched") <= 6
    if not timing.on_gpu():
        assert row.pop("fusion") is None
    assert all(seconds > 0 for seconds in row.values())
    assert report["errors"] == []
    printed = capsys.readouterr().out
    assert f"{row['mlp'] / (row['gated'] + row['down']):.2f}x" in printed


@pytest.mark.parametrize("tokens", [1, 5])
def test_no_token_chooses_an_expert_twice(tokens: int) -> None:
    sizes = experts.PRESETS["tiny"]
    chosen = experts.choices(sizes, tokens, 9, equal=False)
    assert chosen.shape == (9, tokens, sizes.top_k)
    assert all(len(set(pair)) == sizes.top_k for pair in chosen.reshape(-1, sizes.top_k).tolist())
    assert chosen.min() >= 0 and chosen.max() < sizes.experts
    if tokens == 1:  # in turn, so that none is met while a cache holds it
        assert len(np.unique(chosen[:4])) == sizes.experts
    equal = experts.choices(sizes, 4 * tokens, 2, equal=True)
    assert set(np.bincount(equal[1].reshape(-1))) == {tokens}


def test_a_model_reads_and_generates_alike() -> None:
    """A prompt in one call, and the same prompt token by token, fused and not, with one result."""
    sizes = model.Sizes(layers=2, width=32, heads=4, kv_heads=2, hidden=48, vocab=64)
    tokens = jnp.asarray([[5, 9, 33, 2]])
    for fused in (False, True):
        apply, params = model.make(sizes, fused)
        step = jax.jit(apply)
        at_once, _ = step(params, tokens, model.empty_cache(sizes, 1, 4), jnp.int32(0))
        cache = model.empty_cache(sizes, 1, 4)
        for i in range(4):
            logits, cache = step(params, tokens[:, i : i + 1], cache, jnp.int32(i))
        assert logits.shape == (1, 64)
        error = jnp.linalg.norm((logits - at_once).astype(jnp.float32))
        assert error < 0.05 * jnp.linalg.norm(at_once.astype(jnp.float32))


@pytest.mark.parametrize("on_gpu", [True, False])
def test_defaults_and_options(on_gpu: bool) -> None:
    parser = argparse.ArgumentParser()
    bench.add_parser(parser.add_subparsers())
    chosen = bench.defaults(on_gpu, quick=False)
    assert chosen.overridden(parser.parse_args(["bench"])) == chosen
    options = ["bench", "--layers", "0", "--rows", "3", "--shape", "8x16", "--model"]
    changed = chosen.overridden(parser.parse_args(options))
    expected = dataclasses.replace(chosen, layers=0, rows=(3,), shapes=((8, 16),))
    assert changed == expected
    weights = sum(n * k for n, k in chosen.shapes) * len(chosen.rows)
    assert (weights < 1e8) == (not on_gpu)  # what a CPU does in a minute


def test_what_cannot_be_is_an_error_and_no_figure(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measurements, "CHAIN", 3)
    seconds = timing.Loop.seconds

    def too_fast(
        loop: timing.Loop, xs: list[jax.Array], ws: list[jax.Array], best: bool = False
    ) -> float:
        took = seconds(loop, xs, ws, best=best)
        return 1e-9 if loop.plan.rounds == 1 else took  # the ceiling's has two

    monkeypatch.setattr(timing.Loop, "seconds", too_fast)
    figures = tmp_path / "bench.json"
    small = [*SMALL, "--rows", "5", "--layers", "0", "--json", str(figures)]
    assert cli.main(small) == 1
    report = json.loads(figures.read_text())
    assert all(report["linear"][0][name] is None for name in ("bf16", "w4a4", "w4a16", "invariant"))
    assert all(report["quantize"][0][name] is None for name in ("static", "token", "tensor"))
    assert len(report["errors"]) == 8
    error = capsys.readouterr().err
    assert error.count("0.0 us would be reading the weight at") == 4
    assert "bench: bf16, 512x1024, M = 5: " in error
    assert "bench: quantize, tensor, 128x1024: 0.0 us would be" in error


def test_times_that_the_device_does_not_allow() -> None:
    most = timing.Ceilings(read=1e12, copy=1e12, multiply=1e14)
    measurements.check_time(1.0, 1e12, most, 1e14)
    with pytest.raises(
        measurements.NotCredibleError, match=r"weight at 1\.11 TB/s; memory gives 1"
    ):
        measurements.check_time(0.9, 1e12, most)
    with pytest.raises(measurements.NotCredibleError, match=r"200 TFLOP/s; .* reaches 100"):
        measurements.check_time(1.0, 1e9, most, 2e14)
    measurements.check_time(1.0, 1e9, most)


def test_bytes_and_operations_of_a_call() -> None:
    row = LinearRow(n=32, k=64, m=4, w4a16=2.0, w4a4=1.0, invariant=None, bf16=3.0)
    assert row.bytes == 32 * 64 / 2 + 32 * 64 / 16 + 4 * 64 * 2 + 4 * 32 * 2
    assert row.flops == 2 * 32 * 64 * 4
    assert (row.main, row.best) == (2.0, 1.0)
    assert QuantizeRow(4, 64, 1, 1, 1, 1).bytes == 4 * 64 * 2 + 4 * 64 / 2 + 4 * 64 / 16
    empty = LinearRow(32, 64, 4, None, None, None, None)
    assert (empty.main, empty.best) == (None, None)
    assert linear_line(empty, 1.0).split("|")[1].split() == ["-"] * 3


def test_the_stack_beside_bf16() -> None:
    stack = {"bytes": {"bf16": 32e9, "nvfp4": 9e9}, "seconds": {"bf16": 0.016, "W4A16": 0.004}}
    assert stack_lines(stack)[1].split()[-1] == "4.00x"
    del stack["seconds"]["bf16"]  # was not credible
    assert stack_lines(stack)[0].split()[-1] == "-"


def test_a_wrong_result_is_not_timed() -> None:
    y = np.full((2, 16), 32, np.float32)
    measurements.check_result(y, y, 0.01)
    for bad in (y + 8 * np.eye(2, 16), y * np.nan):
        with pytest.raises(measurements.NotCredibleError, match="wrong result: relative error"):
            measurements.check_result(bad, y, 0.01)


@pytest.mark.parametrize("rounds", [1, 3])
def test_every_call_is_computed(rounds: int) -> None:
    xs = [jnp.full((2, 3), float(i)) for i in range(1, 4)]
    ws = [jnp.full((2, 3), float(i)) for i in (10, 100)]
    made = []

    def function(x: jax.Array, w: jax.Array) -> dict[str, jax.Array]:
        jax.debug.callback(lambda: made.append(1))
        return {"a": x * w, "b": x + w}

    old = [{"a": jnp.zeros((2, 3)), "b": jnp.zeros((2, 3))} for _ in xs]
    done, results = jax.jit(timing.in_turn(function, rounds))(xs, ws, old)
    jax.effects_barrier()
    assert int(done) == rounds
    assert len(made) == 3 * rounds
    assert [float(r["a"][1, 2]) for r in results] == [10, 200, 30]
    assert [float(r["b"][0, 0]) for r in results] == [11, 102, 13]


def test_the_loop_holds_every_call_and_copies_nothing() -> None:
    x = jax.ShapeDtypeStruct((4, 32), jnp.float32)
    w = jax.ShapeDtypeStruct((16, 32), jnp.float32)
    planned = timing.Plan(distinct=2, calls=6, rounds=5)
    with timing.Compiler() as compiler:
        loop = timing.Loop.of(compiler, lambda x, w: x @ w.T, x, w, planned)
        program = loop.program.result()
    text = program.as_text()
    assert text.count(" dot(") == 6
    assert len(re.findall(r" while\(", text)) == 1
    assert not re.findall(r"f32\S* copy\(", text)
    rng = np.random.default_rng(0)
    xs = [jnp.asarray(rng.standard_normal(x.shape), x.dtype) for _ in range(6)]
    ws = [jnp.asarray(rng.standard_normal(w.shape), w.dtype) for _ in range(2)]
    assert loop.seconds(xs, ws) > 0
    for i, y in enumerate(loop.results):
        np.testing.assert_allclose(y, xs[i] @ ws[i % 2].T, rtol=1e-5, atol=1e-5)


def test_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    assert timing.plan(1 << 20, 1e-6, 10 << 20) == timing.Plan(10, 10, 1)
    assert timing.plan(1 << 30, 1.0, 1).distinct == 2  # or XLA would see one weight in all calls
    monkeypatch.setattr(timing, "on_gpu", lambda: True)
    short = timing.plan(8 << 20, 2e-6, 512 << 20)
    assert (short.distinct, short.calls) == (64, 64)
    assert short.rounds * 64 * 2e-6 >= 5e-3
    few = timing.plan(256 << 20, 90e-6, 512 << 20)
    assert (few.distinct, few.calls) == (2, 4)
    assert timing.plan(1 << 30, 5e-3, 512 << 20) == timing.Plan(2, 2, 1)


def test_a_program_that_does_not_compile_says_so_when_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    seen = []
    with timing.Compiler() as compiler:
        right = [compiler.add(lambda x: x + 1, jnp.ones(3), tuned=tuned) for tuned in (False, True)]
        monkeypatch.setattr(jax.stages.Lowered, "compile", fails)
        wrong = [compiler.add(lambda x: x - 1, jnp.ones(3), tuned=tuned) for tuned in (False, True)]
        monkeypatch.undo()
        assert compiler.wait(lambda ready, of: seen.append((ready, of))) == 4
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [float(program.result()(jnp.ones(3))[0]) for program in right] == [2, 2]
    for program in wrong:
        with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
            program.result()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "64"], "expected NxK"),
        (["--rows", "1,x"], "expected numbers with commas"),
        (["--layer-width", "4,5"], "takes three numbers, got 2"),
        (["--model", "7b"], "--model takes llama-8b, tiny or LAYERS"),
        (["--model", "1,64,3,1,8,8"], "the width must be an even multiple of heads"),
        (["--model", "0,64,4,2,8,8"], "each size must be at least 1"),
        (["--model", "tiny", "--cache", "8", "--steps", "5"], "--steps at most half of --cache"),
        (["--experts", "mixtral"], "--experts takes qwen3-30b"),
        (["--experts", "tiny", "--tokens", "0"], "--tokens must be at least 1"),
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
