"""The UNet of SD1.x, SD2.x and SDXL. Module tree and config keys follow PyTorch diffusers.

Reference: diffusers `UNet2DConditionModel`, `unet_2d_blocks`, `Transformer2DModel`.
"""

import functools
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Shaped

from dmpo_jax.errors import UserError
from dmpo_jax.models.component_config import ModelConfig, Only, per_block
from dmpo_jax.models.execution import DEFAULT, Execution, apply_blocks, rematerialised
from dmpo_jax.models.layers import (
    ACTIVATIONS,
    Attention,
    Downsample2D,
    Linear,
    ResnetBlock2D,
    TimestepEmbedding,
    Upsample2D,
    activation,
    conv,
    group_norm,
    layer_norm,
    sinusoid,
)

DOWN_BLOCKS = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}  # type -> has attention
UP_BLOCKS = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}

KEYS = {
    "act_fn": "silu",
    "addition_embed_type": Only(None, "text_time"),
    "addition_time_embed_dim": None,
    "attention_head_dim": 8,  # the number of heads, despite its name
    "attention_type": Only("default"),
    "block_out_channels": (320, 640, 1280, 1280),
    "center_input_sample": Only(False),
    "class_embed_type": Only(None),
    "class_embeddings_concat": Only(False),
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 1280,
    "cross_attention_norm": Only(None),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "downsample_padding": Only(1, 0),
    "dropout": Only(0.0),
    "dual_cross_attention": Only(False),
    "encoder_hid_dim": Only(None),
    "encoder_hid_dim_type": Only(None),
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_only_cross_attention": Only(None, False),
    "mid_block_scale_factor": Only(1),
    "mid_block_type": Only("UNetMidBlock2DCrossAttn"),
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
    "num_attention_heads": Only(None),
    "num_class_embeds": Only(None),
    "only_cross_attention": Only(False),
    "out_channels": 4,
    "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": Only(1.0),
    "resnet_skip_time_act": Only(False),
    "resnet_time_scale_shift": Only("default"),
    "reverse_transformer_layers_per_block": None,
    "sample_size": None,
    "time_cond_proj_dim": Only(None),
    "time_embedding_act_fn": Only(None),
    "time_embedding_dim": None,
    "time_embedding_type": Only("positional"),
    "timestep_post_act": Only(None),
    "transformer_layers_per_block": 1,
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "upcast_attention": False,  # attention is in float32 here either way
    "use_linear_projection": False,
}
# Used by addition or attention kinds that are refused above.
DEAD = frozenset({"addition_embed_type_num_heads"})


class GEGLU(nnx.Module):
    def __init__(self, width: int, inner: int, **kw: Any):
        self.proj = Linear(width, 2 * inner, **kw)

    def __call__(self, x: Float[Array, "N T D"]) -> Float[Array, "N T E"]:
        half = self.proj.out_features // 2
        value, gate = self.proj.parts(x, (half, half))
        return value * activation("gelu")(gate)


class FeedForward(nnx.Module):
    def __init__(self, width: int, **kw: Any):
        # Index 1 is PyTorch's dropout, which has no parameters.
        leave = Linear(4 * width, width, split="rows", **kw)
        self.net = nnx.List([GEGLU(width, 4 * width, **kw), None, leave])

    def __call__(self, x: Float[Array, "N T D"]) -> Float[Array, "N T D"]:
        enter: Any = self.net[0]
        leave: Any = self.net[2]
        return leave(enter(x))


class BasicTransformerBlock(nnx.Module):
    def __init__(self, width: int, context: int, heads: int, **kw: Any):
        self.norm1 = layer_norm(width, **kw)
        self.attn1 = Attention(width, width, heads, **kw)
        self.norm2 = layer_norm(width, **kw)
        self.attn2 = Attention(width, context, heads, **kw)
        self.norm3 = layer_norm(width, **kw)
        self.ff = FeedForward(width, **kw)

    def __call__(
        self, x: Float[Array, "N T D"], context: Float[Array, "N S E"], kernel: str
    ) -> Float[Array, "N T D"]:
        x = x + self.attn1(self.norm1(x), kernel=kernel)
        x = x + self.attn2(self.norm2(x), context, kernel=kernel)
        return x + self.ff(self.norm3(x))


