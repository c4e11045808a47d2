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
    remat: what the backward recomputes instead of keeping it from the forward.
        "none": nothing. Gathered kernels are kept too, which with "fsdp" is the complete model
        in the compute dtype on every device; the others gather again.
        "block": each resnet and each spatial transformer as one unit.
        "transformer": each resnet and each transformer block.
        "offload": as "transformer", with the kept inputs offloaded to host memory.
        The splash kernel's residuals are small and expensive, and always kept on the device.
    scan: run equal transformer blocks as one loop, compiled once, instead of unrolled.
    """

    attention: str = "plain"
    remat: str = "none"
    scan: bool = False


DEFAULT = Execution()


def rematerialised(
    function: Callable[..., jax.Array], remat: str, *, in_scan: bool = False
) -> Callable[..., jax.Array]:
    """Wraps `function(x, ...)` so that its backward recomputes what `remat` names.

    in_scan: the loop keeps XLA from merging the two computations, so barriers would only cost.
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

    A loop's parameters are stacked here, not in the state. This copies the blocks' kernels in
    the compute dtype, and keeps one array per PyTorch tensor everywhere else (files, adapters,
    checkpoints). Blocks that differ, for instance if only one has adapters, run unrolled.
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
