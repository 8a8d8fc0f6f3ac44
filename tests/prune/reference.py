"""IntraSlice in float64 numpy and full-size matrices: slow, and written from the method, not from the library.

Nothing here becomes smaller. A pruned layer is the dense layer with projections multiplied in between: one between
the (rotated) queries and keys of each KV head, one [n_q v, n_q v] matrix before the o-projection, one [I, I] matrix
before the down-projection.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import erf

ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))),
    "gelu_new": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


def ridge(inputs, targets, damping, affine=False, weights=None):
    """Least squares with one extra row sqrt(lambda) e_i and target 0 for every input; returns (A, offset)."""
    mean_in, mean_out = np.zeros(inputs.shape[1]), np.zeros(targets.shape[1])
    if affine:
        mean_in, mean_out = (np.average(a, 0, weights) for a in (inputs, targets))
    root = 1 if weights is None else np.sqrt(weights)[:, None]
    x, y = (inputs - mean_in) * root, (targets - mean_out) * root
    rows = np.sqrt(damping * np.mean(np.sum(x**2, 0))) * np.eye(x.shape[1])
    stacked = np.concatenate([x, rows]), np.concatenate([y, np.zeros((len(rows), y.shape[1]))])
    a = np.linalg.lstsq(*stacked, rcond=None)[0]
    return a, mean_out - mean_in @ a


def plan_heads(o_proj, grams, budget):
    """Kept heads and width (section 2.1) for o_proj [heads, d, hidden] and H_hh [heads, d, d]."""
    n, d, _ = o_proj.shape
    scores = {(h, c): np.sum(o_proj[h, c] ** 2) * grams[h, c, c] for h in range(n) for c in range(d)}
    best = sorted(scores, key=lambda channel: (-scores[channel], channel))[:budget]
    spectra = []
    for gram in grams:
        values = np.clip(np.sort(np.linalg.eigvalsh(gram))[::-1], 0, None)
        spectra.append(values / values.sum() if values.sum() > 0 else values)

    def energy(h, k):
        return sum(scores[h, c] for c in range(d)) * spectra[h][:k].sum()

    def total(heads):
        k = min(budget // len(heads), d)
        return sum(energy(h, k) for h in heads)

    kept = [h for h in range(n) if sum(head == h for head, _ in best) >= budget / n / 4]
    while len(kept) > 1:
        fewer = [h for h in kept if h != min(kept, key=lambda h: energy(h, d))]
        if total(fewer) <= total(kept):
            break
        kept = fewer
    while len(kept) > 1 and min(budget // len(kept), d) < 3 * d / 4:
        kept = [h for h in kept if h != min(kept, key=lambda h: energy(h, d))]
    evens = range(2, d + 1, 2)
    return kept, min(evens, key=lambda even: (abs(even - budget / len(kept)), -even))


def select_pairs(pair_scores, to_kv, heads, width, half):
    """Kept channels of each KV head that a kept head reads (section 2.2), from |q_c k_c| sums [heads, 2 half]."""
    chosen = {}
    for kv in sorted({to_kv[h] for h in heads}):
        group = [h for h in heads if to_kv[h] == kv]
        score = [sum(pair_scores[h, p] + pair_scores[h, p + half] for h in group) for p in range(half)]
        best = sorted(sorted(range(half), key=lambda p: (-score[p], p))[: width // 2])
        chosen[kv] = [*best, *(p + half for p in best)]
    return chosen


def split_width(width, rotary, full):
    """Rotated and other channels of a query/key head of a smaller width, as near to the old proportion as pairs go."""
    possible = [2 * p for p in range(rotary // 2 + 1) if 0 <= width - 2 * p <= full - rotary]
    best = min(possible, key=lambda kept: (abs(kept - width * rotary / full), -kept))
    return best, width - best


def product_projection(queries, keys, rank):
    """P with queries P keys^T the best approximation of that rank of queries keys^T, by the SVD of the product."""
    left, values, right = np.linalg.svd(queries @ keys.T, full_matrices=False)
    truncated = (left[:, :rank] * values[:rank]) @ right[:rank]
    return np.linalg.pinv(queries) @ truncated @ np.linalg.pinv(keys).T


def correction(inputs, target, drift, weights, damping, most, affine):
    """What is added to the map of inputs [windows, seq, width] onto targets, towards target + drift (section 6.7)."""
    held = max(1, round(len(inputs) / 8))

    def fit(windows, onto):
        x, y, w = (a[windows].reshape(-1, *a.shape[2:]) for a in (inputs, onto, weights))
        a, offset = ridge(x, y, damping, affine, w)
        return a, offset * affine

    (plain, shift), (extra, more) = (fit(slice(None, -held), onto) for onto in (target, drift))
    x, root = inputs[-held:], np.sqrt(weights[-held:])[..., None]
    missed = (target + drift)[-held:] - x @ plain - shift
    step = x @ extra + more
    best = np.linalg.lstsq((step * root).reshape(-1, 1), (missed * root).reshape(-1), rcond=None)[0][0]
    strength = min(max(best, 0.0), most)
    extra, more = fit(slice(None), drift)
    return strength * extra, strength * more, strength


@dataclass
class Projections:
    """What stands between the weights of one full-size layer; identities for a dense one."""

    heads: list
    channels: dict
    qk: np.ndarray
    attention: np.ndarray
    attention_offset: np.ndarray
    mlp_channels: list
    mlp: np.ndarray
    mlp_offset: np.ndarray
    value_basis: np.ndarray
    attention_added: np.ndarray
    attention_shift: np.ndarray
    mlp_added: np.ndarray
    mlp_shift: np.ndarray
    strengths: list


class Layer:
    """A dense layer of the model in float64."""

    def __init__(self, config, shape, arrays, rotary_pairs):
        self.config, self.shape = config, shape
        self.w = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
        self.pairs = np.asarray(rotary_pairs)

    def dense(self):
        n, v, inner = self.shape.num_attention_heads, self.shape.v_head_dim, self.shape.intermediate_size
        qk = np.tile(np.eye(self.shape.qk_head_dim), (self.shape.num_key_value_heads, 1, 1))
        zero = np.zeros(n * v)
        hidden = self.config.hidden_size
        added = [np.zeros((n * v, hidden)), np.zeros(hidden), np.zeros((inner, hidden)), np.zeros(hidden), []]
        whole = np.eye(n * v)
        return Projections(list(range(n)), {}, qk, whole, zero, [], np.eye(inner), np.zeros(inner), whole, *added)

    def norm(self, name, x):
        if self.config.norm == "layer":
            x = x - x.mean(-1, keepdims=True)
        y = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + self.config.norm_eps) * self.w[f"{name}.weight"]
        return y + self.w.get(f"{name}.bias", 0)

    def rotate(self, x):
        """x [batch, seq, KV heads, width]: each KV head with its own frequencies."""
        half = self.pairs.shape[1]
        frequencies = self.config.rope.theta ** (-2.0 * self.pairs / self.config.rotary_dim)
        angle = np.arange(x.shape[1])[:, None, None] * frequencies
        a, b = x[..., :half], x[..., half : 2 * half]
        turned = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
        return np.concatenate([*turned, x[..., 2 * half :]], -1)

    def queries_keys_values(self, x):
        """Per query head: q and k after RoPE, v, all [batch, seq, heads, width]."""
        x, to_kv = self.norm("input_norm", x), list(self.shape.query_to_kv)

        def project(name):
            return np.einsum("btd,dhk->bthk", x, self.w[f"attention.{name}_proj"]) + self.w.get(
                f"attention.{name}_bias", 0
            )

        q, k, v = project("q"), self.rotate(project("k"))[:, :, to_kv], project("v")[:, :, to_kv]
        turned = np.empty_like(q)
        for h, kv in enumerate(to_kv):
            # As if the query head were KV head kv, whose frequencies it uses.
            as_kv = np.repeat(q[:, :, h : h + 1], self.shape.num_key_value_heads, 2)
            turned[:, :, h] = self.rotate(as_kv)[:, :, kv]
        return turned, k, v

    def attend(self, q, k, v):
        """y [batch, seq, heads, v]."""
        length = q.shape[1]
        ago = np.arange(length)[:, None] - np.arange(length)
        seen = (ago >= 0) & (ago < (self.shape.sliding_window or length))
        scores = np.einsum("bthk,bshk->bhts", q, k) / math.sqrt(self.config.head_dim)
        weights = np.where(seen, np.exp(scores - np.where(seen, scores, -np.inf).max(-1, keepdims=True)), 0)
        return np.einsum("bhts,bshv->bthv", weights / weights.sum(-1, keepdims=True), v)

    def mixed(self, x, projections):
        """The o-projection's input with projected queries and keys, [batch, seq, heads * v]."""
        q, k, v = self.queries_keys_values(x)
        p = projections.qk[list(self.shape.query_to_kv)]
        y = self.attend(np.einsum("bthk,hkl->bthl", q, p), k, v)
        return y.reshape(*y.shape[:2], -1)

    def attention(self, x, projections):
        mixed = self.mixed(x, projections)
        y = mixed @ projections.attention + projections.attention_offset
        added = mixed @ projections.attention_added + projections.attention_shift
        return y @ self.output_map + self.w.get("attention.o_bias", 0) + added

    @property
    def output_map(self):
        o_proj = self.w["attention.o_proj"]
        return o_proj.reshape(-1, o_proj.shape[-1])

    def inner(self, x, after_attention):
        """The down-projection's input z."""
        parallel = self.config.parallel_block
        x = self.norm("input_norm", x) if parallel else self.norm("post_norm", after_attention)
        act = ACTIVATIONS[self.config.hidden_act]
        up = x @ self.w["mlp.up_proj"] + self.w.get("mlp.up_bias", 0)
        if not self.config.gated_mlp:
            return act(up)
        return act(x @ self.w["mlp.gate_proj"] + self.w.get("mlp.gate_bias", 0)) * up

    def mlp(self, z, projections):
        added = z @ projections.mlp_added + projections.mlp_shift
        z = z @ projections.mlp + projections.mlp_offset
        return z @ self.w["mlp.down_proj"] + self.w.get("mlp.down_bias", 0) + added

    def run(self, x, projections):
        after = x + self.attention(x, projections)
        return after + self.mlp(self.inner(x, after), projections)

    def prune(self, x, ratio, mlp_width, damping, attention=True, weights=None, dense=None, most=0.0):
        """Section 2, then section 3 behind the pruned attention; returns the projections.

        `weights` [batch, seq] say how often each token counts. Modules are corrected towards the stream of the dense
        model, `dense` before the layer, with a strength of at most `most`.
        """
        found = self.dense()
        weights = np.ones(x.shape[:2]) if weights is None else np.asarray(weights, np.float64)
        if attention:
            self._prune_attention(x, ratio, damping, found, weights)
            if dense is not None:
                self._correct_attention(x, dense, weights, damping, most, found)
        after = x + self.attention(x, found)
        self._prune_mlp(self.inner(x, after), mlp_width, damping, found, weights.reshape(-1))
        if dense is not None:
            self._correct_mlp(x, after, dense, weights, damping, most, found)
        return found

    def _correct_attention(self, x, dense, weights, damping, most, found):
        own, whole = x + self.attention(x, self.dense()), self.dense()
        drift = dense + self.attention(dense, whole) - own
        target = self.mixed(x, whole) @ self.output_map
        z = self.mixed(x, found) @ found.value_basis
        added = correction(z, target, drift, weights, damping, most, "attention.o_bias" in self.w)
        found.attention_added, found.attention_shift = found.value_basis @ added[0], added[1]
        found.strengths.append(added[2])

    def _correct_mlp(self, x, after, dense, weights, damping, most, found):
        z, kept = self.inner(x, after), found.mlp_channels
        drift = self.run(dense, self.dense()) - after - self.mlp(z, self.dense())
        dropped = [j for j in range(z.shape[-1]) if j not in kept]
        target = z[..., dropped] @ self.w["mlp.down_proj"][dropped]
        added = correction(z[..., kept], target, drift, weights, damping, most, "mlp.down_bias" in self.w)
        found.mlp_added[kept], found.mlp_shift = added[0], added[1]
        found.strengths.append(added[2])

    def _prune_attention(self, x, ratio, damping, found, weights):
        shape, o_proj = self.shape, self.w["attention.o_proj"]
        n, v, to_kv = shape.num_attention_heads, shape.v_head_dim, shape.query_to_kv
        q, k, values = self.queries_keys_values(x)
        y = self.attend(q, k, values)
        grams = np.einsum("bt,bthv,bthw->hvw", weights, y, y)
        heads, width = plan_heads(o_proj, grams, n * v - round(n * v * ratio))
        rotary, rest = split_width(min(width, shape.qk_head_dim), shape.rotary_dim, shape.qk_head_dim)
        scores = np.abs(q * k).sum((0, 1))
        found.heads = heads
        found.channels = select_pairs(scores, to_kv, heads, rotary, shape.rotary_dim // 2)
        for kv, channels in found.channels.items():
            selection = np.eye(shape.qk_head_dim)[:, channels]
            found.qk[kv] = selection @ selection.T
            if shape.rotary_dim < shape.qk_head_dim:
                group = [h for h in heads if to_kv[h] == kv]
                queries, keys = (
                    a[..., shape.rotary_dim :].reshape(-1, shape.qk_head_dim - shape.rotary_dim)
                    for a in (q[:, :, group], k[:, :, group[:1]])
                )
                found.qk[kv][shape.rotary_dim :, shape.rotary_dim :] = product_projection(queries, keys, rest)
        again, weights = self.mixed(x, found).reshape(-1, n, v), weights.reshape(-1)
        basis = np.zeros((n * v, len(heads) * width))
        for i, h in enumerate(heads):
            group = [j for j in heads if to_kv[j] == to_kv[h]]
            covariance = sum(again[:, j].T @ (weights[:, None] * again[:, j]) for j in group)
            vectors = np.linalg.eigh(covariance)[1][:, ::-1]
            basis[h * v : (h + 1) * v, i * width : (i + 1) * width] = vectors[:, :width]
        found.value_basis = basis
        z = again.reshape(-1, n * v) @ basis
        affine = "attention.o_bias" in self.w
        a, offset = ridge(z, y.reshape(-1, n * v), damping, affine, weights)
        found.attention, found.attention_offset = basis @ a, offset * affine

    def _prune_mlp(self, z, width, damping, found, weights):
        z = z.reshape(-1, z.shape[-1])
        scores = np.sum(self.w["mlp.down_proj"] ** 2, 1) * (weights @ z**2)
        kept = sorted(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:width])
        dropped = [j for j in range(len(scores)) if j not in kept]
        affine = "mlp.down_bias" in self.w
        a, offset = ridge(z[:, kept], z[:, dropped], damping, affine, weights)
        found.mlp_channels = kept
        found.mlp = np.zeros((len(scores), len(scores)))
        found.mlp[kept, kept] = 1
        found.mlp[np.ix_(kept, dropped)] = a
        found.mlp_offset = np.zeros(len(scores))
        found.mlp_offset[dropped] = offset * affine


