"""Frequencies of every scaling type, for published models' parameters, and activations, against transformers."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from intraslice_jax.convert import hf_config
from intraslice_jax.models.mlp import ACTIVATIONS
from intraslice_jax.models.rope import inverse_frequencies

FACTORS = np.linspace(1, 60, 48).round(3).tolist()
MODELS = {
    "linear": (LlamaConfig, 4096, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0}),
    "dynamic": (LlamaConfig, 4096, {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}),
    "Llama-3.1": (
        LlamaConfig,
        131072,
        {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    ),
    "Yarn-Llama-2": (
        LlamaConfig,
        131072,
        {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
        },
    ),
    "Phi-3.5-mini": (
        Phi3Config,
        131072,
        {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": FACTORS[::-1],
            "long_factor": FACTORS,
            "original_max_position_embeddings": 4096,
        },
    ),
    "Phi-4-mini": (
        Phi3Config,
        131072,
        {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": FACTORS[:36],
            "long_factor": FACTORS[:36],
            "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 0.75,
        },
    ),
}


@pytest.mark.parametrize("length", [1, 4096, 4097, 30000])
@pytest.mark.parametrize("name", MODELS)
def test_inverse_frequencies(name, length):
    kind, positions, rope = MODELS[name]
    theirs = kind(
        hidden_size=768,
        num_attention_heads=8,
        num_hidden_layers=1,
        max_position_embeddings=positions,
        rope_parameters=dict(rope),
        pad_token_id=None,
    )
    raw = theirs.to_dict()
    ours = hf_config.llama(raw) if kind is LlamaConfig else hf_config.phi3(raw)
    expected, expected_factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs, "cpu", seq_len=length)
    # The length is traced where a program is compiled once for all of them.
    for seq_len in (length, jnp.asarray(length)):
        found, factor = inverse_frequencies(ours.rope, ours.rotary_dim, positions, seq_len)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(np.asarray(found), expected.numpy(), rtol=3e-6)
        assert factor == pytest.approx(expected_factor, rel=1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    x = np.linspace(-9, 9, 1001, dtype=np.float32)
    expected = ACT2FN[name](torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(np.asarray(ACTIVATIONS[name](jnp.asarray(x))), expected, atol=2e-6)
