"""Any model goes out by any export and comes back the same, or is refused where docs/exports.md says so.

`ROUNDTRIPS=300` tries as many random models as it says instead of the few that the suite has time for.
"""

import json
import os

import numpy as np
import pytest

import intraslice_jax as isl
from intraslice_jax.model import StoredModel
from intraslice_jax.models.decoder import decoder_to_arrays
from tests.convert.exported import make, our_logits, quiet_torch
from tests.convert.reference import numpy_logits
from tests.convert.roundtrips import FORMS, TOKENS, VOCAB, byte_level, random_model, round_trip
from tests.tiny import tiny_text, write_tiny_llama

COUNT = int(os.environ.get("ROUNDTRIPS", "16"))
# Layers of different widths, longrope, RoPE pairs in another order, half of a head of two channels, layers that do not
# rotate beside layers that kept every pair (gguf).
FAILED_ONCE = (16, 17, 38, 40, 55, 68)


@pytest.fixture(scope="module", autouse=True)
def _quiet(tmp_path_factory):
    with quiet_torch(tmp_path_factory.mktemp("modules")):
        yield


@pytest.mark.parametrize("flavour", ["llama yarn", "qwen2", "smollm3", "phi", "phi3"])
def test_the_reference_is_our_forward_pass(flavour):
    model = make(flavour)
    tokens = TOKENS % model.config.vocab_size
    want = numpy_logits(model.config, decoder_to_arrays(model.decoder), tokens)
    np.testing.assert_allclose(our_logits(model.decoder, tokens), want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("seed", sorted({*range(COUNT), *FAILED_ONCE}))
def test_random_models(seed, tmp_path):
    model = random_model(seed)
    for form in FORMS:
        round_trip(model, tmp_path, form)


def test_layers_that_a_file_of_ratios_leaves_whole(tmp_path):
    source = write_tiny_llama(tmp_path / "model", vocab_size=VOCAB, num_hidden_layers=3, tokenizer=False)
    byte_level(vocab_size=VOCAB).save_pretrained(source)
    ratios = tmp_path / "ratios.json"
    ratios.write_text(json.dumps({"attention": [0.0, 0.5, 0.2], "mlp": [0.0, 0.3, 0.4]}))
    pruned = isl.prune(isl.load(source), tiny_text(), preset="fast", ratios=str(ratios), samples=4, sequence_length=64)
    arrays = {path: np.asarray(array) for path, array in decoder_to_arrays(pruned.decoder).items()}
    model = StoredModel(pruned.config, arrays, "float32", pruned.tokenizer, "pruned")
    assert [round_trip(model, tmp_path, form) for form in FORMS] == [
        "IntraSliceForCausalLM",
        "LlamaForCausalLM",
        "gguf",
    ]
