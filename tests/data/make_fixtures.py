# SPDX-License-Identifier: Apache-2.0
"""Make the checkpoint fixtures of this folder with the real producers, on the CPU.

Each fixture is a Hugging Face style folder written by NVIDIA ModelOpt or by compressed-tensors,
and `expected.npz` beside its tensors: every quantized weight as the producer itself dequantizes
it. Needs torch, transformers, nvidia-modelopt and compressed-tensors (README.md has the versions);
the tests that read the fixtures need none of them.

    python make_fixtures.py            # rewrites the folders next to this file
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import numpy as np
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.nvfp4 import unpack_fp4_from_uint8
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.lifecycle.forward import dequantize
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization.nn.modules.tensor_quantizer import register_quant_backend
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from safetensors import safe_open
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

HERE = Path(__file__).parent
VOCAB = 40


def tiny_qwen2() -> Qwen2ForCausalLM:
    """One decoder layer in bf16: q/k/v with bias, K of 32 and 48, N of 16, 32 and 48."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        architectures=["Qwen2ForCausalLM"],
        dtype=torch.bfloat16,
    )
    model = Qwen2ForCausalLM(config).to(torch.bfloat16).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn_like(parameter))
        # A block of zeros, a row of zeros and an outlier: the corners of block scaling.
        weight = model.model.layers[0].mlp.gate_proj.weight
        weight[3, 16:32] = 0
        weight[5] = 0
        weight[7, 9] = 3.0
    return model