class Model:
    """Embedding, layers with their projections, norm and head, from the library's dotted names."""

    def __init__(self, config, arrays):
        self.config = config
        self.layers = []
        for i, shape in enumerate(config.layers):
            prefix = f"layers.{i}."
            own = {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}
            pairs = own.pop("attention.rope_pairs")
            self.layers.append(Layer(config, shape, own, pairs))
        self.top = Layer(config, config.layers[0], {k: a for k, a in arrays.items() if "layers." not in k}, [[0]])
        self.projections = [layer.dense() for layer in self.layers]

    def embed(self, tokens):
        return self.top.w["embed_tokens"][np.asarray(tokens)]

    def prune(self, tokens, ratio, mlp_widths, damping, weights=None, most=None):
        """Every layer on the outputs of the pruned ones before it; `weights` [layers, batch, seq] of the tokens.

        With `most`, modules are corrected towards the dense stream, by this strength at most.
        """
        x = dense = self.embed(tokens)
        for i, layer in enumerate(self.layers):
            own = None if weights is None else weights[i]
            towards = {} if most is None else {"dense": dense, "most": most}
            self.projections[i] = layer.prune(x, ratio, mlp_widths[i], damping, weights=own, **towards)
            x, dense = layer.run(x, self.projections[i]), layer.run(dense, layer.dense())

    def logits(self, tokens):
        return self.logits_behind(-1, self.embed(tokens))

    def logits_behind(self, last, x):
        """Given the residual stream behind the layer `last`, or before all of them for -1."""
        for layer, projections in list(zip(self.layers, self.projections, strict=True))[last + 1 :]:
            x = layer.run(x, projections)
        head = self.top.w.get("lm_head", self.top.w["embed_tokens"])
        return self.top.norm("norm", x) @ head.T + self.top.w.get("lm_head_bias", 0)
