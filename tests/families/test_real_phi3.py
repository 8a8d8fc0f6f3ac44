"""Real weights through Phi-3's code path: SmolLM2 with its projections fused is the same model."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from intraslice_jax.calibrate.data import encode
from intraslice_jax.calibrate.windows import consecutive_windows, sample_windows
from intraslice_jax.config import PruneConfig
from intraslice_jax.convert import export, load
from intraslice_jax.convert.families import FAMILIES
from intraslice_jax.evaluate.perplexity import perplexity
from intraslice_jax.models.decoder import decoder_from_arrays, decoder_to_arrays
from intraslice_jax.prune.pipeline import prune_model
from tests.convert.exported import our_logits

LAYERS = 4  # that are pruned: enough for errors to travel


def repack(source, folder):
    """The stock Llama folder as a Phi-3 checkpoint."""
    folder.mkdir()
    weights = load_file(source / "model.safetensors")
    raw = json.loads((source / "config.json").read_text())
    for i in range(raw["num_hidden_layers"]):
        attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        for fused, parts in (
            (f"{attention}qkv_proj", [f"{attention}{part}_proj" for part in "qkv"]),
            (f"{mlp}gate_up_proj", [f"{mlp}{part}_proj" for part in ("gate", "up")]),
        ):
            weights[f"{fused}.weight"] = np.concatenate([weights.pop(f"{part}.weight") for part in parts])
    save_file(weights, folder / "model.safetensors")
    changes = {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "sliding_window": None}
    (folder / "config.json").write_text(json.dumps(raw | changes))
    return folder


def first_layers(model, count):
    """The model cut off behind its first layers."""
    arrays = {
        path: array
        for path, array in decoder_to_arrays(model.decoder).items()
        if not path.startswith("layers.") or int(path.split(".")[1]) < count
    }
    config = model.config.with_layers(model.config.layers[:count])
    return dataclasses.replace(model, config=config, decoder=decoder_from_arrays(config, arrays))


@pytest.mark.slow
def test_smollm2_as_phi3(smollm2_gguf, calibration_texts, tmp_path):
    llama = load(smollm2_gguf, "float32")
    # The GGUF names what a Llama config.json holds; the stock export writes it.
    phi3 = load(repack(export(llama, tmp_path / "llama"), tmp_path / "phi3"))
    assert FAMILIES["Phi3ForCausalLM"].model_type == phi3.config.model_type != llama.config.model_type
    stream = encode(llama.require_tokenizer(), (calibration_texts / "tiny.utf8").read_text("utf-8"))
    tokens = jnp.asarray(stream[None, :64])
    np.testing.assert_array_equal(our_logits(phi3.decoder, tokens), our_logits(llama.decoder, tokens))

    windows, held_out = sample_windows(stream[:40000], 4, 64, 0), consecutive_windows(stream[40000:], 64, 8)
    results = []
    for model in (llama, phi3):
        pruned = prune_model(first_layers(model, LAYERS), windows, PruneConfig(0.3))
        assert abs(pruned.report["removed_block_fraction"] - 0.3) < 0.005
        results.append((pruned.config.layers, perplexity(pruned, held_out).perplexity))
    assert results[0] == results[1]
