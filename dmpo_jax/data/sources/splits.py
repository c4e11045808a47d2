"""Train/validation split: the side of a pair is a function of its prompt alone.

Train and validation share no prompt, in any source, with any number of workers. A pair keeps
its side when others are added.
"""

import hashlib

from dmpo_jax.errors import UserError


def is_held_out(prompt: str, fraction: float | int) -> bool:
    """True if all pairs of a prompt are for validation.

    Args:
        prompt: the exact text: prompts that differ in a space may be on different sides.
        fraction: approximate share of the prompts, in [0, 1]. The share of the pairs is the same
            only if prompts have equally many. A larger fraction holds out all prompts that a
            smaller one does.

    Raises:
        ValueError: the fraction lies outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise UserError(f"the held-out fraction must lie in [0, 1], but got {fraction}")
    return hash_share(prompt) < fraction


def hash_share(prompt: str) -> float:
    """Returns a prompt's hash, in [0, 1).

    CRC-32 is unsuitable: it is 0 for the empty prompt, which would always be held out.
    """
    digest = hashlib.sha256(prompt.encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48
