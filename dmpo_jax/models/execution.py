"""Execution choices of a forward: kernel, rematerialisation, scan. Results do not change."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dmpo_jax.models import attention, parameters

REMAT = ("none", "block", "transformer", "offload")
_INPUT = "block_input"


class Execution(NamedTuple):
    """Execution choices; static, so each value compiles its own program.

    attention: a name in `attention.KERNELS`.
    remat: what a backward computes again instead of keeping it from the forward.
        "none": nothing; gathered kernels are kept too, which with "fsdp" is the whole model
        in the compute dtype on every device. The others gather again. "block": each resnet
        and each spatial transformer, whole. "transformer": each resnet and each transformer
        block. "offload": as "transformer", and what is kept waits in the host's memory.
        What the splash kernel leaves for its backward is small and dear, and always kept.
    scan: whether equal transformer blocks are one loop, compiled once, or unrolled.
    """

    attention: str = "plain"
    remat: str = "none"
    scan: bool = False


DEFAULT = Execution()


def rematerialised(
    function: Callable[..., jax.Array], remat: str, *, in_scan: bool = False
) -> Callable[..., jax.Array]:
    """Wraps `function(x, ...)` so that its backward recomputes what `remat` names.

    in_scan: the loop keeps XLA from merging the two computations; barriers would only cost.
    """
    policies: Any = jax.checkpoint_policies
    if remat == "none":
        return function
    if remat != "offload":
        policy = policies.save_only_these_names(attention.RESIDUALS)
        return jax.checkpoint(function, prevent_cse=not in_scan, policy=policy)
    policy = policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[attention.RESIDUALS],
        names_which_can_be_offloaded=[_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    )

    def from_named(x, *rest):
        return function(checkpoint_name(x, _INPUT), *rest)

    return jax.checkpoint(from_named, prevent_cse=not in_scan, policy=policy)


def apply_blocks(
    blocks: Sequence[Any],
    x: Float[Array, "N T D"],
    context: Float[Array, "N S E"],
    execution: Execution,
) -> Float[Array, "N T D"]:
    """Applies equal transformer blocks in order; with `scan`, as one compiled loop.

    A loop's parameters are stacked here, not in the state: that costs a copy of the blocks'
    kernels in the compute dtype, and leaves every other part (files, adapters, checkpoints)
    with one array a PyTorch tensor. Blocks that differ, as where one alone has adapters, are
    not looped over.
    """
    inner = "none" if execution.remat == "block" else execution.remat
    structures, parts = zip(*(parameters.split(block) for block in blocks), strict=True)
    alike = all(part.keys() == parts[0].keys() for part in parts)
    if not (execution.scan and alike and len(blocks) > 1):
        for block in blocks:
            one = functools.partial(block, kernel=execution.attention)
            x = rematerialised(one, inner)(x, context)
        return x

    def stack(path: str) -> Array:
        held = parameters.frozen_dtype(path, x.dtype)
        return jnp.stack([part[path].astype(held) for part in parts])

    def body(x, params):
        one = functools.partial(parameters.merge(structures[0], params), kernel=execution.attention)
        return rematerialised(one, inner, in_scan=True)(x, context), None

    return jax.lax.scan(body, x, {path: stack(path) for path in parts[0]})[0]
