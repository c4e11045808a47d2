"""What a step costs in floating-point operations: matrix products and convolutions, 2 a
multiply-add, padding counted as if it were data. Norms, activations and softmax are left out.

XLA's own analysis is no such count: it sees a loop's body once, whatever its trips.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jax.extend import core

from dmpo_jax.models.component_config import ModelConfig, per_block
from dmpo_jax.models.unet import DEAD, DOWN_BLOCKS, KEYS, UP_BLOCKS


class Product(NamedTuple):
    """`rows` x `inner` times `inner` x `out` of one image; a convolution's inner is its patch.

    path: the layer's, of the UNet; an attention's two products end in "scores" and "values".
    """

    path: str
    rows: int
    inner: int
    out: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.out

    @property
    def has_weights(self) -> bool:
        return not self.path.endswith((".scores", ".values"))


class Forward(NamedTuple):
    """FLOPs of a forward pass by what a backward pass does with them.

    weights: activations times weights. attention: activations times activations.
    adapters: what low-rank adapters add.
    """

    weights: int
    attention: int
    adapters: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.attention + self.adapters


def unet_forward(
    config: Mapping[str, Any],
    *,
    height: int,
    width: int,
    tokens: int,
    batch: int = 1,
    rank: int = 0,
    targets: Sequence[str] = (),
) -> Forward:
    """FLOPs of one UNet forward; `.total` is their sum.

    Args:
        config: what unet/config.json holds.
        height, width: of the latents. tokens: of the context. batch: images.
        rank, targets: of low-rank adapters, as `lora.attach` takes them; 0 for none.
    """
    weights = attention = adapters = 0
    for product in unet_products(config, height=height, width=width, tokens=tokens):
        if not product.has_weights:
            attention += product.flops
            continue
        weights += product.flops
        if rank and any(f".{product.path}".endswith(f".{target}") for target in targets):
            adapters += 2 * product.rows * rank * (product.inner + product.out)
    return Forward(batch * weights, batch * attention, batch * adapters)


def step_flops(
    forward: Forward, *, needs_reference: bool, needs_rejected: bool, lora: bool = False
) -> int:
    """FLOPs that one pair needs in a training step, recomputation and optimizer apart.

    Args:
        forward: of one image (batch=1).
        needs_reference, needs_rejected: of the objective.
        lora: adapters alone are trained.

    An image takes the policy's forward and its backward, and the reference's forward. The
    backward of a product is two products of the same size, one for each operand's gradient.
    With adapters the gradient of every frozen weight is left out; attention's two operands
    and the adapters still have both, and the reference runs through the adapters, switched
    off. Counted in spite of being spared: the gradients of the UNet's inputs and, with
    adapters, of what lies before the first of them. Together below 1 % at full size.
    """
    backward = 2 * (forward.attention + forward.adapters) + (1 if lora else 2) * forward.weights
    image = forward.total + backward + (forward.total if needs_reference else 0)
    return image * (2 if needs_rejected else 1)


def unet_products(
    config: Mapping[str, Any], *, height: int, width: int, tokens: int
) -> Iterator[Product]:
    """Every product of one image's way through `UNet2DConditionModel(config)`."""
    config = config if isinstance(config, ModelConfig) else ModelConfig(config, KEYS, DEAD)
    widths = list(config.block_out_channels)
    blocks, last = len(widths), len(widths) - 1
    time_width = config.time_embedding_dim or 4 * widths[0]
    layers = per_block(config.layers_per_block, blocks, "layers_per_block")
    context = per_block(config.cross_attention_dim, blocks, "cross_attention_dim")
    depth = per_block(config.transformer_layers_per_block, blocks, "transformer_layers_per_block")
    up_depth = config.reverse_transformer_layers_per_block or depth[::-1]
    sizes = [(height, width)]
    for _ in range(last):
        height, width = (_halved(x, config.downsample_padding) for x in (height, width))
        sizes.append((height, width))
    pixels = [h * w for h, w in sizes]

    def stage(path: str, level: int, channels, attends: bool, transformers: int):
        for i, (enter, leave) in enumerate(channels):
            yield from _resnet(f"{path}.resnets.{i}", pixels[level], enter, leave, time_width)
            if attends and f"{path}.{i}" != "mid_block.1":
                name = f"{path}.attentions.{i}"
                shape = (pixels[level], leave, tokens, context[level])
                yield from _transformer(name, *shape, transformers)

    yield from _convolution("conv_in", pixels[0], config.in_channels, widths[0], _kernel(config))
    yield from _embedding("time_embedding", widths[0], time_width)
    if config.addition_embed_type == "text_time":
        added = config.projection_class_embeddings_input_dim
        yield from _embedding("add_embedding", added, time_width)
    skips = [widths[0]]
    for i, (kind, out) in enumerate(zip(config.down_block_types, widths, strict=True)):
        channels = [(widths[max(i - 1, 0)] if j == 0 else out, out) for j in range(layers[i])]
        yield from stage(f"down_blocks.{i}", i, channels, DOWN_BLOCKS[kind], depth[i])
        skips += [out] * (layers[i] + (i < last))
        if i < last:
            name = f"down_blocks.{i}.downsamplers.0.conv"
            yield from _convolution(name, pixels[i + 1], out, out, 3)
    yield from stage("mid_block", last, [(widths[-1], widths[-1])] * 2, True, depth[-1])
    below = widths[-1]
    for i, kind in enumerate(config.up_block_types):
        level, channels = last - i, []
        for _ in range(layers[level] + 1):
            channels.append((below + skips.pop(), widths[level]))
            below = widths[level]
        yield from stage(f"up_blocks.{i}", level, channels, UP_BLOCKS[kind], up_depth[i])
        if i < last:
            name = f"up_blocks.{i}.upsamplers.0.conv"
            yield from _convolution(name, pixels[level - 1], below, below, 3)
    kernel = config.conv_out_kernel
    yield from _convolution("conv_out", pixels[0], widths[0], config.out_channels, kernel)


