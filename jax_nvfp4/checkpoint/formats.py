# SPDX-License-Identifier: Apache-2.0
"""What the two formats have in common: a quantized linear layer X is a set of tensors `X.part`.

    ours             ModelOpt          compressed-tensors     dtype, shape
    X.weight         weight            weight_packed          uint8 [..., N, K/2]
                     weight_scale      weight_scale           float8_e4m3fn [..., N, K/16]
                     weight_scale_2    weight_global_scale    float32 scalar, or [...]
    X.input_scale    input_scale       input_global_scale     float32 scalar, or [...], optional
    X.pre_quant_scale  pre_quant_scale                        [K], optional

ModelOpt's global scales multiply on dequantization; compressed-tensors' divide.

Experts that a model keeps in one parameter P are stored as `P`, `P_weight_scale`,
`P_weight_scale_2`, `P_input_scale` and `P_bias`, either as above or transposed, [G, K/2, N] and
[G, K/16, N]; here they are a layer X = P as all others. gpt-oss interleaves gate and up in its
`gate_up_proj`; here gate comes first, then up, in the rows of the weight and in the bias.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jax_nvfp4.checkpoint import layouts, mxfp4
from jax_nvfp4.checkpoint.errors import CheckpointError
from jax_nvfp4.checkpoint.files import Entry, Folder, empty, read
from jax_nvfp4.checkpoint.layouts import LINEAR, Layout
from jax_nvfp4.layout import swizzle
from jax_nvfp4.numerics import BLOCK, GLOBAL_SCALE_MAX, GLOBAL_SCALE_MIN

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_LARGEST_FINITE_E4M3 = 0x7E
WIDE_FLOATS = tuple(np.dtype(d) for d in (ml_dtypes.bfloat16, np.float16, np.float32))


@dataclasses.dataclass(frozen=True)
class Format:
    """How a producer names and means the tensors of a quantized linear layer.

    Attributes:
        name: for messages.
        data: the suffix of the packed codes; so the other three.
        block_scale: of the block scales.
        global_scale: of the weight's global scale.
        input_scale: of the activations' global scale.
        reciprocal: the global scales divide on dequantization.
        is_quantized: whether the tensors of layer X, by suffix, are those of an NVFP4 layer.
        refuse: raises for a quantized layer, or another tensor, that means something else here.
        layout: the order of a quantized layer's bytes; raises where it cannot be told.
        interleaved: whether the rows of a layer are those of gate and up in turn.
    """

    name: str
    data: str
    block_scale: str
    global_scale: str
    input_scale: str
    reciprocal: bool
    is_quantized: Callable[[Mapping[str, Entry]], bool]
    refuse: Callable[[str], None] = lambda name: None
    layout: Callable[[str], Layout] = lambda name: LINEAR
    interleaved: Callable[[str], bool] = lambda name: False


@dataclasses.dataclass(frozen=True)
class Linear:
    """The stored tensors of one NVFP4 linear layer.

    Attributes:
        name: X, the layer.
        parts: its tensors by suffix (`weight_scale`, `bias`, ...).
        format: what the suffixes mean.
    """

    name: str
    parts: Mapping[str, Entry]
    format: Format

    def key(self, suffix: str) -> str:
        """The key of a tensor of this layer, as `load_checkpoint` returns it."""
        return f"{self.name}.{suffix}" if self.name else suffix

    @property
    def is_one_parameter(self) -> bool:
        """Whether its tensors are `P`, `P_weight_scale`, ... and not `X.weight`, ..."""
        return any(split_name(part.name)[0] != self.name for part in self.parts.values())

    def _part(self, suffix: str) -> Entry:
        if suffix not in self.parts:
            name = f"{self.name}_{suffix}" if self.is_one_parameter else self.key(suffix)
            name = name.removesuffix("_weight") if self.is_one_parameter else name
            there = ", ".join(sorted(self.parts))
            raise CheckpointError(f"tensor {name!r} is missing; its NVFP4 layer has only: {there}")
        return self.parts[suffix]

    def _order(self, rows: int) -> np.ndarray | None:
        """The order that puts the rows of gate before those of up; None where they are so."""
        if not self.format.interleaved(self.name):
            return None
        if rows % 2:
            raise CheckpointError(f"layer {self.name!r} has {rows} rows, expected gate and up")
        return np.r_[0:rows:2, 1:rows:2]

    def read_weight(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Reads the weight.

        Returns:
            (data, block_scale, global_scale): uint8 (..., N, K/2), float8_e4m3fn (..., N, K/16),
            and a float32 global scale that multiplies, () or the axes before N.

        Raises:
            CheckpointError: a part is missing, of the wrong shape or dtype, or a scale is NaN,
                infinite or negative, or a global scale 0.
        """
        if (stored := mxfp4.parts_of(self.parts)) is not None:
            return mxfp4.read_weight(*stored, self._order)
        self.format.refuse(self.name)
        layout = self.format.layout(self.name)
        data = self._part(self.format.data)
        block_scale = self._part(self.format.block_scale)
        global_scale = self._part(self.format.global_scale)
        if _is_transposed(data, block_scale):
            return self._read_transposed(data, block_scale, global_scale)

        require(
            data,
            np.dtype(np.uint8),
            len(data.shape) >= 2 and data.shape[-1] * 2 % BLOCK == 0,
            f"[..., N, K/2] with K a multiple of {BLOCK}",
        )
        blocks = (*data.shape[:-1], data.shape[-1] * 2 // BLOCK)
        stored_shape = _swizzled_shape(data, blocks) if layout.swizzled else blocks
        require(block_scale, E4M3, block_scale.shape == stored_shape, f"{list(stored_shape)}")
        multiplier = self._read_multiplier(global_scale, data.shape[:-2])
        if self.is_one_parameter:
            multiplier = np.array(np.broadcast_to(multiplier, data.shape[:-2]))
        codes = read(data)
        if layout.high_first:
            codes = (codes << 4) | (codes >> 4)
        return codes, _read_block_scale(block_scale, blocks, layout), multiplier

    def _read_transposed(
        self, data: Entry, block_scale: Entry, global_scale: Entry
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Reads experts [G, K/2, N], one by one into the arrays that are returned."""
        require(data, np.dtype(np.uint8), True, "")
        require(block_scale, E4M3, True, "")
        count, half, n = data.shape
        order = self._order(n)
        codes = empty((count, n, half), data.dtype)
        scales = empty((count, n, half * 2 // BLOCK), E4M3)
        for i in range(count):
            columns = slice(None) if order is None else order
            codes[i] = read(data.part(i)).T[columns]
            part = block_scale.part(i)
            scales[i] = _read_block_scale(part, part.shape, LINEAR).T[columns]
        multiplier = self._read_multiplier(global_scale, (count,))
        return codes, scales, np.array(np.broadcast_to(multiplier, (count,)))

    def _read_multiplier(self, entry: Entry, leading: tuple[int, ...]) -> np.ndarray:
        """Reads the weight's global scale: () or one for each matrix."""
        shapes = [(), leading, (*leading, 1), (*leading, 1, 1)] if leading else [(), (1,)]
        require(
            entry,
            np.dtype(np.float32),
            entry.shape in shapes,
            " or ".join(str(list(shape)) for shape in shapes),
        )
        value = self._read_global_scale(entry)
        return value.reshape(leading) if entry.shape else value

    def read_bias(self) -> np.ndarray:
        """Reads the bias (G, N) of experts in one parameter, in the order of the weight's rows."""
        entry = self.parts["bias"]
        value = read(entry)
        order = self._order(entry.shape[-1]) if entry.shape else None
        return value if order is None else np.ascontiguousarray(value[..., order])

    def read_input_scale(self) -> np.ndarray:
        """Reads the activations' global scale: float32, () or the leading axes; it multiplies."""
        entry = self.parts[self.format.input_scale]
        data = self.parts.get(self.format.data, self.parts.get("blocks"))
        lead = data.shape[:-2] if data is not None else ()
        shapes = [(), (1,), lead] if lead else [(), (1,)]
        fits = " or ".join(str(list(shape)) for shape in shapes)
        require(entry, np.dtype(np.float32), entry.shape in shapes, fits)
        value = self._read_global_scale(entry)
        return value if lead and value.shape == lead else value.reshape(())

    def read_pre_quant_scale(self) -> np.ndarray:
        """Reads what to multiply the activations by before they are quantized: [K]."""
        entry = self.parts["pre_quant_scale"]
        *lead, _, half = self._part(self.format.data).shape
        k = half * 2
        dtype = entry.dtype if entry.dtype in WIDE_FLOATS else WIDE_FLOATS[0]
        require(entry, dtype, entry.shape in ((k,), (*lead, k)), f"{[*lead, k]}")
        value = read(entry)
        require_positive(entry, value)
        return value

    def _read_global_scale(self, entry: Entry) -> np.ndarray:
        value = read(entry)
        require_positive(entry, value, GLOBAL_SCALE_MIN, GLOBAL_SCALE_MAX)
        return np.float32(1) / value if self.format.reciprocal else value


def require(entry: Entry, dtype: np.dtype[Any], shape_fits: bool, shape: str) -> None:
    """Raises unless a tensor has the dtype and shape that its role asks for."""
    if entry.dtype != dtype or not shape_fits:
        raise CheckpointError(
            f"{entry.file}: tensor {entry.name!r} is {entry}, expected {dtype.name}{shape}"
        )


def require_positive(
    entry: Entry, value: np.ndarray, smallest: float = 0.0, largest: float = np.inf
) -> None:
    """Raises unless all values are positive, finite and in [smallest, largest]."""
    wide = value.astype(np.float32)
    good = np.isfinite(wide) & (wide > 0) & (wide >= smallest) & (wide <= largest)
    if not good.all():
        where = tuple(int(i) for i in np.argwhere(~good)[0])
        at = f" at {list(where)}" if where else ""
        limits = f" in [{smallest:g}, {largest:g}]" if smallest else ""
        raise CheckpointError(
            f"{entry.file}: tensor {entry.name!r} is {wide[where]}{at}; "
            f"a scale must be positive and finite{limits}"
        )


def _is_transposed(data: Entry, block_scale: Entry) -> bool:
    """Whether experts are [G, K/2, N] and [G, K/16, N], and not [G, N, K/2] and [G, N, K/16]."""
    if len(data.shape) != 3 or len(block_scale.shape) != 3:
        return False
    count, half, n = data.shape
    return half % 8 == 0 and block_scale.shape == (count, half // 8, n)


def _swizzled_shape(data: Entry, blocks: tuple[int, ...]) -> tuple[int, ...]:
    if len(blocks) != 2:
        raise CheckpointError(
            f"{data.file}: tensor {data.name!r} is {data}; of layers whose scales are swizzled "
            "only matrices are supported"
        )
    rows, columns, _ = swizzle.swizzled_shape(*blocks)
    return rows * swizzle.ROWS, columns * swizzle.COLUMNS


def _read_block_scale(entry: Entry, shape: tuple[int, ...], layout: Layout) -> np.ndarray:
    """Reads block scales, which are not negative: as bytes at most 0x7E. Zero blocks may be 0."""
    value = read(entry)
    if layout.swizzled:
        tiles = value.view(np.uint8).reshape(swizzle.swizzled_shape(*shape))
        value = np.ascontiguousarray(swizzle.unswizzle(tiles, *shape)).view(E4M3)
    bits = value.view(np.uint8)
    if bits.size and bits.max() > _LARGEST_FINITE_E4M3:
        bad = bits > _LARGEST_FINITE_E4M3
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise CheckpointError(
            f"{entry.file}: tensor {entry.name!r} has {int(bad.sum())} NaN or negative block "
            f"scales, the first {float(value[where])} at {list(where)}"
        )
    return value


def split_name(name: str) -> tuple[str, str]:
    """Splits the name of a tensor into its layer and what it is there."""
    layer, _, suffix = name.rpartition(".")
    return layer, suffix


_PARTS_OF_A_PARAMETER = {
    "_weight_scale_2": "weight_scale_2",
    "_weight_scale": "weight_scale",
    "_input_scale": "input_scale",
    "_blocks": "blocks",
    "_scales": "scales",
    "_bias": "bias",
}


def place(name: str, entries: Mapping[str, Any]) -> tuple[str, str]:
    """The layer of a tensor and what it is there, with experts in one parameter as a layer.

    Args:
        name: of the tensor.
        entries: all tensors by name, which tell whether a parameter is one of experts.
    """
    if _is_one_parameter(name, entries):
        return name, "weight"
    for ending, suffix in _PARTS_OF_A_PARAMETER.items():
        if name.endswith(ending) and _is_one_parameter(name.removesuffix(ending), entries):
            return name.removesuffix(ending), suffix
    return split_name(name)


def _is_one_parameter(name: str, entries: Mapping[str, Any]) -> bool:
    if f"{name}_weight_scale_2" in entries:
        return True
    if f"{name}_blocks" in entries and f"{name}_scales" in entries:
        return True
    return name in entries and f"{name}_weight_scale" in entries


def by_layer(entries: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The tensors of each layer, by what they are there."""
    layers: dict[str, dict[str, Any]] = {}
    for name, entry in entries.items():
        layer, suffix = place(name, entries)
        layers.setdefault(layer, {})[suffix] = entry
    return layers


def group(folder: Folder, fmt: Format) -> Iterator[Linear | Entry]:
    """Groups the tensors of a checkpoint into quantized layers and others, in the stored order.

    A quantized layer comes where its first tensor lies; tensors that only share its name (a bias)
    come as they are.
    """
    layers = by_layer(folder.entries)
    mx = {layer: found for layer, parts in layers.items() if (found := mxfp4.parts_of(parts))}
    quantized = {layer for layer, parts in layers.items() if fmt.is_quantized(parts)} | set(mx)
    own = {fmt.data, fmt.block_scale, fmt.global_scale, fmt.input_scale, "pre_quant_scale"}
    done = set()
    for name, entry in folder.entries.items():
        layer, suffix = place(name, folder.entries)
        if layouts.consumed(name, quantized):
            continue
        one_parameter = layer in quantized and split_name(name)[0] != layer
        is_part = suffix in own or one_parameter or entry in mx.get(layer, ())
        if layer not in quantized or not is_part:
            yield entry
        elif layer not in done:
            done.add(layer)
            yield Linear(layer, layers[layer], fmt)
