"""GGUF files that we write: read back by our reader, and by llama.cpp where it is installed."""

import dataclasses
import json
import os
import subprocess
import sys

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from intraslice_jax.cli import main
from intraslice_jax.config import LayerShape
from intraslice_jax.convert import load
from intraslice_jax.convert.export import export
from intraslice_jax.convert.gguf_file import GgufFile
from intraslice_jax.convert.gguf_tokenizer import tokenizer_metadata
from intraslice_jax.convert.load import open_stored
from intraslice_jax.convert.tokenizer import PRE_TOKENIZERS, pre_tokenizer
from intraslice_jax.errors import InputError
from intraslice_jax.models.decoder import decoder_from_arrays, decoder_to_arrays
from intraslice_jax.models.generate import generate
from tests.convert.exported import TOKENS, VOCAB, make, our_logits, with_random_weights
from tests.convert.narrowed import dense_config, ragged, uniform
from tests.tiny import tiny_text, write_tokenizer

CLOSE = 1e-4
TEXT = "the river runs, 2024 times  over STONES\n\nwhile it'll rain in spring: [x]=12.5 café"


def byte_level(pre="gpt-2", vocab_size=300, **options):
    """A small byte-level BPE with merges, of one of the known pre-tokenizers."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=PRE_TOKENIZERS[pre].whole_words))
    tokenizer.pre_tokenizer = pre_tokenizer(PRE_TOKENIZERS[pre])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([tiny_text()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **options)


def sentencepiece():
    """Llama 2's kind: a space is ▁, unknown characters fall back to bytes, BOS in front."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdefghilmnoprstuvw"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("i", "n"), ("▁", "r"), ("▁r", "i"), ("e", "r")]
    vocab = {piece: i for i, piece in enumerate([*pieces, *("".join(pair) for pair in merges)])}
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A"], pair=["<s>", "$A", "<s>", "$B"], special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template="{{ x }}"
    )


def with_tokenizer(model, tokenizer=None):
    """The model with a vocabulary large enough for a tokenizer, and that tokenizer."""
    tokenizer = tokenizer or byte_level()
    config = dataclasses.replace(model.config, vocab_size=max(tokenizer.get_vocab().values()) + 4)
    wide = with_random_weights(config)
    layers = {k: v for k, v in decoder_to_arrays(model.decoder).items() if k.startswith("layers.")}
    decoder = decoder_from_arrays(config, decoder_to_arrays(wide.decoder) | layers)
    return dataclasses.replace(wide, decoder=decoder, tokenizer=tokenizer)


def test_a_dense_llama_comes_back_bit_for_bit(tmp_path):
    model = with_tokenizer(with_random_weights(dense_config("llama"), identity_pairs=True))
    again = load(export(model, tmp_path / "model.gguf", format="gguf"))
    assert GgufFile(tmp_path / "model.gguf").metadata["general.architecture"] == "llama"
    assert again.config.layers == model.config.layers
    arrays = decoder_to_arrays(again.decoder)
    for name, array in decoder_to_arrays(model.decoder).items():
        np.testing.assert_array_equal(array, arrays[name], name)
    assert again.tokenizer(TEXT).input_ids == model.tokenizer(TEXT).input_ids


# With the lengths up to which the two agree: the graphs have no windows and no frequencies that grow.
PRUNED = {
    "llama biases": 40,
    "llama dynamic": 24,
    "llama yarn": 40,
    "llama output biases": 40,
    "mistral": 5,
    "qwen2": 6,
    "smollm3": 40,
    "phi3": 40,
}


def pruned(flavour):
    if flavour == "llama output biases":
        return with_tokenizer(make("llama", attention_output_bias=True, mlp_bias=True))
    return with_tokenizer(uniform("llama") if flavour == "uniform" else make(flavour))


@pytest.mark.parametrize("flavour", PRUNED)
def test_pruned_models_compute_the_same(flavour, tmp_path):
    model = pruned(flavour)
    file = export(model, tmp_path / "model.gguf", format="gguf")
    metadata = GgufFile(file).metadata
    assert metadata["general.architecture"] == "deci"
    assert metadata["deci.context_length"] == {"mistral": 5, "qwen2": 6}.get(
        flavour, model.config.max_position_embeddings
    )
    assert metadata["deci.feed_forward_length"] == [64] * model.config.num_layers
    ids = TOKENS[:, : PRUNED[flavour]]
    np.testing.assert_allclose(our_logits(load(file).decoder, ids), our_logits(model.decoder, ids), rtol=0, atol=CLOSE)


