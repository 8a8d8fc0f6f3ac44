"""The feed-forward module, gated (Llama, Phi-3) or plain (Phi-1/1.5/2)."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from intraslice_jax.config import LayerShape, ModelConfig
from intraslice_jax.errors import InputError
from intraslice_jax.models.initialise import normal, optional_zeros

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_fast": lambda x: jax.nn.gelu(x, approximate=True),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
}


def check_activation(name: str) -> None:
    """Raises InputError for an activation that is not in the table."""
    if name not in ACTIVATIONS:
        raise InputError(f"hidden_act {name!r} is not supported; supported: {', '.join(ACTIVATIONS)}")


class MLP(nnx.Module):
    """`down(act(x W_gate) * (x W_up))`, or `down(act(x W_up))` without a gate."""

    def __init__(self, config: ModelConfig, shape: LayerShape, dtype: jnp.dtype, rngs: nnx.Rngs):
        check_activation(config.hidden_act)
        self.hidden_act = config.hidden_act
        hidden, inner = config.hidden_size, shape.intermediate_size
        self.gate_proj = normal(rngs, (hidden, inner), dtype) if config.gated_mlp else None
        self.up_proj = normal(rngs, (hidden, inner), dtype)
        self.down_proj = normal(rngs, (inner, hidden), dtype)
        self.gate_bias = optional_zeros(config.mlp_bias and config.gated_mlp, (inner,), dtype)
        self.up_bias = optional_zeros(config.mlp_bias, (inner,), dtype)
        self.down_bias = optional_zeros(config.mlp_bias, (hidden,), dtype)

    def inner(self, x: Float[Array, "batch seq hidden"]) -> Float[Array, "batch seq inner"]:
        """The input of the down-projection: z in docs/method.md (paper section 3.3)."""
        names = ("gate_proj", "up_proj", "gate_bias", "up_bias")
        weights = {name: getattr(self, name) for name in names}
        return inner_activations(self.hidden_act, {k: v[...] for k, v in weights.items() if v is not None}, x)

    def output(self, z: Float[Array, "batch seq inner"]) -> Float[Array, "batch seq hidden"]:
        """The down-projection."""
        y = jnp.einsum("btf,fd->btd", z, self.down_proj[...])
        return y if self.down_bias is None else y + self.down_bias[...][None, None]

    def __call__(self, x: Float[Array, "batch seq hidden"]) -> Float[Array, "batch seq hidden"]:
        return self.output(self.inner(x))


def inner_activations(
    hidden_act: str, weights: Mapping[str, Array], x: Float[Array, "batch seq hidden"]
) -> Float[Array, "batch seq inner"]:
    """act(x W_gate) * (x W_up), or act(x W_up) where there is no `gate_proj` among the weights."""
    act = ACTIVATIONS[hidden_act]

    def project(name: str) -> Array:
        y = jnp.einsum("btd,df->btf", x, weights[f"{name}_proj"])
        return y + weights[f"{name}_bias"][None, None] if f"{name}_bias" in weights else y

    return act(project("gate")) * project("up") if "gate_proj" in weights else act(project("up"))
