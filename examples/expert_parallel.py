# SPDX-License-Identifier: Apache-2.0
"""Three ways to divide a mixture of NVFP4 experts over devices, each against one device.

1. Experts divided, tokens on every device: a sharding of the weights under plain `jit`. XLA sums
   what each device makes of its experts. This is right for decoding.
2. Tokens divided too: inside `shard_map`, tokens travel to the devices of their experts and back by
   an all-to-all exchange, as bfloat16.
3. The same with tokens sent as NVFP4 codes with their scales: 3.5 times fewer bytes on the way out,
   and the same products, for the receiver would have quantized the tokens to these very codes.

Runs on 8 virtual CPU devices, or on the GPUs there are:

    python examples/expert_parallel.py
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_nvfp4 as nvfp4

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 30, 4, 256, 128
TOKENS_OF_A_DEVICE = 16


def pad_experts(weight: Any, devices: int) -> Any:
    """Adds experts of zeros until the devices divide their number: no token is sent to them."""
    missing = -weight.shape[0] % devices
    return jax.tree.map(lambda a: jnp.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1)), weight)


def exchange(rows: jax.Array, counts: jax.Array, size: int, axis: str) -> jax.Array:
    """Sends rows to other devices.

    Args:
        rows: (R, ...), those for the first device first.
        counts: (D, D), how many rows each device sends to each.
        size: of the result, which holds whatever may come.
        axis: of the mesh.

    Returns:
        (size, ...), the rows that came, those of the first device first.
    """
    me = jax.lax.axis_index(axis)
    send, receive = counts[me], counts[:, me]
    starts = jnp.cumsum(send) - send
    if jax.default_backend() != "cpu":
        places = (jnp.cumsum(counts, axis=0) - counts)[me]  # of my rows on each other device
        out = jnp.zeros((size, *rows.shape[1:]), rows.dtype)
        return jax.lax.ragged_all_to_all(rows, out, starts, send, places, receive, axis_name=axis)
    # XLA has no ragged exchange on CPUs: each pair of devices exchanges as many rows as there are.
    slots = starts[:, None] + jnp.arange(rows.shape[0])
    sent = rows[jnp.minimum(slots, rows.shape[0] - 1)]
    came = jax.lax.all_to_all(sent, axis, split_axis=0, concat_axis=0)
    ends = jnp.cumsum(receive)
    source = jnp.minimum(jnp.searchsorted(ends, jnp.arange(size), side="right"), len(receive) - 1)
    return came[source, jnp.arange(size) - (ends - receive)[source]]


def experts_of_rows(rows: dict[str, jax.Array], sizes: jax.Array, w13: Any, w2: Any) -> jax.Array:
    """The experts' MLP on rows sorted by expert, as bfloat16 or as codes with their scales."""
    if "x" in rows:
        hidden = nvfp4.ragged_linear(rows["x"], w13, sizes, activation=nvfp4.SwiGLU())
    else:
        # A code times its block scale is exact in bfloat16; the global scale is that of a row.
        codes = nvfp4.Nvfp4Tensor(rows["data"], rows["block_scale"], jnp.float32(1))
        z = nvfp4.ragged_linear(
            codes.dequantize(jnp.bfloat16),
            w13,
            sizes,
            activation_scale=None,
            out_dtype=jnp.float32,
        )
        gate, up = jnp.split(z * rows["global_scale"][:, None], 2, axis=-1)
        hidden = (jax.nn.silu(gate) * up).astype(jnp.bfloat16)
    return nvfp4.ragged_linear(hidden, w2, sizes)


