"""Attention over tokens: queries and keys meet in float32, whatever the compute dtype.

One function, several kernels. "plain" is XLA's own and the reference for the others; "cudnn"
(GPU) and "splash" (TPU, Pallas) never write the T x S scores to memory. Each serves the shapes
that it pays for and leaves the rest to plain: `takes_cudnn`, `takes_splash`.

Letters: B batch, T query tokens, S key tokens, N heads, H a head's width.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from jaxtyping import Array, Bool, Float

KERNELS = ("plain", "cudnn", "splash")
# Fewer tokens' scores are small enough for XLA to keep near the matrix unit.
SPLASH_FROM = 2048
# What the splash kernel's forward leaves for its backward, for a policy of `jax.checkpoint`:
# `save_only_these_names(RESIDUALS)` spares the forward kernel's second run.
RESIDUALS = "attention_residuals"
LANES = 128  # the splash kernel's blocks are multiples of a TPU vector register's width


def best_kernel(platform: str) -> str:
    """The kernel for a mesh's devices: their `platform`, such as "tpu", "gpu" or "cpu"."""
    return {"gpu": "cudnn", "cuda": "cudnn", "tpu": "splash"}.get(platform, "plain")


def attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    mask: Bool[Array, "T S"] | None = None,
    *,
    kernel: str = "plain",
) -> Float[Array, "B T N H"]:
    """softmax(q k / sqrt(H)) v over N heads; where mask is False nothing is seen.

    kernel: one of KERNELS; what it does not take runs plain. Outside a TPU, splash is
        interpreted: right and very slow, for tests. It asks the mesh set at trace time
        (`jax.set_mesh`) where it runs, and splits batch and heads over it.

    Raises:
        ValueError: if there is no such kernel.
    """
    if kernel not in KERNELS:
        raise ValueError(f"the attention kernel must be one of {KERNELS}, but got {kernel!r}")
    if kernel == "cudnn" and takes_cudnn(query, key, mask):
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    if kernel == "splash" and takes_splash(query, key, mask):
        return _splash(query, key, value)
    return _plain(query, key, value, mask)


def takes_cudnn(query: Array, key: Array, mask: Array | None) -> bool:
    """Whether cuDNN's flash attention runs on this."""
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    return mask is None and half and query.shape[-1] % 8 == 0 and query.shape[-1] <= 128


def takes_splash(query: Array, key: Array, mask: Array | None) -> bool:
    """Whether the splash kernel runs on this."""
    tokens = query.shape[1]
    square = tokens == key.shape[1]
    return mask is None and square and tokens >= SPLASH_FROM and tokens % LANES == 0


def _plain(query, key, value, mask):
    # Heads before tokens: on CPU a batched product over adjacent axes is several times quicker.
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    scores = jnp.einsum("BNTH,BNSH->BNTS", query, key, preferred_element_type=jnp.float32)
    scores = scores * query.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask[None, None], scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.swapaxes(jnp.einsum("BNTS,BNSH->BNTH", weights, value), 1, 2)


def _splash(query, key, value):
    mesh = jax.sharding.get_abstract_mesh()
    interpret = _platform(mesh) != "tpu"
    # The kernel does not scale.
    scale = query.shape[-1] ** -0.5
    query = (query.astype(jnp.float32) * scale).astype(query.dtype)

    def local(*heads_first):
        _, heads, tokens, _ = heads_first[0].shape
        return jax.vmap(_splash_kernel(heads, tokens, interpret))(*heads_first)

    if not mesh.empty and not mesh.are_all_axes_manual:
        spec = _split(mesh, query.shape[0], query.shape[2])
        # check_vma: a Pallas call does not say over which axes its results vary.
        local = jax.shard_map(local, in_specs=(spec,) * 3, out_specs=spec, check_vma=False)
    out = local(*(jnp.swapaxes(x, 1, 2) for x in (query, key, value)))
    return jnp.swapaxes(out, 1, 2)


def _platform(mesh: AbstractMesh) -> str:
    """Where the program will run, which need not be where it is compiled."""
    device = None if mesh.empty else mesh.abstract_device
    return jax.default_backend() if device is None else device.platform


def _split(mesh: AbstractMesh, batch: int, heads: int) -> PartitionSpec:
    """Batch over "data" and "fsdp", heads over "tensor", where they divide."""

    def over(names: tuple[str, ...], size: int):
        types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
        held = tuple(n for n in names if types.get(n, AxisType.Manual) != AxisType.Manual)
        return held if held and size % math.prod(mesh.shape[n] for n in held) == 0 else None

    return PartitionSpec(over(("data", "fsdp"), batch), over(("tensor",), heads))


def _splash_kernel(heads: int, tokens: int, interpret: bool):
    """The kernel over [N T H], where every token sees every token."""
    q, kv = _block(tokens, 1024), _block(tokens, 1024)
    blocks = splash.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=_block(kv, 512),
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_kv_dkv_compute=_block(kv, 512),
        use_fused_bwd_kernel=True,
    )
    mask = splash.MultiHeadMask([splash.FullMask((tokens, tokens))] * heads)
    return splash.make_splash_mha_single_device(
        mask, block_sizes=blocks, residual_checkpoint_name=RESIDUALS, interpret=interpret
    )


def _block(tokens: int, most: int) -> int:
    """The largest multiple of LANES that divides tokens, and is at most `most`."""
    return max(n for n in range(LANES, most + 1, LANES) if tokens % n == 0)
