"""How much each token counts in the second moments, by what the loss makes of it (docs/method.md 6.6)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

CLIP = 10.0
"""No token's squared gradient counts as more than this times the mean of its layer: in the lower layers about one in a
hundred has more, up to 75 times the mean in SmolLM2-135M, and least squares would mostly fit these."""


def token_weights(
    gradients: Float[np.ndarray, "layers samples seq"], strength: float
) -> Float[np.ndarray, "layers samples seq"]:
    """w_t = (1 - b) + b g_t / mean(g) with clipped squared gradients g and the strength b; float32.

    In every layer the mean is 1, so that sums over tokens stay comparable with their number. Where no token has a
    gradient all count alike.

    Args:
        gradients: squared norms, not negative (`intraslice_jax.calibrate.gradients.token_gradients`).
        strength: in [0, 1]; 0 counts all tokens alike.
    """
    g = np.asarray(gradients, np.float64)
    g = np.minimum(g, CLIP * g.mean((1, 2), keepdims=True))
    mean = g.mean((1, 2), keepdims=True)
    relative = np.where(mean > 0, g / np.where(mean > 0, mean, 1), 1.0)
    return (1 - strength + strength * relative).astype(np.float32)
