# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with damaged headers, configurations, indexes and markers, as many as are asked for.

Each input is one of a few small checkpoints with some mutations, found again by its number. It must
load to what it held, or be refused by a CheckpointError (FileNotFoundError where a file is named
that is not there). Anything else is a fault: another exception, more than five seconds of CPU, or
values that nobody wrote. A million of them:

    python tests/checkpoint/fuzz.py --count 1000000
"""

import argparse
import contextlib
import copy
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import ml_dtypes
import numpy as np

from jax_nvfp4.checkpoint import CheckpointError
from jax_nvfp4.checkpoint import experts as stacks
from jax_nvfp4.checkpoint.files import open_folder
from jax_nvfp4.checkpoint.load import _distinct, _outputs, detect, kv_cache_of

SLOW = 5.0
_CODES = {"U8": np.uint8, "F8_E4M3": ml_dtypes.float8_e4m3fn, "F32": np.float32, "F16": np.float16}
_JUNK = json.loads(
    """[null, true, false, 0, 1, -1, 16, 32, 9223372036854775808, 1e308, NaN, "", "x", "nvfp4",
    "NVFP4", "modelopt", "compressed-tensors", "mxfp4", "linear", [], {}, [1], ["NVFP4"], {"a": 1},
    [[[[[]]]]], "F32", "U8", "F8_E4M3", "\\u0000", "\\ud800", "re:[", "..", ".", "/etc/passwd"]"""
)
# What these say is followed, and then other values are right: they are not put in at random.
_MEANINGFUL = ("weight_scale_layout", "swap_weight_nibbles", "checkpoint_uses_comfy_quantization")


def _linear(rng, n=16, k=32):
    """The parts of an NVFP4 layer, valid ones."""
    codes = rng.integers(0, 256, (n, k // 2), np.uint8)
    scales = rng.integers(8, 0x7E, (n, k // 16), np.uint8).view(ml_dtypes.float8_e4m3fn)
    return codes, scales, np.full((), 0.5, np.float32)


def bases():
    """The checkpoints that are damaged: (tensors, files, the header's metadata)."""
    rng = np.random.default_rng(0)
    q, scales, one = _linear(rng)
    modelopt = {"a.weight": q, "a.weight_scale": scales, "a.weight_scale_2": one}
    modelopt |= {"a.input_scale": one, "norm.weight": np.ones(4, np.float16)}
    packed = {"a.weight_packed": q, "a.weight_scale": scales}
    packed |= {"a.weight_global_scale": one.reshape(1), "norm.weight": np.ones(4, np.float16)}
    weights = {"num_bits": 4, "type": "float", "group_size": 16, "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights}
    compressed = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
    compressed |= {"config_groups": {"group_0": group}, "quantization_status": "compressed"}
    own = {"quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": "FP8"}
    f8 = {"b.weight": q.view(ml_dtypes.float8_e4m3fn), "b.weight_scale": one}
    layers = {"a": {"quant_algo": "NVFP4"}, "b": {"quant_algo": "FP8"}}
    mixed = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    moe = {f"x.experts.{g}.{k}": v for g in range(2) for k, v in modelopt.items() if k[0] == "a"}
    names, method = dict.fromkeys(modelopt, "model.safetensors"), {"quant_method": "modelopt"}
    listed = {"format_version": "1.0", "layers": {"a": {"format": "nvfp4"}}}
    tiles = np.zeros((128, 4), np.uint8).view(ml_dtypes.float8_e4m3fn)
    return [
        (modelopt, {"hf_quant_config.json": {"quantization": own}}, None),
        (modelopt, {"config.json": {"quantization_config": own | method}}, None),
        (modelopt, {}, None),
        (modelopt, {"model.safetensors.index.json": {"metadata": {}, "weight_map": names}}, None),
        (modelopt | f8, {"hf_quant_config.json": {"quantization": mixed}}, None),
        (packed, {"config.json": {"text_config": {"quantization_config": compressed}}}, None),
        (packed, {"config.json": {"quantization_config": compressed}}, None),
        (moe, {"hf_quant_config.json": {"quantization": own}}, None),
        (
            modelopt | {"a.weight_scale": tiles},
            {},
            {"_quantization_metadata": json.dumps(listed)},
        ),
        (
            {"p_blocks": q.reshape(16, 1, 16), "p_scales": np.full((16, 1), 120, np.uint8)},
            {"config.json": {"quantization_config": {"quant_method": "mxfp4"}}},
            None,
        ),
    ]


def _header(tensors, metadata):
    names = {np.dtype(dtype): name for name, dtype in _CODES.items()}
    header, offset = ({"__metadata__": metadata} if metadata else {}), 0
    for name, array in tensors.items():
        header[name] = {"dtype": names[array.dtype], "shape": list(array.shape)}
        header[name]["data_offsets"] = [offset, offset + array.nbytes]
        offset += array.nbytes
    return header


def _places(value, path=()):
    """Every place in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else ()
    for key, inner in enumerate(value) if isinstance(value, list) else items:
        yield from _places(inner, (*path, key))


def _mutate(rng, value):
    """A JSON value with one place changed: removed, renamed, doubled or replaced."""
    path = rng.choice(list(_places(value))[1:] or [()])
    if not path:
        return copy.deepcopy(rng.choice(_JUNK))
    outer = value
    for key in path[:-1]:
        outer = outer[key]
    key, what = path[-1], rng.random()
    if what < 0.25:
        del outer[key]
    elif what < 0.4 and isinstance(outer, dict):
        outer[str(rng.choice([*outer, "quant_algo", "format", "x", "", key + "s"]))] = outer.pop(
            key
        )
    elif what < 0.6 and isinstance(outer[key], int) and not isinstance(outer[key], bool):
        outer[key] += rng.choice([-1, 1, 16, -16, 2**31, -(2**63)])
    elif what < 0.7:
        where = rng.choice(list(_places(value)))
        copied = value
        for step in where:
            copied = copied[step]
        outer[key] = json.loads(json.dumps(copied))
    else:
        outer[key] = copy.deepcopy(rng.choice(_JUNK))
    return value


def _damage(rng, text):
    """Bytes with some changed, cut or put in."""
    data = bytearray(text)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at = rng.randrange(len(data) + 1)
        what = rng.random()
        if what < 0.5 and at < len(data):
            data[at] = rng.randrange(256)
        elif what < 0.7:
            del data[at : at + rng.choice([1, 2, 8, 100])]
        else:
            data[at:at] = bytes(rng.choices(range(256), k=rng.choice([1, 2, 8]))) * rng.choice(
                [1, 50]
            )
    return bytes(data)


def write(folder, number, checkpoints):
    """Writes the input of a number.

    Returns:
        Whether only configurations were changed: then what loads is what was there.
    """
    rng = random.Random(number)
    tensors, files, metadata = checkpoints[number % len(checkpoints)]
    header, body = _header(tensors, metadata), b"".join(a.tobytes() for a in tensors.values())
    header, files = json.loads(json.dumps(header)), json.loads(json.dumps(files))
    in_header = not files or rng.random() < 0.4
    for _ in range(rng.choice([1, 1, 2, 3])):
        if in_header:
            header = _mutate(rng, header)
        else:
            name = rng.choice(list(files))
            files[name] = _mutate(rng, files[name])
    text = json.dumps(header).encode(errors="surrogatepass")
    if in_header and rng.random() < 0.3:
        text = _damage(rng, text)
    size = len(text) if rng.random() < 0.98 else rng.choice([0, 7, 2**32, 2**63, 2**64 - 1])
    blob = size.to_bytes(8, "little") + text + body
    if in_header and rng.random() < 0.1:
        blob = blob[: rng.randrange(len(blob))]
    (folder / "model.safetensors").write_bytes(blob)
    for name, content in files.items():
        text = json.dumps(content).encode(errors="surrogatepass")
        if not in_header and rng.random() < 0.2:
            text = _damage(rng, text)
        (folder / name).write_bytes(text)
    return not in_header and size < 2**32 and not any(key in str(files) for key in _MEANINGFUL)


def load(folder, stack=False):
    """Reads a checkpoint as `load_checkpoint` does, without moving it to a device."""
    opened = open_folder(folder)
    outputs = _outputs(opened, detect(opened), np.dtype(np.float32) if stack else None)
    kv_cache_of(opened)
    outputs = _distinct(opened, outputs)
    outputs = stacks.stack(outputs) if stack else outputs
    return {output.key: (output.quantized, output.read()) for output in outputs}


def _same(a, b):
    return (
        a[0] == b[0]
        and len(a[1]) == len(b[1])
        and all(
            x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
            for x, y in zip(a[1], b[1], strict=True)
        )
    )


def try_one(folder, number, checkpoints, whole):
    """Tries one input.

    Returns:
        "loaded" or "refused".

    Raises:
        AssertionError: it does neither as it should.
    """
    for path in folder.iterdir():
        path.unlink()
    intact = write(folder, number, checkpoints)
    began = time.process_time()
    outcome = "loaded"
    for stack in (False, True):
        try:
            found = load(folder, stack)
        except (CheckpointError, FileNotFoundError):
            outcome = "refused"
        except Exception as error:
            raise AssertionError(f"input {number}: {type(error).__name__}: {error}") from error
        else:
            expected = whole[number % len(checkpoints)][stack]
            if intact:
                wrong = [
                    key for key in expected if key in found and not _same(expected[key], found[key])
                ]
                assert not wrong, f"input {number}: other values of {wrong}"
                missing = set(expected) - set(found)
                assert not missing, f"input {number}: {missing} came as {set(found)}"
    spent = time.process_time() - began
    assert spent < SLOW, f"input {number}: took {spent:.1f} s of CPU"
    return outcome


@contextlib.contextmanager
def tries():
    """A function that tries the input of a number."""
    checkpoints, whole = bases(), []
    folder = Path(
        tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
    )
    try:
        for tensors, files, metadata in checkpoints:
            text = json.dumps(_header(tensors, metadata)).encode()
            body = b"".join(array.tobytes() for array in tensors.values())
            blob = len(text).to_bytes(8, "little") + text + body
            for path in folder.iterdir():
                path.unlink()
            (folder / "model.safetensors").write_bytes(blob)
            for name, content in files.items():
                (folder / name).write_text(json.dumps(content))
            whole.append((load(folder), load(folder, stack=True)))
        yield lambda number: try_one(folder, number, checkpoints, whole)
    finally:
        shutil.rmtree(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--start", type=int, default=0, help="the number of the first input")
    args = parser.parse_args()
    counts, faults = {"loaded": 0, "refused": 0}, 0
    with tries() as try_number:
        for number in range(args.start, args.start + args.count):
            try:
                counts[try_number(number)] += 1
            except AssertionError as fault:
                faults += 1
                print(fault, flush=True)
            if number % 10_000 == 9_999:
                print(f"{number + 1 - args.start} tried, {counts}, {faults} faults", flush=True)
    print(f"{args.count} tried, {counts}, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