class Transformer2DModel(nnx.Module):
    """Transformer blocks over positions.

    SD1.x projects in and out by 1x1 convolutions, SD2 and SDXL by linear layers.
    """

    def __init__(
        self, width: int, context: int, heads: int, layers: int, *, linear: bool, groups: int, **kw
    ):
        def project():
            return Linear(width, width, **kw) if linear else conv(width, width, 1, **kw)

        self.norm = group_norm(width, groups, 1e-6, **kw)  # not the UNet's norm_eps
        self.proj_in = project()
        blocks = [BasicTransformerBlock(width, context, heads, **kw) for _ in range(layers)]
        self.transformer_blocks = nnx.List(blocks)
        self.proj_out = project()

    def __call__(
        self, x: Float[Array, "N H W C"], context: Float[Array, "N S E"], execution: Execution
    ) -> Float[Array, "N H W C"]:
        n, h, w, c = x.shape
        hidden = self.proj_in(self.norm(x)).reshape(n, h * w, c)
        hidden = apply_blocks(list(self.transformer_blocks), hidden, context, execution)
        return x + self.proj_out(hidden.reshape(n, h, w, c))


class Stage(nnx.Module):
    """A down, mid or up block: resnets, each followed by its attention if it has any."""

    def __init__(
        self,
        config: ModelConfig,
        channels: list[tuple[int, int]],
        time_width: int,
        *,
        attentions: int,
        context: int,
        heads: int,
        transformer_layers: int,
        downsample: bool = False,
        upsample: bool = False,
        **kw: Any,
    ):
        groups = config.norm_num_groups
        self.resnets = nnx.List(
            ResnetBlock2D(
                i, o, time_width, groups=groups, epsilon=config.norm_eps, act=config.act_fn, **kw
            )
            for i, o in channels
        )
        out = channels[-1][1]
        if attentions:
            self.attentions = nnx.List(
                Transformer2DModel(
                    out,
                    context,
                    heads,
                    transformer_layers,
                    linear=config.use_linear_projection,
                    groups=groups,
                    **kw,
                )
                for _ in range(attentions)
            )
        pad = (1, 1) if config.downsample_padding else (0, 1)
        if downsample:
            self.downsamplers = nnx.List([Downsample2D(out, pad, **kw)])
        if upsample:
            self.upsamplers = nnx.List([Upsample2D(out, **kw)])
        self.has = (bool(attentions), downsample, upsample)

    def down(self, x, time, context, skips: list, execution: Execution):
        attends, downsample, _ = self.has
        for i in range(len(self.resnets)):
            x = self._resnet(i, x, time, execution)
            if attends:
                x = self._attention(i, x, context, execution)
            skips.append(x)
        if downsample:
            x = self.downsamplers[0](x)
            skips.append(x)
        return x

    def mid(self, x, time, context, execution: Execution):
        x = self._resnet(0, x, time, execution)
        x = self._attention(0, x, context, execution)
        return self._resnet(1, x, time, execution)

    def up(self, x, time, context, skips: list, execution: Execution):
        attends, _, upsample = self.has
        for i in range(len(self.resnets)):
            x = self._resnet(i, jnp.concatenate([x, skips.pop()], axis=-1), time, execution)
            if attends:
                x = self._attention(i, x, context, execution)
        return self.upsamplers[0](x, skips[-1].shape[1:3]) if upsample else x

    def _resnet(self, i: int, x, time, execution: Execution):
        return rematerialised(self.resnets[i], execution.remat)(x, time)

    def _attention(self, i: int, x, context, execution: Execution):
        attend = functools.partial(self.attentions[i], execution=execution)
        if execution.remat == "block":
            attend = rematerialised(attend, "block")
        return attend(x, context)