def moe_of_device(
    x: jax.Array, indices: jax.Array, weights: jax.Array, w13: Any, w2: Any, *, axis: str, how: str
) -> jax.Array:
    """What a device does for its tokens x (T, K), with its own experts."""
    devices, own = jax.lax.axis_size(axis), w13.shape[0]
    me = jax.lax.axis_index(axis)
    tokens, top_k = indices.shape
    most = tokens * top_k * devices  # all tokens could come here

    # Out: rows sorted by expert, hence by device.
    order = jnp.argsort(indices.ravel(), stable=True)
    sizes = jnp.bincount(indices.ravel(), length=devices * own).reshape(devices, own)
    sizes = jax.lax.all_gather(sizes, axis)  # from, to, expert there
    counts = sizes.sum(-1)
    if how == "bfloat16":
        rows = {"x": x.astype(jnp.bfloat16)}
    else:
        codes = nvfp4.quantize(x, scaling="token")
        scale_bits = jax.lax.bitcast_convert_type(codes.block_scale, jnp.uint8)
        rows = {"data": codes.data, "block_scale": scale_bits, "global_scale": codes.global_scale}
    rows = {name: a[order // top_k] for name, a in rows.items()}
    rows = {name: exchange(a, counts, most, axis) for name, a in rows.items()}

    # Here: what came is sorted by device, then by expert; now by expert.
    came = sizes[:, me].ravel()
    expert = jnp.searchsorted(jnp.cumsum(came), jnp.arange(most), side="right") % own
    expert = jnp.where(jnp.arange(most) < came.sum(), expert, own)
    by_expert = jnp.argsort(expert, stable=True)
    rows = {name: a[by_expert] for name, a in rows.items()}
    y = experts_of_rows(rows, sizes[:, me].sum(0), w13, w2)
    y = jnp.zeros_like(y).at[by_expert].set(y, unique_indices=True)

    # And back, to the token that each row is of.
    y = exchange(y, counts.T, tokens * top_k, axis)
    y = jnp.zeros_like(y).at[order].set(y, unique_indices=True).reshape(tokens, top_k, -1)
    return jnp.einsum("tjk,tj->tk", y.astype(jnp.float32), weights).astype(x.dtype)


def bytes_of_a_row(how: str) -> int:
    """What is sent of a token to an expert."""
    return 2 * HIDDEN if how == "bfloat16" else HIDDEN // 2 + HIDDEN // 16 + 4


def problem(tokens: int) -> tuple[Any, ...]:
    """Random tokens, a router's choice and experts; each gate and up with a scale of its own."""
    keys = iter(jax.random.split(jax.random.key(0), 6))

    def kernel(n: int, k: int) -> Any:
        values = jax.random.normal(next(keys), (EXPERTS, n, k), jnp.float32) * k**-0.5
        return jax.jit(jax.vmap(nvfp4.quantize))(values)

    w13 = nvfp4.gate_up(kernel(INTERMEDIATE, HIDDEN), kernel(INTERMEDIATE, HIDDEN))
    w2 = kernel(HIDDEN, INTERMEDIATE)
    x = jax.random.normal(next(keys), (tokens, HIDDEN), jnp.bfloat16)
    logits = jax.random.normal(next(keys), (tokens, EXPERTS))
    weights, indices = jax.lax.top_k(jax.nn.softmax(logits), TOP_K)
    return x, indices, weights, w13, w2


def run() -> dict[str, float]:
    """The largest difference from one device, relative to the largest output, of each way."""
    devices = len(jax.devices())
    mesh = jax.make_mesh((devices,), ("experts",), axis_types=(AxisType.Auto,))
    x, indices, weights, w13, w2 = problem(TOKENS_OF_A_DEVICE * devices)
    mlp = functools.partial(nvfp4.expert_mlp, activation=nvfp4.SwiGLU())
    one_device = jax.jit(mlp)(x, w13, w2, indices, weights)

    by_experts = NamedSharding(mesh, P("experts"))
    w13, w2 = (jax.device_put(nvfp4.repack(pad_experts(w, devices)), by_experts) for w in (w13, w2))
    found = {"experts divided, plain jit": jax.jit(mlp)(x, w13, w2, indices, weights)}
    for how in ("bfloat16", "codes"):
        local = jax.shard_map(
            functools.partial(moe_of_device, axis="experts", how=how),
            mesh=mesh,
            in_specs=P("experts"),
            out_specs=P("experts"),
        )
        found[f"tokens exchanged as {how}"] = jax.jit(local)(x, indices, weights, w13, w2)
    largest = jnp.abs(one_device).max().astype(jnp.float32)
    return {
        name: float(jnp.abs(y.astype(jnp.float32) - one_device.astype(jnp.float32)).max() / largest)
        for name, y in found.items()
    }


def main() -> None:
    print(f"{EXPERTS} experts, top {TOP_K}, on {len(jax.devices())} devices")
    for name, difference in run().items():
        print(f"{name:30} differs from one device by {difference:.1e} of the largest output")
    out, codes = bytes_of_a_row("bfloat16"), bytes_of_a_row("codes")
    print(f"a token on its way out: {out} bytes as bfloat16, {codes} as codes ({out / codes:.2f}x)")


if __name__ == "__main__":
    main()
