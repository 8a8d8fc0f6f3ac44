"""The real SmolLM2, dense and pruned: what torch makes of the exports is what this program computes."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import intraslice_jax as isl

TOLERANCE = 1e-4


def torch_model(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch and transformers, not ours
        return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()


def assert_same(model, folder, text, roundings=0):
    """The same logits, to 1e-4 or, where float32 itself is coarser, to that many times its error in torch."""
    tokens = model.tokenizer.encode(text)[:128]
    exported = torch_model(folder)
    with torch.no_grad():
        theirs = exported(torch.tensor([tokens])).logits.numpy()
        continued = exported.generate(torch.tensor([tokens[:32]]), max_new_tokens=32, do_sample=False, use_cache=True)
    ours = np.asarray(model.decoder(jnp.asarray([tokens], jnp.int32)))
    assert np.abs(ours).max() > 10  # 1e-4 is far below what a logit is
    tolerance = TOLERANCE
    if roundings:
        with torch.no_grad():
            exact = exported.double()(torch.tensor([tokens])).logits.numpy()
        tolerance = max(TOLERANCE, roundings * np.abs(theirs - exact).max())
    assert np.abs(ours - theirs).max() < tolerance
    mine = isl.generate(model, model.tokenizer.decode(tokens[:32]), max_new_tokens=32)
    theirs = model.tokenizer.decode(continued[0, 32:], skip_special_tokens=True)
    assert mine == theirs
    return type(exported).__name__


@pytest.mark.slow
def test_exports_of_smollm2_in_torch(smollm2_gguf, calibration_texts, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    dense = isl.load(smollm2_gguf)
    text = (calibration_texts / "tiny.utf8").read_text()[:1000]
    assert assert_same(dense, isl.export(dense, tmp_path / "dense"), text) == "LlamaForCausalLM"

    calibration = (calibration_texts / "wiki.utf8").read_text()[:40000]
    pruned = isl.prune(dense, calibration, sparsity=0.3, preset="fast", samples=2, sequence_length=256)
    assert pruned.report["removed_block_fraction"] == pytest.approx(0.3, abs=0.005)
    assert assert_same(pruned, isl.export(pruned, tmp_path / "pruned"), text, roundings=4) == "IntraSliceForCausalLM"