def _kernel(config: ModelConfig) -> int:
    if config.conv_in_kernel % 2 == 0 or config.conv_out_kernel % 2 == 0:
        raise ValueError(
            f"FLOPs are counted for odd kernels, but got conv_in_kernel={config.conv_in_kernel}, "
            f"conv_out_kernel={config.conv_out_kernel}"
        )
    return config.conv_in_kernel


def _halved(size: int, padding: int) -> int:
    """What `Downsample2D` leaves: padded by (1, 1), or by (0, 1) where downsample_padding is 0."""
    return (size + 1) // 2 if padding else size // 2


def _convolution(path: str, pixels: int, enter: int, leave: int, kernel: int):
    yield Product(path, pixels, kernel * kernel * enter, leave)


def _embedding(path: str, enter: int, leave: int):
    yield Product(f"{path}.linear_1", 1, enter, leave)
    yield Product(f"{path}.linear_2", 1, leave, leave)


def _resnet(path: str, pixels: int, enter: int, leave: int, time_width: int):
    yield from _convolution(f"{path}.conv1", pixels, enter, leave, 3)
    yield Product(f"{path}.time_emb_proj", 1, time_width, leave)
    yield from _convolution(f"{path}.conv2", pixels, leave, leave, 3)
    if enter != leave:
        yield from _convolution(f"{path}.conv_shortcut", pixels, enter, leave, 1)


def _transformer(path: str, pixels: int, width: int, tokens: int, context: int, layers: int):
    yield Product(f"{path}.proj_in", pixels, width, width)
    for i in range(layers):
        block = f"{path}.transformer_blocks.{i}"
        for name, rows, enter in (("attn1", pixels, width), ("attn2", tokens, context)):
            yield Product(f"{block}.{name}.to_q", pixels, width, width)
            yield Product(f"{block}.{name}.to_k", rows, enter, width)
            yield Product(f"{block}.{name}.to_v", rows, enter, width)
            # Over all heads: they share the width.
            yield Product(f"{block}.{name}.scores", pixels, width, rows)
            yield Product(f"{block}.{name}.values", pixels, rows, width)
            yield Product(f"{block}.{name}.to_out.0", pixels, width, width)
        yield Product(f"{block}.ff.net.0.proj", pixels, width, 8 * width)
        yield Product(f"{block}.ff.net.2", pixels, 4 * width, width)
    yield Product(f"{path}.proj_out", pixels, width, width)


def jaxpr_flops(jaxpr: Any) -> int:
    """FLOPs of a traced program as it stands, recomputation included.

    Args:
        jaxpr: of `jax.make_jaxpr(f)(...)`, or `jax.jit(f).trace(...).jaxpr`.

    A scan counts its length, a Pallas kernel its grid, a shard_map its devices, a branch its
    dearest side. A while loop, whose trips are not known, counts once, and kernels from
    outside XLA (cuDNN) not at all.
    """
    total = 0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            inner = math.prod(shape[axis] for axis in contracted)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            inner = math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
            # The gradient of a strided one meets zeros between its elements: no work.
            zeros = math.prod(params["lhs_dilation"])
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape) // zeros
        else:
            inside = [jaxpr_flops(sub) for sub in _jaxprs(params)]
            once = max(inside, default=0) if name == "cond" else sum(inside)
            total += once * _times(name, params)
    return total


def _times(name: str, params: Mapping[str, Any]) -> int:
    if name == "scan":
        return params["length"]
    if name == "shard_map":  # over the axes that it splits by hand; the others it sees whole
        sizes = dict(params["mesh"].shape)
        axes = params.get("newly_manual_axes", params.get("manual_axes", sizes))
        return math.prod(sizes[axis] for axis in axes)
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    return 1


def _jaxprs(params: Mapping[str, Any]) -> Iterator[Any]:
    """The programs in an equation's parameters."""
    for value in params.values():
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, core.ClosedJaxpr | core.Jaxpr):
                yield one
