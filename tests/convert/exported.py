"""Tiny pruned models of every family flavour, and their exports loaded in PyTorch."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, dynamic_module_utils

from intraslice_jax.config import LayerShape, ModelConfig, RopeConfig
from intraslice_jax.model import LanguageModel
from intraslice_jax.models.decoder import Decoder, abstract_arrays, decoder_from_arrays

VOCAB = 61
TOKENS = np.random.default_rng(7).integers(2, VOCAB, (2, 40), dtype=np.int32)

# Ragged groups, one head each, uniform groups; values narrower and wider than queries and keys.
RAGGED = LayerShape((0, 0, 0, 1, 2, 2), 6, 6, 4, 24)
LAYERS = (RAGGED, LayerShape((0, 1, 2), 4, 4, 8, 16), LayerShape((0, 0, 1, 1), 8, 8, 8, 20))
PARTIAL = (LayerShape((0, 1, 1), 7, 4, 5, 24), LayerShape((0, 1, 2, 3), 6, 2, 8, 16))


def _windows(layers: tuple[LayerShape, ...], *windows: int | None) -> tuple[LayerShape, ...]:
    return tuple(LayerShape(**{**vars(s), "sliding_window": w}) for s, w in zip(layers, windows, strict=True))


def _rope(rope_type: str, **parameters: Any) -> RopeConfig:
    return RopeConfig(10000.0, rope_type, tuple(sorted(parameters.items())))


_PHI = {
    "rotary_dim": 4,
    "norm": "layer",
    "norm_eps": 1e-5,
    "parallel_block": True,
    "gated_mlp": False,
    "hidden_act": "gelu_new",
    "attention_bias": True,
    "attention_output_bias": True,
    "mlp_bias": True,
    "lm_head_bias": True,
}
_LONGROPE = _rope(
    "longrope",
    short_factor=(1.0, 1.1, 1.3),
    long_factor=(1.5, 3.0, 7.0),
    original_max_position_embeddings=16,
)
_LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
FLAVOURS: dict[str, tuple[tuple[LayerShape, ...], dict[str, Any]]] = {
    "llama": (LAYERS, {"tie_word_embeddings": True}),
    "llama biases": (LAYERS, {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}),
    "llama llama3": (LAYERS, {"rope": _LLAMA3}),
    "llama linear": (LAYERS, {"rope": _rope("linear", factor=2.5)}),
    "llama dynamic": (LAYERS, {"rope": _rope("dynamic", factor=2.0), "max_position_embeddings": 24}),
    "llama yarn": (LAYERS, {"rope": _rope("yarn", original_max_position_embeddings=16)}),
    "mistral": (_windows(LAYERS, 5, 5, 5), {}),
    "qwen2": (_windows(LAYERS, None, 6, None), {"attention_bias": True, "tie_word_embeddings": True}),
    # A layer that does not rotate.
    "smollm3": ((*LAYERS, LayerShape((0, 0, 1), 5, 0, 6, 16)), {"tie_word_embeddings": True}),
    "phi": (PARTIAL, _PHI),
    "phi3": (PARTIAL, {"rotary_dim": 6, "rope": _LONGROPE, "tie_word_embeddings": True}),
}


def make(flavour: str, seed: int = 0, **changes: Any) -> LanguageModel:
    """A pruned model with random weights, biases and RoPE pairs, and no tokenizer."""
    layers, features = FLAVOURS[flavour]
    fields = {"rotary_dim": 8, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": (1,)}
    fields |= features | {"layers": layers} | changes
    return with_random_weights(ModelConfig(flavour.split(" ")[0], VOCAB, 16, head_dim=8, **fields), seed)


def with_random_weights(config: ModelConfig, seed: int = 0, identity_pairs: bool = False) -> LanguageModel:
    """A model whose logits are of the order of 1."""
    arrays = random_arrays(config, np.random.default_rng(seed), identity_pairs)
    return LanguageModel(config, decoder_from_arrays(config, arrays), None, f"tiny {config.model_type}")


def random_arrays(config: ModelConfig, rng: np.random.Generator, identity_pairs: bool = False) -> dict[str, np.ndarray]:
    """Weights by path."""
    arrays = {}
    for name, want in abstract_arrays(config).items():
        if name.endswith("rope_pairs"):
            pairs = [rng.permutation(config.rotary_dim // 2)[: want.shape[1]] for _ in range(want.shape[0])]
            pairs = np.sort(pairs) if not identity_pairs else [np.arange(want.shape[1])] * want.shape[0]
            arrays[name] = np.asarray(pairs, np.int32).reshape(want.shape)
        else:
            values = rng.standard_normal(want.shape)
            if name.endswith("norm.weight"):
                values = 1 + 0.1 * values
            elif name.endswith("bias"):
                values = 0.2 * values
            elif "embed" not in name:
                fan_in = config.hidden_size if not name.endswith(("o_proj", "down_proj")) else want.shape[0] * 2
                values = 1.5 * values / np.sqrt(fan_in)
            arrays[name] = values.astype(np.float32)
    return arrays


@contextlib.contextmanager
def quiet_torch(folder: Path) -> Iterator[None]:
    """One thread, no progress bars, and modelling files of exports imported from `folder`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))
        patch.setattr(sys, "path", list(sys.path))
        transformers.utils.logging.disable_progress_bar()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the models are tiny
        yield
        torch.set_num_threads(threads)
        transformers.utils.logging.enable_progress_bar()


def in_torch(folder: Any, attention: str = "sdpa", **options: Any) -> Any:
    """The export as a PyTorch user loads it; nothing may be missing, left over or newly initialised."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, attn_implementation=attention, output_loading_info=True, **options
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    return model


def our_logits(decoder: Decoder, tokens: np.ndarray) -> np.ndarray:
    """Logits [batch, seq, vocab] of the JAX model."""
    return np.asarray(decoder(jnp.asarray(tokens)))


def torch_logits(model: Any, tokens: np.ndarray, **options: Any) -> np.ndarray:
    """Logits [batch, seq, vocab] in float32."""
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long(), **options).logits.float().numpy()


def greedy(model: Any, prompt: np.ndarray, new: int, **options: Any) -> np.ndarray:
    """Greedy continuation, end tokens ignored: [batch, prompt + new]."""
    prompt_tensor = torch.from_numpy(prompt).long()
    options = {"attention_mask": torch.ones_like(prompt_tensor), **options}
    return model.generate(
        prompt_tensor, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0, **options
    ).numpy()
