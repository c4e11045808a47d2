"""The transformer of Z-Image. Module tree and config keys follow PyTorch diffusers.

Reference: diffusers `ZImageTransformer2DModel`, text to image.

Letters: N images, H W their latents, C channels, T image tokens, S text tokens, D width.
"""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from dmpo_jax.errors import UserError
from dmpo_jax.models import rope
from dmpo_jax.models.component_config import ModelConfig, Only
from dmpo_jax.models.execution import DEFAULT, Execution, apply_blocks, by_block
from dmpo_jax.models.joint import Attention, Row, Tokens
from dmpo_jax.models.layers import Linear, RMSNorm, activation, modulated_norm, sinusoid

KEYS = {
    "all_f_patch_size": Only([1], (1,)),
    "all_patch_size": Only([2], (2,)),
    "axes_dims": (32, 48, 48),
    "axes_lens": (1024, 512, 512),
    "cap_feat_dim": 2560,
    "dim": 3840,
    "in_channels": 16,
    "n_heads": 30,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "rope_theta": 256.0,
    "siglip_feat_dim": Only(None),
    "t_scale": 1000.0,
}
DEAD = frozenset({"n_kv_heads"})  # every head has keys of its own, whatever it says
PATCH = 2
SLOT = "2-1"  # of the embedders, which PyTorch keeps one for a size of patches
MULTIPLE = 32  # sequences are filled up to multiples of this, by learnt tokens
TIME_WIDTH, TIME_INNER = 256, 1024  # of the sinusoid, and of its embedder
QK_EPSILON, OUT_EPSILON = 1e-5, 1e-6


class FeedForward(nnx.Module):
    def __init__(self, width: int, **kw: Any):
        inner = int(width / 3 * 8)
        into = functools.partial(Linear, width, inner, use_bias=False, split="columns", **kw)
        self.w1, self.w3 = into(), into()
        self.w2 = Linear(inner, width, use_bias=False, split="rows", **kw)

    def __call__(self, x: Tokens) -> Tokens:
        return self.w2(activation("silu")(self.w1(x)) * self.w3(x))


class Block(nnx.Module):
    """Attention and feed-forward, normed before and after; `modulated` by time.

    Called with told = (embedding of time or None, rotation, lengths or None).
    """

    def __init__(self, config: ModelConfig, *, modulated: bool, **kw: Any):
        norm = functools.partial(RMSNorm, config.dim, epsilon=config.norm_eps, **kw)
        self.attention = Attention(
            config.dim,
            config.n_heads,
            config.dim // config.n_heads,
            epsilon=QK_EPSILON if config.qk_norm else None,
            use_bias=False,
            **kw,
        )
        self.feed_forward = FeedForward(config.dim, **kw)
        self.attention_norm1, self.attention_norm2 = norm(), norm()
        self.ffn_norm1, self.ffn_norm2 = norm(), norm()
        self.modulated = modulated
        if modulated:
            self.adaLN_modulation = nnx.List(
                [Linear(min(config.dim, TIME_WIDTH), 4 * config.dim, **kw)]
            )

    def __call__(self, x: Tokens, told: Any, *, kernel: str) -> Tokens:
        embedded, rotation, lengths = told
        scale = gate = scale_ff = gate_ff = None
        if self.modulated:
            rows = self.adaLN_modulation[0](embedded)  # as it is: no activation before
            scale, gate, scale_ff, gate_ff = jnp.split(rows, 4, axis=-1)
        normed = _scaled(self.attention_norm1(x), scale)
        attended = self.attention(normed, rotation, lengths, kernel=kernel)
        x = x + _gated(gate, self.attention_norm2(attended))
        inner = self.feed_forward(_scaled(self.ffn_norm1(x), scale_ff))
        return x + _gated(gate_ff, self.ffn_norm2(inner))


def _scaled(x: Tokens, scale: Row | None) -> Tokens:
    return x if scale is None else x * (1 + scale)[:, None]


def _gated(gate: Row | None, x: Tokens) -> Tokens:
    return x if gate is None else jnp.tanh(gate)[:, None] * x