class UNet2DConditionModel(nnx.Module):
    """Predicts noise, velocity or sample of noised latents under a text context.

    Args:
        config: the contents of unet/config.json, as diffusers writes it.
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
        kw: Any = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        widths = list(config.block_out_channels)
        blocks = len(widths)
        time_width = config.time_embedding_dim or 4 * widths[0]
        _check(config, blocks)
        heads = per_block(config.attention_head_dim, blocks, "attention_head_dim")
        context = per_block(config.cross_attention_dim, blocks, "cross_attention_dim")
        layers = per_block(config.layers_per_block, blocks, "layers_per_block")
        depth = per_block(
            config.transformer_layers_per_block, blocks, "transformer_layers_per_block"
        )
        up_depth = config.reverse_transformer_layers_per_block or depth[::-1]

        k = config.conv_in_kernel
        self.conv_in = conv(config.in_channels, widths[0], k, pad=((k - 1) // 2,) * 2, **kw)
        self.time_embedding = TimestepEmbedding(widths[0], time_width, config.act_fn, **kw)
        if config.addition_embed_type == "text_time":
            added = config.projection_class_embeddings_input_dim
            self.add_embedding = TimestepEmbedding(added, time_width, config.act_fn, **kw)

        def stage(i: int, channels, attentions: int, transformer_layers: int, **sampling) -> Stage:
            return Stage(
                config,
                channels,
                time_width,
                attentions=attentions,
                context=context[i],
                heads=heads[i],
                transformer_layers=transformer_layers,
                **sampling,
                **kw,
            )

        last = blocks - 1
        stages, skip_widths = [], [widths[0]]
        for i, (kind, width) in enumerate(zip(config.down_block_types, widths, strict=True)):
            enter = widths[max(i - 1, 0)]
            channels = [(enter if j == 0 else width, width) for j in range(layers[i])]
            attends = layers[i] if DOWN_BLOCKS[kind] else 0
            stages.append(stage(i, channels, attends, depth[i], downsample=i < last))
            skip_widths += [width] * (layers[i] + (i < last))
        self.down_blocks = nnx.List(stages)

        self.mid_block = stage(last, [(widths[-1], widths[-1])] * 2, 1, depth[-1])

        stages, below = [], widths[-1]
        for i, kind in enumerate(config.up_block_types):
            j = last - i
            channels = []
            for _ in range(layers[j] + 1):
                channels.append((below + skip_widths.pop(), widths[j]))
                below = widths[j]
            attends = layers[j] + 1 if UP_BLOCKS[kind] else 0
            stages.append(stage(j, channels, attends, up_depth[i], upsample=i < last))
        self.up_blocks = nnx.List(stages)

        self.conv_norm_out = group_norm(
            widths[0], config.norm_num_groups, config.norm_eps, config.act_fn, **kw
        )
        k = config.conv_out_kernel
        self.conv_out = conv(widths[0], config.out_channels, k, pad=((k - 1) // 2,) * 2, **kw)

    def __call__(
        self,
        sample: Float[Array, "N H W C"],
        timesteps: Shaped[Array, " N"] | Shaped[Array, ""],
        context: Float[Array, "N S E"],
        pooled: Float[Array, "N P"] | None = None,
        time_ids: Float[Array, "N 6"] | None = None,
    ) -> Float[Array, "N H W D"]:
        """Predicts, in the compute dtype. pooled and time_ids (pixels) are SDXL's."""
        config = self.config
        timesteps = jnp.broadcast_to(timesteps, sample.shape[:1])
        time = self.time_embedding(self._sinusoid(timesteps, config.block_out_channels[0]))
        if config.addition_embed_type == "text_time":
            if pooled is None or time_ids is None:
                raise ValueError("this UNet (text_time) needs pooled [N, P] and time_ids [N, 6]")
            sizes = self._sinusoid(time_ids, config.addition_time_embed_dim)
            sizes = sizes.reshape(sizes.shape[0], -1)
            added = jnp.concatenate([pooled.astype(self.dtype), sizes], axis=-1)
            time = time + self.add_embedding(added)

        context = context.astype(self.dtype)
        x = self.conv_in(sample.astype(self.dtype))
        skips = [x]
        for block in self.down_blocks:
            x = block.down(x, time, context, skips, self.execution)
        x = self.mid_block.mid(x, time, context, self.execution)
        for block in self.up_blocks:
            x = block.up(x, time, context, skips, self.execution)
        return self.conv_out(self.conv_norm_out(x))

    def _sinusoid(self, values, width: int):
        config = self.config
        embedded = sinusoid(values, width, config.flip_sin_to_cos, config.freq_shift)
        return embedded.astype(self.dtype)


def _check(config: ModelConfig, blocks: int) -> None:
    """Checks block types, activation, transformer depths and text_time keys of the config."""
    for key, known in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
        types = config[key]
        if len(types) != blocks:
            raise UserError(
                f"{key} lists {len(types)} blocks, block_out_channels {blocks}: they must agree"
            )
        if unknown := [t for t in types if t not in known]:
            raise UserError(f"{key} holds {unknown}; supported: {sorted(known)}")
    if config.act_fn not in ACTIVATIONS:
        raise UserError(f"act_fn={config.act_fn!r}; supported: {sorted(ACTIVATIONS)}")
    depth = config.transformer_layers_per_block
    if isinstance(depth, list | tuple) and any(isinstance(d, list | tuple) for d in depth):
        raise UserError(
            f"transformer_layers_per_block={depth!r} differs within a block; "
            "supported: one number, or one a block"
        )
    if config.addition_embed_type and not (
        config.addition_time_embed_dim and config.projection_class_embeddings_input_dim
    ):
        raise UserError(
            "addition_embed_type='text_time' needs addition_time_embed_dim and "
            "projection_class_embeddings_input_dim in config.json"
        )
