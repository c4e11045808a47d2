"""How a UNet's forward is carried out. No choice here changes what it computes."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

from dmpo_jax.models import attention, placement

REMAT = ("none", "block", "transformer", "offload")
_INPUT = "block_input"


class Execution(NamedTuple):
    """Static: one compiled program each.

    attention: a name in `attention.KERNELS`.
    remat: what a backward computes again instead of keeping it from the forward.
        "none": nothing but gathered kernels. "block": each resnet and each spatial
        transformer, whole. "transformer": each resnet and each transformer block.
        "offload": as "transformer", and what is kept waits in the host's memory. What the
        splash kernel leaves for its backward is small and dear, and always kept.
    scan: whether equal transformer blocks are one loop, compiled once, or unrolled.
    """

    attention: str = "plain"
    remat: str = "none"
    scan: bool = False


DEFAULT = Execution()


def rematerialised(
    function: Callable[..., jax.Array], remat: str, *, in_scan: bool = False
) -> Callable[..., jax.Array]:
    """`function(x, ...)`, whose insides a backward computes again as `remat` says.

    in_scan: the loop keeps XLA from merging the two computations; barriers would only cost.
    """
    policies: Any = jax.checkpoint_policies
    if remat == "none":
        if not placement.shards_parameters():
            return function
        # A gathered kernel kept for the backward would be the whole model on every device.
        policy = policies.save_anything_except_these_names(placement.GATHERED)
        return jax.checkpoint(function, prevent_cse=not in_scan, policy=policy)
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