class TimeEmbedder(nnx.Module):
    def __init__(self, width: int, **kw: Any):
        enter, leave = Linear(TIME_WIDTH, TIME_INNER, **kw), Linear(TIME_INNER, width, **kw)
        self.mlp = nnx.List([enter, None, leave])  # between them PyTorch's activation
        self.dtype = kw["dtype"]

    def __call__(self, times: Float[Array, " N"]) -> Row:
        enter: Any = self.mlp[0]
        leave: Any = self.mlp[2]
        wave = sinusoid(times, TIME_WIDTH, True, 0).astype(self.dtype)
        return leave(activation("silu")(enter(wave)))


class FinalLayer(nnx.Module):
    def __init__(self, width: int, out: int, **kw: Any):
        self.linear = Linear(width, out, **kw)
        modulation = Linear(min(width, TIME_WIDTH), width, **kw)
        self.adaLN_modulation = nnx.List([None, modulation])  # the first is PyTorch's activation

    def __call__(self, x: Tokens, embedded: Float[Array, "N E"]) -> Float[Array, "N T P"]:
        modulation: Any = self.adaLN_modulation[1]
        scale = modulation(activation("silu")(embedded))
        return self.linear(modulated_norm(x, jnp.zeros_like(scale), scale, OUT_EPSILON))


