import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from intraslice_jax.calibrate import gradients
from intraslice_jax.calibrate.gradients import group_gradients, head_grams
from intraslice_jax.convert import load
from intraslice_jax.errors import RunError
from intraslice_jax.models.decoder import decoder_to_arrays
from tests.prune.flavours import FLAVOURS, make, windows, with_arrays
from tests.prune.reference import Model
from tests.tiny import write_tiny_llama


def reference_losses(config, arrays, tokens) -> np.ndarray:
    """Mean token loss of every sequence in float64."""
    logits = Model(config, arrays).logits(tokens)[:, :-1]
    shifted = logits - logits.max(-1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return -np.take_along_axis(log_softmax, np.asarray(tokens)[:, 1:, None], -1)[..., 0].mean(1)


def difference(config, arrays, tokens, name, change) -> np.ndarray:
    """Central difference of the losses along a change of one array."""

    def losses(step):
        return reference_losses(config, arrays | {name: arrays[name] + step * change}, tokens)

    return (losses(1e-4) - losses(-1e-4)) / 2e-4


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_masks_and_matrices_agree_with_finite_differences(flavour):
    model, tokens = make(flavour), windows(2, 12)
    arrays = {k: np.asarray(a, np.float64) for k, a in decoder_to_arrays(model.decoder).items()}
    per_sequence = list(group_gradients(model, tokens, group=1, matrices=True))
    plain = list(group_gradients(model, tokens, group=1))
    losses = reference_losses(model.config, arrays, tokens)
    np.testing.assert_allclose([g.loss for g in per_sequence], losses, rtol=1e-5)
    for i, shape in enumerate(model.config.layers):
        heads, v, inner = shape.num_attention_heads, shape.v_head_dim, shape.intermediate_size
        assert per_sequence[0].matrices[i].shape == (heads, v, v)
        scale = max(np.abs(g.attention[i]).max() for g in plain)
        for h in range(heads):
            # A mask on the input of a projection is a factor on the rows of its weight; a matrix mixes them.
            name = f"layers.{i}.attention.o_proj"
            for row, column in ((0, 0), (v - 1, v - 1), (1, v - 1), (v - 1, 0)):
                change = np.zeros_like(arrays[name])
                change[h, row] = arrays[name][h, column]
                expected = difference(model.config, arrays, tokens, name, change)
                found = [g.matrices[i][h, row, column] for g in per_sequence]
                np.testing.assert_allclose(found, expected, atol=1e-3 * scale, rtol=1e-3)
        for g, m in zip(plain, per_sequence, strict=True):
            np.testing.assert_allclose(g.attention[i], m.attention[i], atol=1e-5 * scale)
            np.testing.assert_allclose(np.diagonal(m.matrices[i], axis1=1, axis2=2), m.attention[i])
            assert g.matrices == ()
        scale = max(np.abs(g.mlp[i]).max() for g in plain)
        name = f"layers.{i}.mlp.down_proj"
        for channel in range(0, inner, 3):
            change = np.zeros_like(arrays[name])
            change[channel] = arrays[name][channel]
            expected = difference(model.config, arrays, tokens, name, change)
            np.testing.assert_allclose([g.mlp[i][channel] for g in plain], expected, atol=1e-3 * scale, rtol=1e-3)


def test_masks_agree_with_torch_autograd(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = write_tiny_llama(tmp_path / "model", num_hidden_layers=3)
    reference = transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
    tokens = np.random.default_rng(0).integers(2, 258, (3, 40), dtype=np.int32)
    found = list(group_gradients(load(folder), tokens, group=1))
    for sequence, ours in zip(tokens, found, strict=True):
        masks = []
        hooks = []

        def insert(linear, hooks=hooks, masks=masks):
            mask = torch.ones(linear.in_features, requires_grad=True)
            masks.append(mask)
            hooks.append(linear.register_forward_pre_hook(lambda _, args: (args[0] * mask,)))

        for layer in reference.model.layers:
            insert(layer.self_attn.o_proj)
            insert(layer.mlp.down_proj)
        ids = torch.tensor(sequence[None].astype(np.int64))
        loss = reference(ids, labels=ids).loss
        loss.backward()
        for hook in hooks:
            hook.remove()
        assert ours.loss == pytest.approx(loss.item(), rel=1e-5)
        expected = [mask.grad.numpy() for mask in masks]
        for i in range(3):
            np.testing.assert_allclose(ours.attention[i].reshape(-1), expected[2 * i], atol=2e-6)
            np.testing.assert_allclose(ours.mlp[i], expected[2 * i + 1], atol=2e-6)


@pytest.mark.parametrize(("group", "batch_size"), [(1, 3), (3, 0), (3, 2), (4, 7), (8, 1), (5, 3)])
def test_groups_are_sums_of_consecutive_sequences(group, batch_size):
    model, tokens = make(), windows(7, 16)
    single = list(group_gradients(model, tokens, group=1, batch_size=1))
    done = []
    options = {"group": group, "batch_size": batch_size, "on_batch": lambda *progress: done.append(progress)}
    found = list(group_gradients(model, tokens, **options))
    assert [g.sequences for g in found] == [min(group, 7 - start) for start in range(0, 7, group)]
    assert done[-1] == (7, 7)
    for start, g in zip(range(0, 7, group), found, strict=True):
        members = single[start : start + group]
        assert g.loss == pytest.approx(sum(m.loss for m in members), rel=1e-6)
        for field in ("attention", "mlp", "head_gram"):
            for i, array in enumerate(getattr(g, field)):
                assert array.dtype == np.float32
                expected = sum(getattr(m, field)[i] for m in members)
                np.testing.assert_allclose(array, expected, atol=1e-5 * np.abs(expected).max(), rtol=1e-4)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_head_grams_are_the_second_moments_of_the_dense_model(flavour):
    model, tokens = make(flavour), windows(5, 16)
    reference = Model(model.config, decoder_to_arrays(model.decoder))
    x = reference.embed(tokens)
    found = head_grams(model, tokens, batch_size=2)
    groups = list(group_gradients(model, tokens, group=2))
    for i, (layer, shape) in enumerate(zip(reference.layers, model.config.layers, strict=True)):
        y = layer.mixed(x, layer.dense()).reshape(-1, shape.num_attention_heads, shape.v_head_dim)
        expected = np.einsum("nhv,nhw->hvw", y, y)
        np.testing.assert_allclose(found[i], expected, atol=1e-4 * np.abs(expected).max())
        np.testing.assert_allclose(sum(g.head_gram[i] for g in groups), found[i], atol=1e-5 * np.abs(expected).max())
        x = layer.run(x, layer.dense())


def test_one_compilation_per_distinct_shape():
    model = make(layers=4)
    before = gradients._backward._cache_size()
    list(group_gradients(model, windows(5, 23), batch_size=2))  # the remainder must not count
    assert gradients._backward._cache_size() == before + 1
    ragged = make("ragged")
    list(group_gradients(ragged, windows(5, 23), batch_size=2))
    assert gradients._backward._cache_size() == before + 1 + ragged.config.distinct_shapes()


def test_bfloat16_follows_float32():
    model, tokens = make(), windows(4, 32)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.dtype == jnp.float32 else a, model.decoder)
    (expected,) = group_gradients(model, tokens)
    (found,) = group_gradients(dataclasses.replace(model, decoder=half), tokens)
    for a, b in zip((*found.attention, *found.mlp), (*expected.attention, *expected.mlp), strict=True):
        assert a.dtype == np.float32
        assert np.corrcoef(a.reshape(-1), b.reshape(-1))[0, 1] > 0.98


def test_the_setting_of_the_precision_does_not_leak():
    iterator = group_gradients(make(), windows(2, 8), group=1)
    before = jax.config.jax_default_matmul_precision
    next(iterator)
    assert jax.config.jax_default_matmul_precision == before
    iterator.close()


@pytest.mark.parametrize(
    ("array", "message"),
    [("layers__1__attention__v_proj", "layer 1, attention"), ("layers__0__mlp__down_proj", "layer 0, MLP")],
)
@pytest.mark.parametrize("function", [head_grams, lambda *args: list(group_gradients(*args))])
def test_overflow_names_the_layer(array, message, function):
    model = make()
    weights = np.asarray(decoder_to_arrays(model.decoder)[array.replace("__", ".")]) * np.float32(np.inf)
    with pytest.raises(RunError, match=message):
        function(with_arrays(model, **{array: weights}), windows(2, 8))
