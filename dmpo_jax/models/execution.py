"""Execution choices of a forward: kernel, rematerialisation, scan. Results do not change."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from dmpo_jax.models import attention, parameters
from dmpo_jax.models.quantised import Holding

REMAT = ("none", "block", "transformer", "offload")
AUTO = "auto"  # of Execution.attention: the best kernel for the devices
_INPUT = "block_input"
Carry = TypeVar("Carry")


class Execution(NamedTuple):
    """Execution choices; static, so each value compiles its own program.

    attention: a name in `attention.KERNELS`, or AUTO until the devices are known (`on`).
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

    def on(self, mesh: Mesh) -> "Execution":
        """Returns it for a mesh's devices: AUTO resolved, and no `scan` on GPUs.

        There a loop stacks kernels and gradients in memory every step, a tenth of SDXL's memory
        traffic, and compiles no faster.
        """
        platform = mesh.devices.flat[0].platform
        chosen = attention.best_kernel(platform) if self.attention == AUTO else self.attention
        return self._replace(attention=chosen, scan=self.scan and platform != "gpu")


DEFAULT = Execution()
BEST = Execution(attention=AUTO)


def rematerialised(
    function: Callable[..., Any], remat: str, *, in_scan: bool = False
) -> Callable[..., Any]:
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
        return function(jax.tree.map(lambda leaf: checkpoint_name(leaf, _INPUT), x), *rest)

    return jax.checkpoint(from_named, prevent_cse=not in_scan, policy=policy)


def apply_blocks(blocks: Sequence[Any], x: Carry, told: Any, execution: Execution) -> Carry:
    """Applies transformer blocks in order; with `scan`, runs of equal ones as compiled loops.

    A loop's parameters are stacked here, not in the state. This copies the blocks' kernels in
    the compute dtype, or as they are quantised, and keeps one array per PyTorch tensor everywhere
    else (files, adapters, checkpoints). Blocks have equal names of parameters or are different:
    one with adapters among others without, for instance.

    Args:
        blocks: each takes (x, told, kernel=) and returns the next x.
        x: an array or a tuple of arrays, all in the compute dtype.
        told: read by every block, the same for all.
    """
    split = [parameters.split(block) for block in blocks]
    for _, run in itertools.groupby(split, lambda block: jax.tree.structure(block[1])):
        x = _apply_run(list(run), x, told, execution)
    return x


def _apply_run(run: list[tuple[Any, dict[str, Any]]], x: Carry, told: Any, how: Execution) -> Carry:
    """Applies equal blocks, given as (structure, parameters)."""
    inner = "none" if how.remat == "block" else how.remat
    if not (how.scan and len(run) > 1):
        for structure, params in run:
            one = functools.partial(parameters.merge(structure, params), kernel=how.attention)
            x = rematerialised(one, inner)(x, told)
        return x
    structure = run[0][0]
    dtype = jax.tree.leaves(x)[0].dtype

    def stack(path: str) -> Any:
        held = Holding(dtype)
        each = [held(path, params[path]) for _, params in run]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)

    def body(x, params):
        one = functools.partial(parameters.merge(structure, params), kernel=how.attention)
        return rematerialised(one, inner, in_scan=True)(x, told), None

    return jax.lax.scan(body, x, {path: stack(path) for path in run[0][1]})[0]


def by_block(execution: Execution) -> Execution:
    """Returns the execution of a model that is transformer blocks alone: "block" is one of them."""
    return execution._replace(remat="transformer") if execution.remat == "block" else execution
