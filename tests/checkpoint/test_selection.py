# SPDX-License-Identifier: Apache-2.0
"""What `quantize` leaves alone, under the names that public models give it."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jax_nvfp4.checkpoint import CheckpointError
from jax_nvfp4.checkpoint.files import Entry, Folder
from jax_nvfp4.checkpoint.selection import Patterns, Roles, refuse_transposed

BF16 = np.dtype(ml_dtypes.bfloat16)


def entries(*names, shape=(64, 32), **shapes):
    shapes = dict.fromkeys((f"{name}.weight" for name in names), shape) | shapes
    return {name: Entry(name, BF16, size, Path("x"), 0) for name, size in shapes.items()}


def role(layer, *others, config=None, shape=(64, 32)):
    return Roles(entries(layer, *others, shape=shape), config or {}).role(f"{layer}.weight")


@pytest.mark.parametrize(
    "layer",
    [
        "shared",  # T5
        "encoder.shared",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        "transformer.wte",
        "transformer.wpe",
        "transformer.word_embeddings",  # Falcon, BLOOM
        "tok_embeddings",  # Llama's own, InternLM2
        "gpt_neox.embed_in",
        "backbone.embeddings",  # Mamba
        "tokens_embed",
        "rwkv.emb",
        "vision_model.embeddings.position_embedding",
        "model.pos_emb",
    ],
)
def test_embeddings(layer):
    assert role(layer) == "an embedding"


@pytest.mark.parametrize(
    "layer",
    [
        "output",  # Llama's own, InternLM2
        "language_model.output",
        "transformer.output_layer",  # ChatGLM
        "transformer.ff_out",  # OLMo
        "score",
        "classifier",
        "classifier.out_proj",
        "cls.predictions.decoder",
        "qa_outputs",
        "v_head",
        "proj_out",  # Whisper
        "talker.codec_head",
        "lm_heads.3",
        "model.layers.61.shared_head.head",  # DeepSeek's next-token layer
        "head",
    ],
)
def test_output_heads(layer):
    assert role(layer) == "an output head"


@pytest.mark.parametrize(
    "layer",
    [
        "backbone.layers.1.mixer.gate",
        "layers.0.ffn.gate",
        "model.layers.2.feed_forward.gate",
        "model.layers.3.moe.gate",
        "model.layers.3.mlp.gate",
        "model.layers.3.block_sparse_moe.gate",
        "model.layers.3.block_sparse_moe.router.layer",  # Granite
        "model.layers.3.mlp.gate.wg",  # Hunyuan
        "model.layers.3.mlp.shared_expert_gate",
        "encoder.block.1.layer.1.mlp.router.classifier",  # Switch
        "transformer.blocks.0.ffn.router.layer",  # DBRX
    ],
)
def test_routers(layer):
    assert role(layer) == "a router"


@pytest.mark.parametrize(
    "layer",
    [
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.gate_up_proj",
        "model.layers.0.mlp.shared_expert.gate_proj",
        "model.layers.0.mlp.experts.3.gate_proj",
        "bert.encoder.layer.0.attention.output.dense",
        "bert.encoder.layer.0.output.dense",
        "decoder.block.0.layer.0.SelfAttention.o",
        "transformer.h.0.mlp.dense_h_to_4h",
        "transformer_blocks.0.proj_out",
        "model.layers.0.self_attn.out_proj",
        "bert.pooler.dense",
        "model.layers.0.shared_transformer.feed_forward.linear_fc1",
    ],
)
def test_projections(layer):
    assert role(layer, config={"vocab_size": 1000, "type_vocab_size": 2}) is None


def test_roles_by_the_model_rather_than_the_name():
    """The rows of a vocabulary, padded or not; one row for each expert; siblings."""
    nested = {"text_config": {"vocab_size": 60}}
    assert role("model.lookup", config=nested) == "an embedding or an output head"
    assert role("model.layers.0.lookup", config=nested) is None
    assert role("model.unknown", "model.word_table") == "an embedding or an output head"
    experts = [f"mlp.experts.{i}.up" for i in range(64)]
    assert role("mlp.choose", *experts) == "a router"
    assert role("mlp.choose", *experts[:63]) is None
    assert role("layers.0.mlp.gate", "layers.0.mlp.up", "layers.0.mlp.down") is None


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("re:.*q_proj$", ["model.layers.0.self_attn.q_proj.weight"]),
        ("model.layers.1.mlp", ["model.layers.1.mlp.up_proj.weight"]),
        ("*.SELF_attn", ["model.layers.0.self_attn.q_proj.weight"]),
        ("*up_proj.weight", ["model.layers.1.mlp.up_proj.weight"]),
        ("model.layers.1.m", []),
        ("re:q_proj", []),  # a regular expression matches from the start
    ],
)
def test_patterns(pattern, matches):
    patterns = Patterns([pattern])
    names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    assert [name for name in names if patterns.match(name)] == matches
    assert patterns.unmatched == ([] if matches else [pattern])


def test_pattern_that_is_not_valid():
    with pytest.raises(CheckpointError, match="'re:\\*' is not a regular expression"):
        Patterns(["re:*"])


@pytest.mark.parametrize(
    ("config", "shapes", "expected"),
    [
        ({"model_type": "gpt2"}, {}, "the model is of type 'gpt2'"),
        ({"architectures": ["GPT2LMHeadModel"]}, {}, "'GPT2LMHeadModel'"),
        ({"decoder": {"model_type": "gpt2"}}, {}, "its 'decoder' is of type 'gpt2'"),
        (
            {},
            {"h.0.attn.c_attn.weight": (32, 96), "h.0.attn.c_attn.bias": (96,)},
            "'h.0.attn.c_attn.weight' is .* with a bias of 96",
        ),
    ],
)
def test_transposed_models(config, shapes, expected):
    folder = Folder(Path("x"), (), None, entries("a", **shapes), {})
    with pytest.raises(CheckpointError, match=expected):
        refuse_transposed(folder, config)
