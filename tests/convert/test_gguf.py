"""GGUF files of every architecture and option against the PyTorch models they were written from."""

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.integrations.gguf.dequant import dequantize as torch_dequantize

from intraslice_jax.convert.gguf import permute, unpermute
from intraslice_jax.convert.gguf_file import GgufFile
from intraslice_jax.convert.load import load
from intraslice_jax.errors import InputError
from tests.convert.checkpoints import LLAMA3, LONGROPE, build, tokens, torch_logits
from tests.convert.gguf_files import gguf_name, interleave, write_gguf

LENGTHS = (24, 6)
FACTORS = np.asarray([1.0, 1.5, 3.0, 9.0], np.float32)


def compare(model, reference):
    for length in LENGTHS:
        ours = np.asarray(model.decoder(jnp.asarray(tokens(length))))
        np.testing.assert_allclose(ours, torch_logits(reference, tokens(length)), atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    model = build("llama")
    return model, write_gguf(tmp_path_factory.mktemp("gguf") / "llama.gguf", model, "llama")


@pytest.fixture
def broken(llama, tmp_path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(llama[1].read_bytes())
    return path


@pytest.mark.parametrize(
    ("case", "architecture", "options"),
    [
        ("llama", "llama", {}),
        ("llama-mha-tied", "llama", {}),
        ("llama-biases", "llama", {}),
        ("llama-head-dim", "llama", {}),
        ("llama-linear", "llama", {"metadata": {"rope.scaling.type": "linear", "rope.scaling.factor": 3.0}}),
        ("llama-linear", "llama", {"metadata": {"rope.scale_linear": 3.0}}),
        (
            "llama-yarn",
            "llama",
            {
                "metadata": {
                    "rope.scaling.type": "yarn",
                    "rope.scaling.factor": 4.0,
                    "rope.scaling.original_context_length": 16,
                }
            },
        ),
        ("qwen2", "qwen2", {}),
        ("phi3", "phi3", {}),
        ("phi3-window-tied", "phi3", {"metadata": {"attention.sliding_window": 5}}),
        ("phi3-partial", "phi3", {"metadata": {"attention.sliding_window": 0}}),
        ("phi", "phi2", {}),
        ("phi-partial-gqa", "phi2", {}),
        ("phi-partial-gqa", "phi2", {"fuse": True}),
    ],
)
def test_logits(case, architecture, options, tmp_path):
    reference = build(case)
    model = load(write_gguf(tmp_path / "model.gguf", reference, architecture, **options))
    compare(model, reference)

    # The configuration that stands for the missing config.json is one that transformers reads the same way.
    written = tmp_path / "config.json"
    written.write_text(model.config.source)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    again = type(reference)(config).eval()
    again.load_state_dict(reference.state_dict())
    compare(model, again)


@pytest.mark.parametrize(
    ("architecture", "gone"),
    [
        ("llama", ("attn_output", "ffn_gate", "ffn_up", "ffn_down")),
        ("llama", ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up")),
        ("llama", ("blk.0.attn_q", "attn_k", "blk.1.attn_v", "attn_output", "blk.0.ffn_gate")),
        ("qwen2", ("attn_k", "blk.1.attn_v")),
    ],
)
def test_a_bias_that_is_not_there_is_zero(architecture, gone, tmp_path):
    """llama.cpp takes every bias of a layer as optional."""
    reference = build("llama-biases" if architecture == "llama" else architecture)
    without = set()
    for name, parameter in reference.named_parameters():
        if name.endswith("bias") and any(part in gguf_name(name) for part in gone):
            without.add(gguf_name(name))
            parameter.data.zero_()
    assert len(without) >= 3
    compare(load(write_gguf(tmp_path / "model.gguf", reference, architecture, without=without)), reference)


@pytest.mark.parametrize("name", ["model.GGUF", "sha256-2af3b81862c6be03", "model.bin"])
def test_a_file_of_any_name(llama, tmp_path, name):
    (tmp_path / name).write_bytes(llama[1].read_bytes())
    assert load(tmp_path / name).config.num_layers == 2


def test_a_file_of_another_kind(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(b"GGML")
    with pytest.raises(InputError, match=r"model\.bin is not a model; expected a folder with config\.json, a \.gguf"):
        load(path)
    with pytest.raises(InputError, match=r"names\.GGUF does not exist"):
        load("names.GGUF")  # no hub id


@pytest.mark.parametrize("attention_factor", [None, 1.25])
def test_phi3_longrope(tmp_path, attention_factor):
    rope = LONGROPE | ({} if attention_factor is None else {"attention_factor": attention_factor})
    reference = build("phi3-longrope", rope_parameters=rope)
    metadata = {"rope.scaling.original_context_length": 16}
    path = write_gguf(
        tmp_path / "model.gguf",
        reference,
        "phi3",
        metadata=metadata | ({} if attention_factor is None else {"rope.scaling.attn_factor": attention_factor}),
        extra={
            "rope_factors_long.weight": np.asarray(LONGROPE["long_factor"], np.float32),
            "rope_factors_short.weight": np.asarray(LONGROPE["short_factor"], np.float32),
        },
    )
    compare(load(path), reference)


def test_llama3_frequencies(tmp_path):
    """Llama 3.1's table is recognised; llama.cpp stores it as divisors of the plain frequencies."""
    rope = LLAMA3 | {"rope_theta": 500000.0, "factor": 8.0, "original_max_position_embeddings": 8192}
    reference = build("llama3", rope_parameters=rope, head_dim=64, max_position_embeddings=131072)
    plain = 500000.0 ** (-np.arange(0, 64, 2) / 64)
    table = (plain / reference.model.rotary_emb.inv_freq.double().numpy()).astype(np.float32)
    model = load(write_gguf(tmp_path / "model.gguf", reference, "llama", extra={"rope_freqs.weight": table}))
    assert model.config.rope.rope_type == "llama3"
    assert model.config.rope.get("factor") == 8
    compare(model, reference)


def test_other_frequency_tables(tmp_path):
    reference = build("llama")
    model = load(write_gguf(tmp_path / "model.gguf", reference, "llama", extra={"rope_freqs.weight": FACTORS}))
    with torch.no_grad():
        reference.model.rotary_emb.inv_freq /= torch.from_numpy(FACTORS)
    compare(model, reference)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (gguf.GGMLQuantizationType.F16, "float16"),
        (gguf.GGMLQuantizationType.BF16, "bfloat16"),
        (gguf.GGMLQuantizationType.Q8_0, "float32"),
        (gguf.GGMLQuantizationType.Q4_0, "float32"),
    ],
)
def test_stored_types(kind, dtype, tmp_path):
    reference = build("llama", intermediate_size=64)
    model = load(write_gguf(tmp_path / "model.gguf", reference, "llama", quantise=kind))
    assert model.decoder.embed_tokens.dtype == jnp.dtype(dtype)
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.ndim == 2:
                stored = gguf.dequantize(gguf.quantize(parameter.numpy(), kind), kind)
                parameter.copy_(torch.from_numpy(stored.copy()))
    compare(load(tmp_path / "model.gguf", "float32"), reference)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ2_S"])
def test_dequantisation(kind, tmp_path):
    """Blocks of any bits against transformers' implementation in PyTorch."""
    kind = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(kind).integers(0, 256, (4, 256 // block * size), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "blocks.gguf", "llama")
    writer.add_tensor("before", np.zeros(3, np.float32))
    writer.add_tensor("blocks", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with np.errstate(all="ignore"):
        ours = GgufFile(tmp_path / "blocks.gguf").read("blocks")
    theirs = torch_dequantize(torch.from_numpy(raw), int(kind)).numpy().reshape(ours.shape)
    assert ours.shape == (4, 256)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def test_permutation():
    rows = np.arange(24).reshape(12, 2)
    np.testing.assert_array_equal(permute(rows, 3), interleave(rows, 3))
    np.testing.assert_array_equal(unpermute(permute(rows, 3), 3), rows)


def rewrite(path, **changes):
    """The file with metadata keys set, or removed where the value is None."""
    old = GgufFile(path)
    writer = gguf.GGUFWriter(path.with_suffix(".new"), old.metadata["general.architecture"])
    metadata = {**old.metadata, **{key.replace("__", "."): value for key, value in changes.items()}}
    for key, value in metadata.items():
        if value is None or key == "general.architecture":
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            kind = {bool: "bool", str: "string", float: "float32", int: "uint32"}[type(value)]
            getattr(writer, f"add_{kind}")(key, value)
    for name in old.tensors:
        writer.add_tensor(name, old.read(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".new").replace(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split__count": 3}, r"split into 3 files; join them with llama-gguf-split --merge"),
        ({"llama__expert_count": 8}, r"with experts \(MoE\) is not supported"),
        ({"llama__embedding_length": None}, r"embedding_length is missing"),
        ({"llama__attention__head_count": [4, 2]}, r"head_count must be one positive number for all layers"),
        ({"llama__attention__head_count_kv": 3}, r"must be a multiple of num_key_value_heads \(3\)"),
        ({"llama__attention__value_length": 4}, r"value_length is 4, expected the key_length 8"),
        ({"llama__rope__dimension_count": 4}, r"partial_rotary_factor 0\.5 is not supported in this family"),
        ({"llama__rope__scaling__type": "magic"}, r"scaling\.type 'magic' is not supported; supported: none, linear"),
        ({"llama__feed_forward_length": 41}, r"mlp\.gate_proj\.weight has shape \[40, 32\], .* implies \[41, 32\]"),
        ({"general__alignment": 0}, r"damaged .*general\.alignment is 0, expected a power of two"),
        ({"general__alignment": 24}, r"damaged .*general\.alignment is 24, expected a power of two"),
        ({"llama__block_count": 2**32 - 1}, r"block_count must be at most 2147483647, found 4294967295"),
        ({"llama__block_count": 2**31 - 1}, r"llama\.block_count is 2147483647, the file has 21 tensors"),
        ({"llama__attention__head_count": 2**31 - 1}, r"head_count is 2147483647, the file's widest tensor has 96"),
        ({"llama__rope__freq_base": float("nan")}, r"rope\.freq_base must be"),
        ({"llama__context_length": "long"}, r"context_length must be a whole number, found 'long'"),
        ({"tokenizer__ggml__bos_token_id": [1]}, r"bos_token_id must be a whole number, found \[1\]"),
        ({"llama__block_count": 1}, r"left over blk\.1\.attn_k\.weight"),
        ({"llama__block_count": 3}, r"holds 2 layers, the configuration says 3"),
        ({"tokenizer__ggml__model": "bert"}, r"tokenizer\.ggml\.model 'bert' is not supported; supported: gpt2, llama"),
    ],
)
def test_contradictory_metadata(broken, changes, message):
    rewrite(broken, **changes)
    with pytest.raises(InputError, match=message) as caught:
        load(broken)
    assert "\n" not in str(caught.value)
    assert str(broken) in str(caught.value)


def test_unsupported_architecture(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "gemma2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match=r"architecture 'gemma2' is not supported; supported: llama, deci, qwen2"):
        load(tmp_path / "model.gguf")


def test_every_truncation_is_one_line(broken):
    content = broken.read_bytes()
    for length in (*range(0, 1200, 37), len(content) // 2, len(content) - 1):
        broken.write_bytes(content[:length])
        with pytest.raises(
            InputError, match=r"broken\.gguf is (truncated|damaged|damaged or not a GGUF file)"
        ) as caught:
            load(broken)
        assert "\n" not in str(caught.value)


def test_bad_number_is_named(tmp_path):
    reference = build("llama")
    with torch.no_grad():
        reference.model.layers[1].mlp.down_proj.weight[3, 5] = float("nan")
    path = write_gguf(tmp_path / "model.gguf", reference, "llama")
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.down_proj\.weight holds nan at index \[3, 5\]"):
        load(path)


def test_container_as_the_reference_reader_reads_it(llama):
    ours, theirs = GgufFile(llama[1]), gguf.GGUFReader(llama[1])
    assert ours.metadata == {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert {t.name for t in theirs.tensors} == set(ours.tensors)
    for tensor in theirs.tensors:
        np.testing.assert_array_equal(ours.read(tensor.name), np.asarray(tensor.data))


@pytest.mark.slow
def test_real_model(smollm2_gguf):
    model = load(smollm2_gguf)
    assert model.config.num_layers == 30
    assert model.config.tie_word_embeddings
    assert model.generation_config == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    tokenizer = model.require_tokenizer()
    ids = tokenizer("The capital of France is").input_ids
    following = np.asarray(model.decoder(jnp.asarray([ids], jnp.int32)))[0, -1].argmax()
    assert tokenizer.decode([following]) == " Paris"