@pytest.mark.parametrize(
    ("head_dim", "kept", "width"),
    [(8, 6, 8), (96, 62, 64), (96, 70, 96), (160, 62, 64), (160, 126, 128)],
    ids=lambda value: str(value),
)
def test_widths_are_those_that_llama_cpp_is_fast_with(head_dim, kept, width, tmp_path):
    """Multiples of 64, but no head is wider than before pruning."""
    dense = dataclasses.replace(dense_config("llama"), head_dim=head_dim, rotary_dim=head_dim)
    shape = LayerShape((0, 1), kept, kept, kept, 40)
    model = with_tokenizer(with_random_weights(dense.with_layers((shape,) * 2), identity_pairs=True))
    file = export(model, tmp_path / "model.gguf", format="gguf")
    metadata = GgufFile(file).metadata
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.attention.key_length"] == width
    assert metadata["llama.feed_forward_length"] == 64
    # Where heads have their whole width, frequencies are the ordinary ones.
    assert ("rope_freqs.weight" in GgufFile(file).tensors) == (width != head_dim)
    np.testing.assert_allclose(
        our_logits(load(file).decoder, TOKENS), our_logits(model.decoder, TOKENS), rtol=0, atol=CLOSE
    )


@pytest.mark.parametrize("case", ["llama", "llama biases"])
def test_a_uniform_layout_is_a_plain_llama(case, tmp_path):
    model = with_tokenizer(uniform(case))
    file = export(model, tmp_path / "model.gguf", format="gguf")
    assert GgufFile(file).metadata["general.architecture"] == "llama"
    np.testing.assert_allclose(
        our_logits(load(file).decoder, TOKENS), our_logits(model.decoder, TOKENS), rtol=0, atol=CLOSE
    )


def test_quantised_rows_are_filled_up_to_blocks(tmp_path):
    model = with_tokenizer(ragged("llama"))
    file = GgufFile(export(model, tmp_path / "model.gguf", format="gguf", dtype="q8_0"))
    tensors, kinds = file.tensors, gguf.GGMLQuantizationType
    assert tensors["blk.0.ffn_down.weight"].shape == (32, 64)  # of 40 channels
    assert {tensors[f"blk.0.{name}.weight"].kind for name in ("ffn_down", "ffn_up", "attn_q")} == {kinds.Q8_0}
    assert tensors["token_embd.weight"].kind == kinds.Q8_0
    assert tensors["blk.1.attn_output.weight"].shape == (32, 16)
    assert tensors["blk.1.attn_output.weight"].kind == kinds.F16  # no multiple of 32
    assert tensors["output_norm.weight"].kind == kinds.F32
    want = np.asarray(model.decoder.layers[0].mlp.down_proj[...]).T
    got = file.read("blk.0.ffn_down.weight")
    assert np.abs(got[:, :40] - want).max() <= np.abs(want).max() / 127
    assert not got[:, 40:].any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_matrices_in_half_precision(dtype, tmp_path):
    model = with_tokenizer(ragged("llama"))
    file = GgufFile(export(model, tmp_path / "model.gguf", format="gguf", dtype=dtype))
    assert {t.dtype for name, t in file.tensors.items() if "norm" not in name and "rope" not in name} == {dtype}
    assert {t.dtype for name, t in file.tensors.items() if "norm" in name} == {"float32"}
    stored = file.read("blk.1.ffn_up.weight")
    want = np.asarray(model.decoder.layers[1].mlp.up_proj[...]).T.astype(stored.dtype)
    np.testing.assert_array_equal(stored[: len(want)], want)
    assert not stored[len(want) :].any()


def described(tokenizer, **config):
    return tokenizer_metadata(tokenizer, dataclasses.replace(dense_config("llama"), vocab_size=400, **config))


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "gpt-4o", "tekken"])
def test_how_text_is_cut_is_recognised(pre):
    assert PRE_TOKENIZERS[described(byte_level(pre))["tokenizer.ggml.pre"]] == PRE_TOKENIZERS[pre]


def test_sentencepiece_comes_back(tmp_path):
    model = with_tokenizer(with_random_weights(dense_config("llama"), identity_pairs=True), sentencepiece())
    again = load(export(model, tmp_path / "model.gguf", format="gguf")).tokenizer
    for text in ("the river", TEXT, "ünïcode ▁ 東京", " the  the"):
        ids = model.tokenizer(text).input_ids
        assert again(text).input_ids == ids
        assert again.decode(ids) == model.tokenizer.decode(ids)
    assert again.chat_template == "{{ x }}"
    # From file to file, without the model in memory.
    copy = load(export(open_stored(tmp_path / "model.gguf"), tmp_path / "copy.gguf", format="gguf"))
    assert copy.tokenizer(TEXT).input_ids == again(TEXT).input_ids
    np.testing.assert_array_equal(
        copy.decoder.layers[1].attention.q_proj[...], model.decoder.layers[1].attention.q_proj[...]
    )
    metadata = GgufFile(tmp_path / "model.gguf").metadata
    assert metadata["tokenizer.ggml.add_bos_token"]
    assert metadata["tokenizer.ggml.token_type"][:5] == [2, 3, 3, 6, 6]