class ZImageTransformer2DModel(nnx.Module):
    """Predicts x0 - epsilon, the negated velocity, of noised latents under text.

    Args:
        config: the contents of transformer/config.json, as diffusers writes it.
        dtype: compute dtype. param_dtype: dtype the parameters are held in.
        execution: execution choices; may be set on a built model too.

    Raises:
        ValueError: naming each config key whose value is not supported.
    """

    def __init__(
        self,
        config: Any,
        *,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        execution: Execution = DEFAULT,
        rngs: nnx.Rngs,
    ):
        self.config = config = ModelConfig(config, KEYS, DEAD)
        self.dtype, self.execution = dtype, execution
        _check(config)
        kw: Any = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        width, patch = config.dim, PATCH**2 * config.in_channels
        self.all_x_embedder = nnx.Dict({SLOT: Linear(patch, width, **kw)})
        self.all_final_layer = nnx.Dict({SLOT: FinalLayer(width, patch, **kw)})
        refiners = range(config.n_refiner_layers)
        self.noise_refiner = nnx.List(Block(config, modulated=True, **kw) for _ in refiners)
        self.context_refiner = nnx.List(Block(config, modulated=False, **kw) for _ in refiners)
        self.t_embedder = TimeEmbedder(min(width, TIME_WIDTH), **kw)
        text = config.cap_feat_dim
        norm = RMSNorm(text, epsilon=config.norm_eps, **kw)
        self.cap_embedder = nnx.List([norm, Linear(text, width, **kw)])
        self.x_pad_token = nnx.Param(jnp.zeros((1, width), param_dtype))
        self.cap_pad_token = nnx.Param(jnp.zeros((1, width), param_dtype))
        self.layers = nnx.List(Block(config, modulated=True, **kw) for _ in range(config.n_layers))

    def __call__(
        self,
        latents: Float[Array, "N H W C"],
        clean: Shaped[Array, " N"] | Shaped[Array, ""],
        context: Float[Array, "N S E"],
        lengths: Int[Array, " N"],
    ) -> Float[Array, "N H W C"]:
        """Predicts, in the compute dtype.

        Args:
            clean: 1 - sigma: 0 is noise.
            lengths: number of positions of each context that are text. They are filled up to a
                multiple of 32 by a learnt token; nothing attends to what is behind.

        Raises:
            ValueError: latents or text have more positions than the model has (axes_lens).
        """
        n, height, width, channels = latents.shape
        rows, columns = height // PATCH, width // PATCH
        clean = jnp.broadcast_to(clean, (n,)).astype(jnp.float32)
        embedded = self.t_embedder(self.config.t_scale * clean)
        x = latents.astype(self.dtype).reshape(n, rows, PATCH, columns, PATCH, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(n, rows * columns, -1)
        x = _filled(self.all_x_embedder[SLOT](x), rows * columns, self.x_pad_token)
        filled = -(-lengths // MULTIPLE) * MULTIPLE
        context = self._embed_text(context, lengths)
        image, text = self._rotations(rows, columns, x.shape[1], context.shape[1], filled)
        how = by_block(self.execution)
        x = apply_blocks(list(self.noise_refiner), x, (embedded, image, None), how)
        context = apply_blocks(list(self.context_refiner), context, (None, text, filled), how)
        both = rope.Rotation(
            *(jnp.concatenate(parts, 1) for parts in zip(image, text, strict=True))
        )
        told = (embedded, both, x.shape[1] + filled)
        # The image comes first, so that the padding comes last.
        x = apply_blocks(list(self.layers), jnp.concatenate([x, context], axis=1), told, how)
        x = self.all_final_layer[SLOT](x[:, : rows * columns], embedded)
        x = x.reshape(n, rows, columns, PATCH, PATCH, channels)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(latents.shape)

    def _embed_text(self, context: Array, lengths: Array) -> Float[Array, "N S D"]:
        """Embeds the text, a learnt token in place of all that is behind it."""
        norm: Any = self.cap_embedder[0]
        project: Any = self.cap_embedder[1]
        x = project(norm(context.astype(self.dtype)))
        return _filled(x, lengths.reshape(-1, 1, 1), self.cap_pad_token)

    def _rotations(
        self, rows: int, columns: int, tokens: int, words: int, filled: Int[Array, " N"]
    ) -> tuple[rope.Rotation, rope.Rotation]:
        """Returns the rotations of image and text; an image's depends on its text's length.

        Positions (place, row, column): text (1.., 0, 0), image (behind the text, row, column),
        its padding (0, 0, 0).
        """
        config = self.config
        limits = np.array(config.axes_lens)
        needed = np.array([words + 2, rows, columns])
        if (needed > limits).any():
            raise ValueError(
                f"{words} tokens of text and {rows} x {columns} patches need {needed.tolist()} "
                f"positions, but the model has axes_lens={limits.tolist()}"
            )

        def angles(positions: np.ndarray) -> np.ndarray:
            # PyTorch rounds its angles, which shows at a thousand radians.
            found = rope.angles(positions, config.axes_dims, config.rope_theta)
            return found.astype(np.float32)

        places = np.zeros((words + 2, 3), np.int64)
        places[:, 0] = np.arange(words + 2)
        by_place = rope.pairs(angles(places))
        text = rope.Rotation(*(table[:, 1 : words + 1] for table in by_place))
        grid = np.zeros((rows * columns, 3), np.int64)
        grid[:, 1], grid[:, 2] = np.divmod(np.arange(rows * columns), columns)
        head = by_place.own.shape[-1]
        by_text = (np.arange(head) < config.axes_dims[0]).reshape(1, 1, 1, -1)

        def of_image(table: Any, still: Any, at_rest: float) -> Array:
            # The first axis turns with the text's length, the others with row and column.
            behind = jnp.asarray(table)[0][filled + 1][:, None]
            turned = jnp.where(by_text, behind, still)
            padding = ((0, 0), (0, tokens - rows * columns), (0, 0), (0, 0))
            return jnp.pad(turned, padding, constant_values=at_rest)

        by_grid = rope.pairs(angles(grid))
        image = rope.Rotation(
            of_image(by_place.own, by_grid.own, 1.0),
            of_image(by_place.partner, by_grid.partner, 0.0),
        )
        shape = (len(filled), words, 1, head)
        return image, rope.Rotation(*(jnp.broadcast_to(table, shape) for table in text))


def _filled(x: Tokens, length: Any, token: Any) -> Float[Array, "N filled D"]:
    """Fills up to a multiple of 32 tokens; from `length` on, all are the learnt token."""
    total = MULTIPLE * -(-x.shape[1] // MULTIPLE)
    x = jnp.pad(x, ((0, 0), (0, total - x.shape[1]), (0, 0)))
    valid = jnp.arange(total).reshape(1, -1, 1) < length
    return jnp.where(valid, x, token[...].astype(x.dtype)[None])


def _check(config: ModelConfig) -> None:
    axes, heads = config.axes_dims, config.n_heads
    if config.dim % heads:
        raise UserError(f"n_heads={heads} must divide dim={config.dim}")
    if len(axes) != 3 or sum(axes) != config.dim // heads or any(width % 2 for width in axes):
        raise UserError(
            f"axes_dims={list(axes)} must be three even numbers that add up to "
            f"{config.dim // heads}, dim / n_heads"
        )
    if len(config.axes_lens) != 3:
        raise UserError(f"axes_lens={list(config.axes_lens)} must be three numbers")
