"""Attention over tokens. Query-key products are accumulated in float32 in any compute dtype.

One function, three kernels. "plain" is XLA's own and the reference for the others. "cudnn"
(NVIDIA GPUs) and "splash" (TPUs, jax.experimental.pallas) never write the T x S scores to
memory. Each runs the shapes where it is faster, `takes_cudnn` and `takes_splash`; plain runs
the rest.

Letters: B batch, T query tokens, S key tokens, N heads, H a head's width.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from dmpo_jax.errors import UserError
from dmpo_jax.parallel import placement

KERNELS = ("plain", "cudnn", "splash")
Spec = Array | jax.ShapeDtypeStruct
# At 1,024 tokens the compiler schedules 2.3 ms, forward and backward, for XLA's products and
# under 1 ms for the kernel (SD1.5's 8 heads of 80, 8 images, v5p).
SPLASH_FROM = 1024  # tokens
LANES = 128  # of a TPU's vector registers and its matrix unit: blocks are multiples of it
# Token counts that LANES does not divide are padded to a multiple of this, whose divisors make
# large blocks: SD3's 4,096 + 333 tokens become 4,608, in blocks of 768.
PADDED_TO = 512
# Tokens per block of the splash kernels. Compiled for v5e and v5p, they fit 16 MB of scoped
# VMEM. The larger the key block, the fewer partial gradients of the query are written.
BLOCK, BLOCK_COMPUTE, BLOCK_BACKWARD = 1024, 512, 2048
# Of a head, in the plain kernel: more are made a part of the queries at a time. The VAE of a
# 1,024 px image has 16,384 tokens, whose 268 million scores would take 1.1 GB in float32.
MOST_SCORES = 2**24
# Name of the splash forward's output and log-sum-exp in `jax.checkpoint` policies:
# `save_only_these_names(RESIDUALS)` keeps them, so the backward does not rerun the forward.
RESIDUALS = "attention_residuals"


def best_kernel(platform: str) -> str:
    """Returns the fastest kernel for a platform: "tpu", "gpu" or "cpu"."""
    return {"gpu": "cudnn", "cuda": "cudnn", "tpu": "splash"}.get(platform, "plain")


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    mask: Bool[Array, "T S"] | Bool[Array, "B _ S"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    *,
    kernel: str = "plain",
) -> Float[Array, "B T N H"]:
    """Computes softmax(q k / sqrt(H)) v over N heads, without positions where mask is False.

    A mask of three axes is each row's own, `[B 1 S]` where it hides padding.

    cuDNN and splash run per device over the mesh set at trace time (`jax.set_mesh`), which also
    gives the platform to compile for: batch over "data" and "fsdp", heads over "tensor". If
    these do not divide, plain runs. Without a mesh, the default backend is used.

    Args:
        lengths: number of keys of each row that are attended to, at least 1; None: all. In
            self-attention the outputs of the tokens behind them are finite but arbitrary:
            kernels differ there.
        kernel: one of KERNELS. Inputs that it does not support run plain. Off the TPU, splash
            is interpreted, which is correct and very slow: for tests.

    Raises:
        ValueError: if the kernel is unknown, or cudnn is requested without a GPU.
    """
    if kernel not in KERNELS:
        raise UserError(f"the attention kernel must be one of {KERNELS}, but got {kernel!r}")
    mesh = jax.sharding.get_abstract_mesh()
    takes = {"cudnn": takes_cudnn, "splash": takes_splash}.get(kernel, lambda *_: False)
    if not takes(query, key, mask) or _split(mesh, *query.shape[::2]) is None:
        return _plain(query, key, value, mask, lengths)
    given = (query, key, value) if lengths is None else (query, key, value, lengths)
    if kernel == "cudnn":
        _check_gpu(placement.platform())
        return _each_device(_cudnn, mesh, *given)
    return _each_device(_splash, mesh, *given)


def takes_cudnn(query: Spec, key: Spec, mask: Spec | None = None) -> bool:
    """True if cuDNN's flash attention runs: half precision, no mask, H a multiple of 8.

    H up to 128, which cuDNN differentiates from Ampere on. Hopper goes to 256, but wider heads
    (SD1.5's 160) occur with few tokens. T and S may differ; odd ones are padded by a token. The
    77 tokens of a prompt are included: plain would write their scores in float32.
    """
    half = query.dtype in (jnp.bfloat16, jnp.float16) and query.dtype == key.dtype
    return mask is None and half and query.shape[-1] % 8 == 0 and query.shape[-1] <= 128


def takes_splash(query: Spec, key: Spec, mask: Spec | None = None) -> bool:
    """True if the splash kernel runs: bfloat16 self-attention over many tokens.

    At least SPLASH_FROM tokens, H at most LANES, no mask. The scores of a prompt's 77 tokens
    are small, and keys come in blocks of 128.
    """
    tokens, width = query.shape[1], query.shape[-1]
    fits = tokens == key.shape[1] and width <= LANES
    half = query.dtype == key.dtype == jnp.bfloat16
    return mask is None and half and fits and tokens >= SPLASH_FROM


def _plain(query, key, value, mask, lengths):
    # Heads before tokens: on CPU a batched product over adjacent axes is several times faster.
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    parts = _parts(query.shape[2], key.shape[2]) if mask is None else 1
    if parts == 1:
        return jnp.swapaxes(_weighted(query, key, value, mask, lengths), 1, 2)
    batch, heads, tokens, width = query.shape
    cut = jnp.moveaxis(query.reshape(batch, heads, parts, tokens // parts, width), 2, 0)
    out = jax.lax.map(lambda part: _weighted(part, key, value, None, lengths), cut)
    return jnp.swapaxes(jnp.moveaxis(out, 0, 2).reshape(batch, heads, tokens, -1), 1, 2)


def _parts(tokens: int, keys: int) -> int:
    """Returns the number of equal parts of the queries whose scores are made at a time."""
    parts = 1
    while tokens // parts * keys > MOST_SCORES and tokens % (2 * parts) == 0:
        parts *= 2
    return parts


def _weighted(query, key, value, mask, lengths):
    """Attention with heads before tokens, `[B N T H]`."""
    scores = jnp.einsum("BNTH,BNSH->BNTS", query, key, preferred_element_type=jnp.float32)
    scores = scores * query.shape[-1] ** -0.5
    lowest = jnp.finfo(scores.dtype).min
    if mask is not None:
        mask = mask[None, None] if mask.ndim == 2 else mask[:, None]
        scores = jnp.where(mask, scores, lowest)
    if lengths is not None:
        valid = jnp.arange(key.shape[2])[None] < lengths[:, None]
        scores = jnp.where(valid[:, None, None], scores, lowest)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("BNTS,BNSH->BNTH", weights, value)


def _cudnn(platform, query, key, value, lengths=None):
    del platform
    # JAX 0.10 to 0.12 differentiates even token counts only: its check, meant for biases, takes
    # the empty array that stands for none as one. A prompt has 77.
    tokens, keys = query.shape[1], key.shape[1]
    if keys % 2:
        lengths = jnp.full(key.shape[:1], keys, jnp.int32) if lengths is None else lengths
        key, value = _one_more(key), _one_more(value)
    if tokens % 2:
        query = _one_more(query)
    out = jax.nn.dot_product_attention(
        query, key, value, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return out[:, :tokens]


def _one_more(x: Array) -> Array:
    """Pads with a token of zeros."""
    return jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0)))


def _splash(platform, query, key, value, lengths=None):
    # The kernel does not scale.
    query = (query.astype(jnp.float32) * query.shape[-1] ** -0.5).astype(query.dtype)
    tokens, heads = query.shape[1:3]
    padding = -tokens % (PADDED_TO if tokens % LANES else LANES)
    kernel = _splash_kernel(heads, tokens + padding, interpret=platform != "tpu")
    heads_first = [jnp.swapaxes(x, 1, 2) for x in (query, key, value)]
    if padding:
        heads_first = [jnp.pad(x, ((0, 0), (0, 0), (0, padding), (0, 0))) for x in heads_first]
    elif lengths is None:
        return jnp.swapaxes(jax.vmap(kernel)(*heads_first), 1, 2)
    # Tokens attend to those of their own segment: 0 up to the length, 1 behind it.
    ends = jnp.full(query.shape[:1], tokens) if lengths is None else lengths
    behind = jnp.arange(tokens + padding)[None] >= ends[:, None]
    segments = splash.SegmentIds(*(behind.astype(jnp.int32),) * 2)
    out = jax.vmap(kernel)(*heads_first, segments)
    return jnp.swapaxes(out[:, :, :tokens], 1, 2)


def _splash_kernel(heads: int, tokens: int, *, interpret: bool) -> Callable[..., Any]:
    """Returns the kernel over [N T H], without a mask."""
    block, backward = _block(tokens, BLOCK), _block(tokens, BLOCK_BACKWARD)
    # Tokens go in the lanes: heads of 40 or 64 there would be padded to 128, in HBM too.
    minor = splash.QKVLayout.SEQ_MINOR
    blocks = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=_block(block, BLOCK_COMPUTE),
        block_q_dkv=block,
        block_kv_dkv=backward,
        block_kv_dkv_compute=_block(backward, BLOCK_COMPUTE),
        # One pass makes all three gradients, in five matrix products instead of seven.
        use_fused_bwd_kernel=True,
        q_layout=minor,
        k_layout=minor,
        v_layout=minor,
    )
    mask = splash.MultiHeadMask([splash.FullMask((tokens, tokens))] * heads)
    return splash.make_splash_mha_single_device(
        mask, block_sizes=blocks, residual_checkpoint_name=RESIDUALS, interpret=interpret
    )


def _block(tokens: int, most: int) -> int:
    """Returns the largest multiple of LANES that divides tokens and is at most `most`."""
    return max(n for n in range(LANES, most + 1, LANES) if tokens % n == 0)


def _each_device(kernel: Callable, mesh: AbstractMesh, *inputs: Array) -> Array:
    """Runs kernel(platform, *inputs) on each device's rows and heads."""
    local = functools.partial(kernel, placement.platform())
    spec = _split(mesh, *inputs[0].shape[::2])
    if spec is None or spec == PartitionSpec():
        return local(*inputs)
    # Lengths, the fourth input, have rows alone.
    specs = (*(spec,) * 3, PartitionSpec(spec[0]))[: len(inputs)]
    # check_vma: a Pallas call does not declare over which axes its results vary.
    split = jax.shard_map(local, in_specs=specs, out_specs=spec, check_vma=False)
    return split(*inputs)


def _check_gpu(platform: str) -> None:
    if platform not in ("gpu", "cuda"):
        raise UserError(
            f'the "cudnn" attention needs NVIDIA GPUs, but the devices are {platform!r}: '
            f"use {best_kernel(platform)!r}"
        )


def _split(mesh: AbstractMesh, batch: int, heads: int) -> PartitionSpec | None:
    """Returns the sharding of `[B T N H]`, or None if the sizes do not divide.

    Batch is sharded over "data" and "fsdp", heads over "tensor". Every axis of the mesh must
    shard something: over an unused axis the devices would repeat the work, add up their
    gradients and divide them again. Axes that a caller's shard_map made manual are not split.
    """
    free = {
        name: size
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
        if size > 1 and kind != AxisType.Manual
    }
    rows = tuple(name for name in ("data", "fsdp") if name in free)
    columns = tuple(name for name in ("tensor",) if name in free)
    if not free:
        return PartitionSpec()
    whole = len(free) == len(rows) + len(columns) and len(mesh.manual_axes) == 0
    shared = batch % math.prod(free[n] for n in rows) == 0
    shared &= heads % math.prod(free[n] for n in columns) == 0
    return PartitionSpec(rows or None, None, columns or None) if whole and shared else None
