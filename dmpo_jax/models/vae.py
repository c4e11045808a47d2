"""The autoencoder between images and latents.

Reference: diffusers `AutoencoderKL` with DownEncoderBlock2D and UpDecoderBlock2D.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dmpo_jax.errors import UserError
from dmpo_jax.models.component_config import ModelConfig, Only
from dmpo_jax.models.layers import (
    ACTIVATIONS,
    Attention,
    Downsample2D,
    ResnetBlock2D,
    Upsample2D,
    conv,
    group_norm,
)
from dmpo_jax.models.parameters import Buffer

EPSILON = 1e-6

KEYS = {
    "act_fn": "silu",
    "block_out_channels": (64,),
    "down_block_types": ("DownEncoderBlock2D",),
    "in_channels": 3,
    "latent_channels": 4,
    "latents_mean": Only(None),
    "latents_std": Only(None),
    "layers_per_block": 1,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "up_block_types": ("UpDecoderBlock2D",),
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
# force_upcast tells PyTorch pipelines not to run the VAE in fp16; here the caller picks the dtype.
# batch_norm_momentum is of a training that is over.
DEAD = frozenset({"force_upcast", "batch_norm_momentum"})


class SpatialAttention(Attention):
    """Attention with one head over all positions, with its own norm and residual."""

    def __init__(self, channels: int, groups: int, **kw: Any):
        super().__init__(channels, channels, 1, bias=True, **kw)
        self.group_norm = group_norm(channels, groups, EPSILON, **kw)

    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N H W C"]:
        n, h, w, c = x.shape
        return x + super().__call__(self.group_norm(x).reshape(n, h * w, c)).reshape(x.shape)


class Stage(nnx.Module):
    """Resnets, then down- or upsampling if requested."""

    def __init__(self, config, channels, *, downsample=False, upsample=False, **kw: Any):
        self.resnets = nnx.List(_resnet(config, i, o, **kw) for i, o in channels)
        out = channels[-1][1]
        if downsample:
            self.downsamplers = nnx.List([Downsample2D(out, (0, 1), **kw)])
        if upsample:
            self.upsamplers = nnx.List([Upsample2D(out, **kw)])
        self.sampler = "downsamplers" if downsample else "upsamplers" if upsample else None

    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N h w D"]:
        for resnet in self.resnets:
            x = resnet(x)
        return getattr(self, self.sampler)[0](x) if self.sampler else x


class MidBlock(nnx.Module):
    def __init__(self, config: ModelConfig, channels: int, **kw: Any):
        self.resnets = nnx.List(_resnet(config, channels, channels, **kw) for _ in range(2))
        if config.mid_block_add_attention:
            attention = SpatialAttention(channels, config.norm_num_groups, **kw)
            self.attentions = nnx.List([attention])
        self.attends = config.mid_block_add_attention

    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N H W C"]:
        x = self.resnets[0](x)
        if self.attends:
            x = self.attentions[0](x)
        return self.resnets[1](x)


class Encoder(nnx.Module):
    def __init__(self, config: ModelConfig, **kw: Any):
        widths = list(config.block_out_channels)
        last = len(widths) - 1
        self.conv_in = conv(config.in_channels, widths[0], **kw)
        self.down_blocks = nnx.List(
            Stage(
                config,
                [(widths[max(i - 1, 0)], width)] + [(width, width)] * (config.layers_per_block - 1),
                downsample=i < last,
                **kw,
            )
            for i, width in enumerate(widths)
        )
        self.mid_block = MidBlock(config, widths[-1], **kw)
        self.conv_norm_out = group_norm(
            widths[-1], config.norm_num_groups, EPSILON, config.act_fn, **kw
        )
        self.conv_out = conv(widths[-1], 2 * config.latent_channels, **kw)

    def __call__(self, x: Float[Array, "N H W C"]) -> Float[Array, "N h w M"]:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x)))


class Decoder(nnx.Module):
    def __init__(self, config: ModelConfig, **kw: Any):
        widths = list(config.get("decoder_block_out_channels") or config.block_out_channels)[::-1]
        last = len(widths) - 1
        self.conv_in = conv(config.latent_channels, widths[0], **kw)
        self.mid_block = MidBlock(config, widths[0], **kw)
        self.up_blocks = nnx.List(
            Stage(
                config,
                [(widths[max(i - 1, 0)], width)] + [(width, width)] * config.layers_per_block,
                upsample=i < last,
                **kw,
            )
            for i, width in enumerate(widths)
        )
        self.conv_norm_out = group_norm(
            widths[-1], config.norm_num_groups, EPSILON, config.act_fn, **kw
        )
        self.conv_out = conv(widths[-1], config.out_channels, **kw)

    def __call__(self, x: Float[Array, "N h w C"]) -> Float[Array, "N H W D"]:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x))


class AutoencoderKL(nnx.Module):
    """The VAE between images in [-1, 1], NHWC, and latent moments.

    Latents are unscaled: multiply by `config.scaling_factor` before diffusing, divide
    before decoding. Stock SDXL weights overflow in float16: use bfloat16 or float32.

    Raises:
        ValueError: naming each config key whose value is not supported.
    """

    KEYS: Mapping[str, Any] = KEYS

    def __init__(self, config: Any, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs):
        self.config = config = ModelConfig(config, self.KEYS, DEAD)
        self.dtype = dtype
        kw: Any = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        _check(config)
        self.encoder = Encoder(config, **kw)
        self.decoder = Decoder(config, **kw)
        latent = config.latent_channels
        if config.use_quant_conv:
            self.quant_conv = conv(2 * latent, 2 * latent, 1, **kw)
        if config.use_post_quant_conv:
            self.post_quant_conv = conv(latent, latent, 1, **kw)

    def encode(self, images: Float[Array, "N H W C"]) -> Float[Array, "N h w M"]:
        """Encodes images to mean and log-variance (not clipped), concatenated on the last axis."""
        moments = self.encoder(images.astype(self.dtype))
        return self.quant_conv(moments) if self.config.use_quant_conv else moments

    def decode(self, latents: Float[Array, "N h w C"]) -> Float[Array, "N H W D"]:
        """Decodes unscaled latents to images, about in [-1, 1], not clipped."""
        latents = latents.astype(self.dtype)
        if self.config.use_post_quant_conv:
            latents = self.post_quant_conv(latents)
        return self.decoder(latents)


class Statistics(nnx.Module):
    """Running mean and variance of a batch norm, of packed latents."""

    def __init__(self, channels: int):
        self.running_mean = Buffer(jnp.zeros((channels,), jnp.float32))
        self.running_var = Buffer(jnp.ones((channels,), jnp.float32))


class AutoencoderKLFlux2(AutoencoderKL):
    """FLUX.2's VAE: `AutoencoderKL` whose latents are scaled by statistics, a packed channel each.

    Reference: diffusers `AutoencoderKLFlux2`.
    """

    KEYS: Mapping[str, Any] = {
        **{k: v for k, v in KEYS.items() if k not in ("scaling_factor", "shift_factor")},
        "batch_norm_eps": 1e-4,
        "block_out_channels": (128, 256, 512, 512),
        "decoder_block_out_channels": None,
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "latent_channels": 32,
        "layers_per_block": 2,
        "patch_size": Only([2, 2], (2, 2)),
        "sample_size": 1024,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }

    def __init__(self, config: Any, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        pack = self.config.patch_size
        self.bn = Statistics(self.config.latent_channels * pack[0] * pack[1])

    def unused(self, name: str) -> bool:
        """True for tensors of a folder that are not needed: how many batches were seen."""
        return name == "bn.num_batches_tracked"


def _resnet(config: ModelConfig, in_channels: int, out_channels: int, **kw: Any) -> ResnetBlock2D:
    return ResnetBlock2D(
        in_channels,
        out_channels,
        None,
        groups=config.norm_num_groups,
        epsilon=EPSILON,
        act=config.act_fn,
        **kw,
    )


def _check(config: ModelConfig) -> None:
    blocks = len(config.block_out_channels)
    for key, kind in (
        ("down_block_types", "DownEncoderBlock2D"),
        ("up_block_types", "UpDecoderBlock2D"),
    ):
        if list(config[key]) != [kind] * blocks:
            raise UserError(
                f"{key}={list(config[key])!r}; supported: {kind} for each of the {blocks} blocks"
            )
    if config.act_fn not in ACTIVATIONS:
        raise UserError(f"act_fn={config.act_fn!r}; supported: {sorted(ACTIVATIONS)}")
