"""Arrays and records that all modules share. Imports nothing from this package.

Letters: B pairs, 2 the images of a pair (0 chosen, 1 rejected), H W C a latent's
height, width and channels, S context tokens, D context width, P pooled width.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

Pair = Float[Array, "B 2 H W C"]
PerPair = Float[Array, " B"]


class Condition(NamedTuple):
    """Inputs of a model beside latents and time: named arrays, None where a family has none.

    Row i belongs to pair i. The arrays named in `PER_IMAGE` differ between the images of a pair
    and have an axis of 2 after the first; the images share the others. Read by name only.

    context: text embeddings. lengths: number of positions of each context that are text.
    pooled: one embedding per prompt. sizes: SDXL's time ids `(original height, width, crop top,
    left, target height, width)`, in pixels. image: channels of a given image, appended to the
    latents.
    """

    context: Float[Array, "B S D"]
    pooled: Float[Array, "B P"] | None = None
    sizes: Float[Array, "B 2 6"] | None = None
    image: Float[Array, "B H W E"] | None = None
    lengths: Int[Array, " B"] | None = None

    PER_IMAGE = frozenset({"sizes"})

    def per_image(self, images: int) -> "Condition":
        """Expands `[B, ...]` to `[B images, ...]`, one row for each of a pair's first images."""

        def rows(name: str, x: Any) -> Any:
            if x is None:
                return None
            if name in self.PER_IMAGE:
                x = x[:, :images]
            else:
                x = jnp.broadcast_to(x[:, None], (len(x), images, *x.shape[1:]))
            return x.reshape(-1, *x.shape[2:])

        return Condition(**{name: rows(name, x) for name, x in self._asdict().items()})


class PairBatch(NamedTuple):
    """Encoded pairs.

    moments: unscaled VAE moments, mean then log-variance on the last axis, or the mean alone
        (`Setup.mean_only`).
    preference: probability, in [0.5, 1], that image 0 is preferred.
    """

    moments: Float[Array, "B 2 H W M"]
    preference: PerPair
    condition: Condition


class Noised(NamedTuple):
    """Noised pairs: both images of a pair have the same timestep and the same noise.

    timesteps: index into the noise table. times: the model's time input at those timesteps.
    weights: of each pair's loss, by its timestep; None is 1 everywhere.
    """

    latents: Pair
    timesteps: Int[Array, " B"]
    times: Shaped[Array, " B"]
    target: Pair
    weights: PerPair | None = None
