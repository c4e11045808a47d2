"""Layers shared by the models. Attribute names are those of PyTorch's state dicts.

Every constructor takes `**kw`: dtype (compute), param_dtype and rngs.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from dmpo_jax.errors import UserError
from dmpo_jax.models.attention import attention
from dmpo_jax.models.convolution import convolution
from dmpo_jax.models.quantised import Quantised
from dmpo_jax.parallel.placement import gathered, looked_up, platform, split_over_tensor


def _gelu(x: Array) -> Array:
    """Exact GELU, as PyTorch's default; jax.nn.gelu approximates by default.

    By erf: by erfc, as jax.nn.gelu(approximate=False), XLA's GPU compiler makes kernels of its own.
    """
    return x * (0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5)))


_gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)
ACTIVATIONS = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "mish": jax.nn.mish,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "gelu-approximate": _gelu_tanh,  # diffusers' name of it
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


def activation(name: str):
    """Returns the activation function that config.json names; ValueError lists those supported.

    It computes in float32 at least and rounds once, as PyTorch does: step by step in bfloat16, two
    in five values of SiLU would be another number.
    """
    if name not in ACTIVATIONS:
        raise UserError(f"activation {name!r} is not supported: use one of {sorted(ACTIVATIONS)}")
    function = ACTIVATIONS[name]
    return lambda x: function(x.astype(jnp.promote_types(x.dtype, jnp.float32))).astype(x.dtype)


class Linear(nnx.Linear):
    """A linear layer. split: how its features are sharded over the "tensor" axis (`mesh.RULES`)."""

    def __init__(self, features_in: int, features_out: int, *, split: str = "whole", **kw: Any):
        super().__init__(features_in, features_out, **kw)
        self.split = split

    def __call__(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows E"]:
        return self.parts(x, (self.out_features,))[0]

    def parts(self, x: Float[Array, "*rows D"], widths: Sequence[int]) -> tuple[Array, ...]:
        """Returns the output's features in parts of these widths, each by a product of its own.

        If one product's output is split, the backward puts the parts' gradients together again,
        in memory, once for each product that reads them. Not so on TPUs for more than two parts,
        where XLA copies each part of the kernel.
        """
        if platform() == "tpu" and len(widths) > 2:
            return tuple(_cut(self(x), widths))
        dtype = self.dtype or x.dtype
        # XLA's CPU backend is slow at weight gradients over two axes; on a TPU joining them
        # is a copy, where tokens lie in the lanes.
        rows = x.reshape(-1, x.shape[-1]) if platform() == "cpu" else x
        found = _applied(
            self,
            lambda x, kernel: [jnp.dot(x, part) for part in _cut(kernel, widths)],
            _features(self, "rows", rows.astype(dtype)),
        )
        found = [_features(self, "columns", y) for y in found]
        if self.bias is not None:
            bias = self.bias[...].astype(dtype).reshape((1,) * (rows.ndim - 1) + (-1,))
            found = [y + b for y, b in zip(found, _cut(bias, widths), strict=True)]
        if hasattr(self, "lora_A"):
            up, down = _adapter(self, rows)
            added = up.parts(down, widths)
            found = [y + more for y, more in zip(found, added, strict=True)]
        return tuple(y.reshape(*x.shape[:-1], -1) for y in found)


def _adapter(layer: Any, x: Array) -> tuple[Any, Array]:
    """Returns (B of a layer's low-rank adapter, the input of B: A of `x`, scaled).

    The scale comes before B: a product beside the sum would be contracted into it, in one of the
    policy's and the reference's forwards and not in the other, and beta amplifies that.
    """
    return layer.lora_B, layer.lora_scale * layer.lora_A(x)


def _cut(x: Array, widths: Sequence[int]) -> list[Array]:
    """Cuts the last axis into parts; one part is `x` itself, not a slice of it."""
    if len(widths) == 1:
        return [x]
    return jnp.split(x, list(itertools.accumulate(widths[:-1])), axis=-1)


class Embed(nnx.Embed):
    """A table of embeddings, which may be sharded over its features."""

    def __call__(self, ids: Int[Array, "*rows"]) -> Float[Array, "*rows D"]:
        table = self.embedding[...].astype(self.dtype or self.embedding.dtype)
        return looked_up(table, ids, self.features)


class Conv(nnx.Conv):
    """A convolution; `split` as in Linear."""

    def __init__(self, *shape: Any, split: str = "whole", **kw: Any):
        super().__init__(*shape, **kw)
        self.split = split

    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N h w D"]:
        dtype = self.dtype or x.dtype
        padding: Any = self.padding
        strides: Any = (self.strides,) * 2 if isinstance(self.strides, int) else self.strides
        convolve = functools.partial(convolution, strides=strides, padding=padding)
        y = _applied(self, convolve, _features(self, "rows", x.astype(dtype)))
        y = _features(self, "columns", y)
        if self.bias is not None:
            y = y + self.bias[...].astype(dtype).reshape(1, 1, 1, -1)
        if hasattr(self, "lora_A"):
            up, down = _adapter(self, x)
            y = y + up(down)
        return y


def _applied(layer: Any, operation: Callable[[Array, Array], Any], x: Array) -> Any:
    """Returns `operation(x, kernel)` of a layer's kernel, gathered, in the dtype of `x`.

    A quantised kernel is gathered as int8. The backward makes the kernel again: otherwise it would
    keep every kernel of the model in the compute dtype.
    """
    kernel: Any = layer.kernel.get_value()
    if not isinstance(kernel, Quantised):
        return operation(x, gathered(kernel.astype(x.dtype), layer.out_features, layer.split))
    values = gathered(kernel.values, layer.out_features, layer.split)

    def of_quantised(x: Array, kernel: Quantised) -> Any:
        return operation(x, kernel.dequantised(x.dtype))

    return jax.checkpoint(of_quantised)(x, Quantised(values, kernel.scale))


def _features(layer: Any, split: str, x: Array) -> Array:
    """Shards features over "tensor" where the layer's `split` says so."""
    return split_over_tensor(x, -1) if layer.split == split else x


def conv(in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1, pad=None, **kw):
    """A convolution with PyTorch's symmetric padding, or `pad` (before, after) on both axes."""
    pad = pad or (kernel // 2, kernel // 2)
    size = (kernel, kernel)
    return Conv(in_channels, out_channels, size, strides=stride, padding=(pad, pad), **kw)


# Norms, and the activations that follow them, are recomputed in the backward. What a backward
# keeps of a forward, XLA does not fuse as it does elsewhere: the policy's norms would differ from
# the reference's in their last bits, and beta turns those into margins of the policy against
# itself. It also saves memory.


class GroupNorm(nnx.GroupNorm):
    """Group normalisation, then the activation `act` (a name in ACTIVATIONS; None: none).

    Statistics a channel first, then a group: channels lie side by side in memory, and a
    reduction that leaves them alone is the quick one. Two passes, in float32: E[x²] - E[x]²
    costs three digits at mean 30, deviation 1.
    """

    def __init__(self, *args: Any, act: str | None = None, **kw: Any):
        super().__init__(*args, **kw)
        self.act = act

    def __call__(self, x: Float[Array, "N ... C"]) -> Float[Array, "N ... C"]:
        def normalise_and_act(x):
            normed = self._normalise(x)
            return activation(self.act)(normed) if self.act else normed

        return jax.checkpoint(normalise_and_act)(x)

    def _normalise(self, x: Float[Array, "N ... C"]) -> Float[Array, "N ... C"]:
        positions = tuple(range(1, x.ndim - 1))

        def group_mean(channels):
            groups = channels.reshape(x.shape[0], self.num_groups, -1)
            shared = jnp.broadcast_to(groups.mean(-1, keepdims=True), groups.shape)
            return shared.reshape(x.shape[0], -1)

        def everywhere(channels):
            return channels.reshape(channels.shape[0], *(1 for _ in positions), -1)

        wide = x.astype(jnp.float32)
        mean = group_mean(wide.mean(positions))
        # The derivative of a variance by its mean is 0. One axis of positions at a time, or XLA's
        # GPU compiler writes to memory what it then squares and sums.
        squares = jnp.square(wide - everywhere(jax.lax.stop_gradient(mean))).mean(positions[-1])
        variance = group_mean(squares.mean(positions[:-1]))
        weight, bias = _affine(self, 2)
        scale = jax.lax.rsqrt(variance + self.epsilon) * weight
        shift = bias - mean * scale
        return (wide * everywhere(scale) + everywhere(shift)).astype(self.dtype)


class LayerNorm(nnx.LayerNorm):
    """Normalisation of the last axis, times `scale`, plus `bias`. In float32 until the result."""

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        return _normalised(x, *_affine(self, x.ndim), self.epsilon, self.dtype or x.dtype)


def _affine(norm: Any, axes: int) -> tuple[Array, Array]:
    """Returns a norm's (scale, bias) in float32, along the last of so many axes."""
    scale, bias = (p[...].astype(jnp.float32) for p in (norm.scale, norm.bias))
    ones = (1,) * (axes - 1)
    return scale.reshape(*ones, -1), bias.reshape(*ones, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _normalised(x: Array, weight: Array, shift: Array, epsilon: float, dtype: Any) -> Array:
    """Layer norm in float32; `weight` and `shift` broadcast to `x`. Backward keeps `x` alone."""
    centred, inverse = _standardise(x, epsilon)
    return (centred * (inverse * weight) + shift).astype(dtype)


def _standardise(x: Array, epsilon: float) -> tuple[Array, Array]:
    """Returns (x less its mean over the last axis, one over its deviation), in float32."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    return centred, jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)


def _normalised_forward(x, weight, shift, epsilon, dtype):
    return _normalised(x, weight, shift, epsilon, dtype), (x, weight, shift)


def _normalised_backward(epsilon, dtype, kept, gradient):
    x, weight, shift = kept
    wide, gradient = x.astype(jnp.float32), gradient.astype(jnp.float32)
    centred, inverse = _standardise(x, epsilon)
    normed, scaled = centred * inverse, gradient * weight
    along = (scaled * normed).mean(-1, keepdims=True)
    of_x = inverse * (scaled - scaled.mean(-1, keepdims=True) - normed * along)

    mean = wide.mean(-1, keepdims=True)
    if platform() == "gpu":
        # From statistics in memory; or XLA writes `normed * gradient`, in float32, to sum it.
        mean, inverse = jax.lax.optimization_barrier((mean, inverse))
    of_weight = _summed(gradient * ((wide - mean) * inverse), weight.shape)
    return of_x.astype(x.dtype), of_weight, _summed(gradient, shift.shape)


_normalised.defvjp(_normalised_forward, _normalised_backward)


def _summed(x: Array, shape: tuple[int, ...]) -> Array:
    """Sums over the axes along which an array of `shape`, of as many axes, was broadcast."""
    axes = tuple(i for i in range(x.ndim) if x.shape[i] != shape[i])
    return x.sum(axes, keepdims=True)


class RMSNorm(nnx.RMSNorm):
    """Root-mean-square normalisation of the last axis, times `scale`. Statistics in float32."""

    def __call__(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        return jax.checkpoint(self._normalise)(x)

    def _normalise(self, x: Float[Array, "... C"]) -> Float[Array, "... C"]:
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.epsilon)
        weight: Any = self.scale
        scale = weight[...].astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        return (wide * inverse * scale).astype(self.dtype or x.dtype)


def modulated_norm(
    x: Float[Array, "N T D"], shift: Float[Array, "N D"], scale: Float[Array, "N D"], epsilon: float
) -> Float[Array, "N T D"]:
    """Layer norm without parameters, times 1 + scale, plus shift; float32 until the result."""

    weight, shift = 1 + scale.astype(jnp.float32), shift.astype(jnp.float32)
    return _normalised(x, weight[:, None], shift[:, None], epsilon, x.dtype)


def group_norm(
    channels: int, groups: int, epsilon: float, act: str | None = None, **kw
) -> GroupNorm:
    if channels % groups:
        raise UserError(f"norm_num_groups={groups} must divide {channels} channels")
    return GroupNorm(channels, num_groups=groups, epsilon=epsilon, act=act, **kw)


def layer_norm(channels: int, epsilon: float = 1e-5, **kw) -> LayerNorm:
    return LayerNorm(channels, epsilon=epsilon, use_fast_variance=False, **kw)


def sinusoid(
    values: Shaped[Array, "..."], width: int, flip_sin_to_cos: bool, freq_shift: float | int
) -> Float[Array, "... E"]:
    """Sinusoidal embedding in float32: half of the timesteps are not exact in bfloat16."""
    half = width // 2
    exponent = -math.log(10000) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
    frequencies = jnp.exp(exponent).reshape((1,) * values.ndim + (half,))
    angles = values.astype(jnp.float32)[..., None] * frequencies
    parts = [jnp.sin(angles), jnp.cos(angles)]
    embedded = jnp.concatenate(parts[::-1] if flip_sin_to_cos else parts, axis=-1)
    return embedded if width % 2 == 0 else jnp.pad(embedded, [(0, 0)] * values.ndim + [(0, 1)])


class TimestepEmbedding(nnx.Module):
    def __init__(self, width: int, out: int, act: str, **kw: Any):
        self.linear_1 = Linear(width, out, **kw)
        self.linear_2 = Linear(out, out, **kw)
        self.act = act

    def __call__(self, x: Float[Array, "N D"]) -> Float[Array, "N E"]:
        return self.linear_2(activation(self.act)(self.linear_1(x)))


class ResnetBlock2D(nnx.Module):
    """norm+act, conv, (+ time), norm+act, conv, + shortcut. time_width None: no time input."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_width: int | None,
        *,
        groups: int,
        epsilon: float,
        act: str,
        **kw: Any,
    ):
        self.norm1 = group_norm(in_channels, groups, epsilon, act, **kw)
        self.conv1 = conv(in_channels, out_channels, split="columns", **kw)
        if time_width is not None:
            self.time_emb_proj = Linear(time_width, out_channels, split="columns", **kw)
        self.norm2 = group_norm(out_channels, groups, epsilon, act, **kw)
        self.conv2 = conv(out_channels, out_channels, split="rows", **kw)
        if in_channels != out_channels:
            self.conv_shortcut = conv(in_channels, out_channels, kernel=1, **kw)
        self.has_shortcut = in_channels != out_channels
        self.act = act

    def __call__(
        self, x: Float[Array, "N H W C"], time: Float[Array, "N E"] | None = None
    ) -> Float[Array, "N H W D"]:
        hidden = self.conv1(self.norm1(x))
        if time is not None:
            hidden = hidden + self.time_emb_proj(activation(self.act)(time))[:, None, None]
        hidden = self.conv2(self.norm2(hidden))
        return (self.conv_shortcut(x) if self.has_shortcut else x) + hidden


class Downsample2D(nnx.Module):
    """Halves the size by a convolution of stride 2. `pad` is (1, 1) in the UNet, (0, 1) in the
    VAE's encoder."""

    def __init__(self, channels: int, pad: tuple[int, int], **kw: Any):
        self.conv = conv(channels, channels, stride=2, pad=pad, **kw)

    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N h w C"]:
        return self.conv(x)


class Upsample2D(nnx.Module):
    """Doubles the size, nearest neighbour, then a convolution. `size` crops to an odd skip."""

    def __init__(self, channels: int, **kw: Any):
        self.conv = conv(channels, channels, **kw)

    def __call__(
        self, x: Float[Array, "N h w C"], size: tuple[int, int] | None = None
    ) -> Float[Array, "N H W C"]:
        n, h, w, c = x.shape
        x = jnp.broadcast_to(x[:, :, None, :, None], (n, h, 2, w, 2, c)).reshape(n, 2 * h, 2 * w, c)
        if size is not None:
            x = x[:, : size[0], : size[1]]
        return self.conv(x)


class Attention(nnx.Module):
    """Attention with PyTorch's `to_out.0`; self-attention where no context is given."""

    def __init__(self, width: int, context: int, heads: int, *, bias: bool = False, **kw: Any):
        if width % heads:
            raise UserError(
                f"attention_head_dim={heads} (the number of heads) must divide {width} channels"
            )
        into: Any = {"use_bias": bias, "split": "columns", **kw}
        self.to_q = Linear(width, width, **into)
        self.to_k = Linear(context, width, **into)
        self.to_v = Linear(context, width, **into)
        self.to_out = nnx.List([Linear(width, width, split="rows", **kw)])
        self.heads = heads

    def __call__(
        self,
        x: Float[Array, "N T D"],
        context: Float[Array, "N S E"] | None = None,
        *,
        kernel: str = "plain",
    ) -> Float[Array, "N T D"]:
        context = x if context is None else context
        q, k, v = (
            y.reshape(*y.shape[:2], self.heads, -1)
            for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out[0](attention(q, k, v, kernel=kernel).reshape(x.shape))
