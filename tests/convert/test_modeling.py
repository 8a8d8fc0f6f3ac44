"""What works with transformers' stock classes works with an export's modelling file."""

import warnings

import numpy as np
import onnxruntime
import peft
import pytest
import torch
import transformers
from torch.nn.attention import flex_attention
from transformers import integrations, masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from intraslice_jax.convert.export import export
from intraslice_jax.convert.modeling_intraslice import CACHE
from tests.convert.exported import LAYERS, TOKENS, greedy, in_torch, make, our_logits, quiet_torch, torch_logits

CLOSE = 1e-4
TORCH_TOKENS = torch.from_numpy(TOKENS).long()


@pytest.fixture(scope="module", autouse=True)
def _own_module_cache(tmp_path_factory):
    with quiet_torch(tmp_path_factory.mktemp("modules")):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Exports by flavour, each written once."""
    written = {}

    def get(flavour):
        if flavour not in written:
            path = tmp_path_factory.mktemp("export") / flavour.replace(" ", "_")
            written[flavour] = export(make(flavour, pad_token_id=0), path)
        return written[flavour]

    return get


def test_onnx_runtime_has_our_logits_at_any_length(tmp_path):
    model = make("llama", layers=LAYERS[:1])
    exported, file = in_torch(export(model, tmp_path / "out")), tmp_path / "model.onnx"
    exported.config.use_cache = False
    length = {"input_ids": {1: torch.export.Dim("length")}}
    with warnings.catch_warnings(action="ignore"):
        torch.onnx.export(exported, (TORCH_TOKENS[:, :9],), file, dynamo=True, dynamic_shapes=length, verbose=False)
    session = onnxruntime.InferenceSession(file)
    (found,) = session.run(None, {session.get_inputs()[0].name: TORCH_TOKENS.numpy()})
    np.testing.assert_allclose(found, our_logits(model.decoder, TOKENS), rtol=0, atol=CLOSE)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("flavour", ["llama", "qwen2"])
def test_flex_attention(folder, monkeypatch, flavour):
    """Not compiled, which would take most of a minute."""

    def attend(*args, training, **options):
        return flex_attention.flex_attention(*args, **options)

    def mask(*args, _compile, **options):
        return flex_attention.create_block_mask(*args, **options)

    monkeypatch.setattr(integrations.flex_attention, "compile_friendly_flex_attention", attend)
    monkeypatch.setattr(masking_utils, "create_block_mask", mask)
    found = torch_logits(in_torch(folder(flavour), "flex_attention"), TOKENS)
    np.testing.assert_allclose(found, our_logits(make(flavour).decoder, TOKENS), rtol=0, atol=CLOSE)


# phi3: the text grows beyond the original context, where longrope starts the cache anew.
@pytest.mark.parametrize("flavour", ["llama", "phi3"])
@pytest.mark.parametrize("with_ids", [False, True])
def test_generates_from_embeddings(folder, flavour, with_ids):
    exported = in_torch(folder(flavour))
    want = greedy(exported, TOKENS[:, :6], 14)
    prompt = TORCH_TOKENS[:, :6]
    found = exported.generate(
        **({"input_ids": prompt} if with_ids else {}),
        inputs_embeds=exported.get_input_embeddings()(prompt),
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=14,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    np.testing.assert_array_equal(found, want if with_ids else want[:, 6:])


@pytest.mark.parametrize("option", [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}])
def test_guessed_tokens_change_no_text(folder, option):
    exported = in_torch(folder("llama"))
    np.testing.assert_array_equal(greedy(exported, TOKENS[:1, :6], 14, **option), greedy(exported, TOKENS[:1, :6], 14))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_lora_finds_what_it_adapts_in_llama_and_merges(folder):
    exported = in_torch(folder("llama"))
    adapted = peft.get_peft_model(exported, peft.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False))
    assert {name.split(".lora_A")[0].split(".")[-1] for name in adapted.state_dict() if "lora_A" in name} == {
        "q_proj",
        "v_proj",
    }
    adapted(TORCH_TOKENS, labels=TORCH_TOKENS).loss.backward()
    assert all(weight.grad is not None for weight in adapted.parameters() if weight.requires_grad)
    before = torch_logits(adapted.eval(), TOKENS)
    assert np.abs(before - our_logits(make("llama").decoder, TOKENS)).max() > 0.1
    np.testing.assert_allclose(torch_logits(adapted.merge_and_unload(), TOKENS), before, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("task", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_heads_for_other_tasks(folder, tmp_path, task):
    auto = getattr(transformers, f"AutoModelFor{task}")

    def load(path, **options):
        return auto.from_pretrained(path, trust_remote_code=True, num_labels=2, **options).eval()

    def scores(model):
        with torch.no_grad():
            out = model(TORCH_TOKENS)
        return torch.stack([out.start_logits, out.end_logits], -1) if task == "QuestionAnswering" else out.logits

    model = load(folder("llama"))
    head = model.qa_outputs if task == "QuestionAnswering" else model.score
    base = transformers.AutoModel.from_pretrained(folder("llama"), trust_remote_code=True)
    with torch.no_grad():
        want = head(base(TORCH_TOKENS).last_hidden_state)
    want = want[:, -1] if task == "SequenceClassification" else want
    torch.testing.assert_close(scores(model), want, rtol=0, atol=CLOSE)
    model.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(scores(load(tmp_path / "again")), want, rtol=0, atol=CLOSE)


def test_a_saved_base_model_brings_its_file(folder, tmp_path):
    transformers.AutoModel.from_pretrained(folder("llama"), trust_remote_code=True).save_pretrained(tmp_path)
    assert (tmp_path / "modeling_intraslice.py").exists()


def test_continuous_batching(folder):
    """Layers of different shapes, with and without a window, share one paged cache."""
    exported = in_torch(folder("qwen2"))
    prompts = [TOKENS[0, :6], TOKENS[1, :17], TOKENS[0, 10:13]]
    want = [greedy(exported, prompt[None], 12)[0, len(prompt) :].tolist() for prompt in prompts]
    found = exported.generate_batch(
        [prompt.tolist() for prompt in prompts],
        generation_config=transformers.GenerationConfig(
            do_sample=False, max_new_tokens=12, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=transformers.ContinuousBatchingConfig(
            page_size=8, num_blocks=32, max_batch_tokens=16
        ),
        progress_bar=False,
    )
    assert [found[key].generated_tokens for key in sorted(found)] == want


class Pages:
    """A paged cache whose kernel writes and reads it: one shape for all layers, two requests."""

    def __init__(self, heads, width):
        self.keys, self.values = torch.zeros(2, len(LAYERS), 2, heads, TOKENS.shape[1], width)

    def update(self, key, value, layer, kwargs):
        kwargs |= {"k_cache": self.keys[layer], "v_cache": self.values[layer]}
        return key, value


def in_pages(module, query, key, value, attention_mask, scaling, k_cache, v_cache, position_ids, **kwargs):
    """The new key and value of each request are written at its position; grouped queries attend to all up to there."""
    assert key.shape == value.shape
    end = int(position_ids[0, 0])
    k_cache[:, :, end], v_cache[:, :, end] = key[0].transpose(0, 1), value[0].transpose(0, 1)
    out = torch.nn.functional.scaled_dot_product_attention(
        query.permute(2, 1, 0, 3), k_cache[:, :, : end + 1], v_cache[:, :, : end + 1], scale=scaling, enable_gqa=True
    )
    return out.permute(2, 0, 1, 3), None


def test_kernels_that_hold_the_pages(folder, monkeypatch):
    """As flash attention decodes in continuous batching: one token of each request, side by side."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "in_pages", in_pages)
    exported, found = in_torch(folder("llama"), "in_pages"), []
    cache = Pages(exported.config.num_key_value_heads, exported.config.head_dim)
    with torch.no_grad():
        for place, tokens in enumerate(TORCH_TOKENS.T):
            options = {"position_ids": torch.full((1, 2), place), "block_table": torch.zeros(1), "use_cache": False}
            found.append(exported(tokens[None], **{CACHE: cache}, **options).logits[0])
    want = our_logits(make("llama").decoder, TOKENS)
    np.testing.assert_allclose(torch.stack(found, 1), want, rtol=0, atol=CLOSE)


def test_packed_texts_do_not_see_each_other(folder):
    exported = in_torch(folder("llama"))
    positions = torch.cat([torch.arange(15), torch.arange(25)])[None]
    found = torch_logits(exported, TOKENS[:1], position_ids=positions, use_cache=False)
    for part in (slice(0, 15), slice(15, 40)):
        np.testing.assert_allclose(found[:, part], torch_logits(exported, TOKENS[:1, part]), rtol=0, atol=CLOSE)


def test_logits_to_keep(folder):
    exported = in_torch(folder("llama"))
    every, places = torch_logits(exported, TOKENS), torch.tensor([[1, 5], [0, 39]])
    for keep, want in (
        (3, every[:, -3:]),
        (places[0], every[:, [1, 5]]),
        (places, np.take_along_axis(every, places.numpy()[..., None], 1)),
        (TORCH_TOKENS > 30, every[TOKENS > 30]),
    ):
        np.testing.assert_allclose(torch_logits(exported, TOKENS, logits_to_keep=keep), want, rtol=0, atol=CLOSE)
