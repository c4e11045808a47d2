"""Which side of a split a pair is on: a function of its prompt alone.

Train and validation then share no prompt, in any source, at any number of workers, and a
pair keeps its side when others are added.
"""

import hashlib

from dmpo_jax.errors import UserError


def is_held_out(prompt: str, fraction: float | int) -> bool:
    """Whether all pairs of a prompt are for validation.

    Args:
        prompt: the text, letter for letter: prompts that differ in a space may be parted.
        fraction: about which share of the prompts, in [0, 1]; of the pairs it is the same
            share only as far as prompts have equally many. What a smaller fraction holds
            out, a larger one does too.

    Raises:
        ValueError: if the fraction lies outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise UserError(f"the held-out fraction must lie in [0, 1], but got {fraction}")
    return hash_share(prompt) < fraction


def hash_share(prompt: str) -> float:
    """A prompt's hash, in [0, 1). Not CRC-32: that of the empty prompt is 0, always held out."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48