def calibrate(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _ in range(4):
            model(torch.randint(0, VOCAB, (2, 16), generator=generator))


def split_in_two_shards(folder: Path) -> None:
    """Save `model.safetensors` again as two shards and an index.

    The cut falls between a weight and its scales.
    """
    from safetensors.torch import save_file

    with safe_open(folder / "model.safetensors", framework="pt") as f:
        tensors = {name: f.get_tensor(name) for name in sorted(f.keys())}
    names = list(tensors)
    cut = next(i for i, n in enumerate(names) if n.endswith("o_proj.weight_scale"))
    weight_map: dict[str, str] = {}
    for i, part in enumerate((names[:cut], names[cut:]), start=1):
        shard = f"model-{i:05d}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "model.safetensors").unlink()


def write_expected(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    """Write float32 values; bf16 ones widen exactly."""
    arrays = {name: tensor.detach().float().numpy() for name, tensor in expected.items()}
    np.savez_compressed(folder / "expected.npz", **arrays)


# --- ModelOpt ------------------------------------------------------------------------------------


def modelopt_cpu_fake_quant(inputs: torch.Tensor, quantizer: Any) -> torch.Tensor:
    """Fake quantization by ModelOpt's `NVFP4QTensor`, which runs on the CPU.

    ModelOpt's own fake quantization of dynamic blocks is a CUDA kernel; AWQ's search for a
    smoothing scale calls it. This is the hook that ModelOpt offers for another backend.
    """
    quantized, scale, scale_2 = NVFP4QTensor.quantize(inputs.detach().clone(), 16)
    return quantized.dequantize(
        dtype=inputs.dtype, scale=scale, double_scale=scale_2, block_sizes={-1: 16}
    )


def modelopt_expected(folder: Path) -> dict[str, torch.Tensor]:
    """Dequantize each NVFP4 weight of an exported folder with ModelOpt's own code, in float32."""
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as f:
            tensors |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    expected: dict[str, torch.Tensor] = {}
    for name, scale_2 in tensors.items():
        if not name.endswith(".weight_scale_2"):
            continue
        weight = name.removesuffix("_scale_2")
        packed = tensors[weight]
        shape = torch.Size((packed.shape[0], packed.shape[1] * 2))
        expected[weight] = NVFP4QTensor(shape, torch.float32, packed).dequantize(
            dtype=torch.float32,
            scale=tensors[weight + "_scale"],
            double_scale=scale_2,
            block_sizes={-1: 16},
        )
    return expected


def make_modelopt(
    name: str, config: dict[str, Any], model: torch.nn.Module | None = None, sharded: bool = False
) -> None:
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    quantized = mtq.quantize(model or tiny_qwen2(), copy.deepcopy(config), calibrate)
    export_hf_checkpoint(quantized, export_dir=folder)
    if sharded:
        split_in_two_shards(folder)
    write_expected(folder, modelopt_expected(folder))


def with_cpu_backend(config: dict[str, Any]) -> dict[str, Any]:
    config = copy.deepcopy(config)
    for row in config["quant_cfg"]:
        if row["quantizer_name"] in ("*weight_quantizer", "*input_quantizer"):
            row["cfg"]["backend"] = "nvfp4_cpu"
    return config


def svdquant() -> dict[str, Any]:
    """SVDQuant with a rank that suits the size of the model."""
    config = copy.deepcopy(mtq.NVFP4_SVDQUANT_DEFAULT_CFG)
    config["algorithm"] = {"method": "svdquant", "lowrank": 4}
    return config


def mixed_precision() -> dict[str, Any]:
    """NVFP4 for the MLP, FP8 for the attention."""
    config = copy.deepcopy(mtq.NVFP4_DEFAULT_CFG)
    fp8 = {"num_bits": (4, 3), "axis": None}
    config["quant_cfg"] += [
        {"quantizer_name": "*self_attn*weight_quantizer", "cfg": fp8},
        {"quantizer_name": "*self_attn*input_quantizer", "cfg": fp8},
    ]
    return config


def tiny_gpt_oss() -> GptOssForCausalLM:
    """Experts in one 3-D parameter, which ModelOpt stores transposed."""
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        max_position_embeddings=32,
        architectures=["GptOssForCausalLM"],
        dtype=torch.bfloat16,
    )
    return GptOssForCausalLM(config).to(torch.bfloat16).eval()


# --- compressed-tensors --------------------------------------------------------------------------


def largest_inputs(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The amax of the calibration activations that enter each linear."""
    amax: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen = args[0].detach().float().abs().amax()
            amax[name] = torch.maximum(amax.get(name, seen), seen)

        return hook

    hooks = [
        module.register_forward_pre_hook(watch(name))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    calibrate(model)
    for hook in hooks:
        hook.remove()
    return amax


def compressed_tensors_set_scales(model: torch.nn.Module, amax: dict[str, torch.Tensor]) -> None:
    """Set the scales of each quantized linear with compressed-tensors' own formulas.

    The observers that usually call these live in llm-compressor.
    """
    for name, module in model.named_modules():
        if not hasattr(module, "quantization_scheme"):
            continue
        weight, args = module.weight.data.float(), module.quantization_scheme.weights
        global_scale = generate_gparam(weight.amin(), weight.amax())
        blocks = weight.unflatten(-1, (-1, args.group_size))
        scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, global_scale)
        module.weight_global_scale.data.copy_(global_scale)
        module.weight_scale.data = scale
        if module.quantization_scheme.input_activations is not None:
            module.input_global_scale.data.copy_(generate_gparam(-amax[name], amax[name]))


def compressed_tensors_expected(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What `decompress_model` gives (bf16), and the same computation kept in float32.

    compressed-tensors unpacks codes to bf16, which holds them exactly, computes in float32 and
    rounds the product to bf16. The float32 values come from the same function, `dequantize`, asked
    for another output dtype. Keys: NAME and NAME:float32.
    """
    expected = {}
    for name, module in model.named_modules():
        if hasattr(module, "weight_packed"):
            rows, half = module.weight_packed.shape
            expected[f"{name}.weight:float32"] = dequantize(
                x_q=unpack_fp4_from_uint8(module.weight_packed, rows, half * 2, torch.float32),
                scale=module.weight_scale.to(torch.float32),
                args=module.quantization_scheme.weights,
                global_scale=module.weight_global_scale,
                dtype=torch.float32,
            )
    return expected


def make_compressed_tensors(name: str, preset: str, sharded: bool = False) -> None:
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    model = tiny_qwen2()
    amax = largest_inputs(model)
    scheme: QuantizationScheme = preset_name_to_scheme(preset, targets=["Linear"])
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    compressed_tensors_set_scales(model, amax)

    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    expected = compressed_tensors_expected(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    if sharded:
        split_in_two_shards(folder)

    compressor.decompress_model(model)
    for weight in [key.removesuffix(":float32") for key in expected]:
        expected[weight] = model.get_parameter(weight)
        assert expected[weight].dtype == torch.bfloat16
    write_expected(folder, expected)


def main() -> None:
    """Write all fixtures."""
    torch.set_num_threads(1)  # the same sums, so the same calibrated scales, on every run
    register_quant_backend("nvfp4_cpu", modelopt_cpu_fake_quant)
    make_modelopt("modelopt_nvfp4", mtq.NVFP4_DEFAULT_CFG)
    make_modelopt("modelopt_w4a16_nvfp4", mtq.W4A16_NVFP4_CFG, sharded=True)
    make_modelopt("modelopt_nvfp4_awq", with_cpu_backend(mtq.NVFP4_AWQ_LITE_CFG))
    make_modelopt("modelopt_nvfp4_svd", with_cpu_backend(svdquant()))
    make_modelopt("modelopt_mixed_precision", mixed_precision())
    make_modelopt("modelopt_stacked_experts", mtq.NVFP4_DEFAULT_CFG, tiny_gpt_oss())
    make_compressed_tensors("compressed_tensors_nvfp4", "NVFP4")
    make_compressed_tensors("compressed_tensors_nvfp4a16", "NVFP4A16", sharded=True)
    for extra in HERE.glob("*/generation_config.json"):
        extra.unlink()


if __name__ == "__main__":
    main()