def test_ends_of_turns_are_kept():
    keys = described(byte_level(), eos_token_id=(1, 7))
    assert (keys["tokenizer.ggml.eos_token_id"], keys["tokenizer.ggml.eot_token_id"]) == (1, 7)
    assert keys["tokenizer.ggml.tokens"][399] == "[UNUSED399]"
    assert keys["tokenizer.ggml.token_type"][399] == 5


def test_what_llama_cpp_cannot_express(tmp_path):
    path = tmp_path / "model.gguf"
    with pytest.raises(InputError, match=r"phi: llama\.cpp's graphs for such models do not have a parallel block"):
        export(make("phi"), path, format="gguf")
    gelu = make("llama", hidden_act="gelu")
    with pytest.raises(InputError, match="do not have the activation gelu"):
        export(gelu, path, format="gguf")
    with pytest.raises(InputError, match="has no tokenizer"):
        export(make("llama"), path, format="gguf")
    with pytest.raises(InputError, match="dtype 'q8_0' is not supported by format hf; expected float32"):
        export(make("llama"), path, dtype="q8_0")
    path.write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        export(with_tokenizer(make("llama")), path, format="gguf")
    assert path.read_text() == "mine"
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]


def test_the_command_wants_the_name_of_a_file(tmp_path, capsys):
    assert main(["export", "no model", str(tmp_path / "out"), "--format", "gguf"]) == 2
    assert "expected a name that ends in .gguf" in capsys.readouterr().err


def test_tokenizers_that_gguf_does_not_hold(tmp_path):
    write_tokenizer(tmp_path)
    bytes_only = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="has no merges"):
        described(bytes_only)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(InputError, match="of the kind WordLevel; GGUF files can hold BPE"):
        described(words)
    lower = byte_level()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(InputError, match=r"no known name in llama\.cpp; known: command-r"):
        described(lower)
    with pytest.raises(InputError, match=f"has token 299, the model's vocabulary only {VOCAB}"):
        tokenizer_metadata(byte_level(), dense_config("llama"))


# llama.cpp itself

_RUN = """
import json, sys
import numpy as np
from llama_cpp import Llama

file, text, ids = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
# The cache in float32 (0), where it would be float16.
model = Llama(file, n_ctx=64, logits_all=True, verbose=False, n_threads=1, type_k=0, type_v=0, flash_attn=False)
model.eval(ids)
logits = np.array(model.scores[: len(ids)])
greedy = []
for _ in range(16):
    greedy.append(int(np.argmax(model.scores[model.n_tokens - 1])))
    model.eval(greedy[-1:])
print(json.dumps({"logits": logits.tolist(), "greedy": greedy, "ids": model.tokenize(text.encode(), add_bos=False)}))
"""


def llama_cpp(file, text, ids):
    """Logits and greedy continuation of tokens, and the tokens of a text; in a process, which a wrong file ends."""
    python = os.environ.get("LLAMA_CPP_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import llama_cpp"], capture_output=True).returncode:
        pytest.skip("llama-cpp-python is not installed (LLAMA_CPP_PYTHON may name an interpreter that has it)")
    done = subprocess.run([python, "-c", _RUN, file, text, json.dumps(ids)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "flavour", ["llama", "llama biases", "llama output biases", "llama yarn", "smollm3", "uniform"]
)
def test_llama_cpp_has_our_logits_and_text(flavour, tmp_path):
    model = pruned(flavour)
    model = dataclasses.replace(model, config=dataclasses.replace(model.config, eos_token_id=()))
    file, ids = export(model, tmp_path / "model.gguf", format="gguf"), TOKENS[:1, :30]
    found = llama_cpp(str(file), TEXT, ids[0].tolist())
    np.testing.assert_allclose(found["logits"], our_logits(model.decoder, ids)[0], rtol=0, atol=2e-4)
    assert found["greedy"] == generate(model, ids.tolist(), 16).tokens[0]
    assert found["ids"] == model.tokenizer(TEXT).input_ids
