"""Sets the leaves of an evaluation's protocol."""

import copy

from dmpo_jax.config.configs import Config, declared, flatten, set_leaf
from dmpo_jax.errors import UserError
from dmpo_jax.evaluation.protocol import PROTOCOLS


def with_protocol(config: Config) -> Config:
    """Returns the config with the leaves of `evaluate.protocol`.

    Raises:
        UserError: a leaf of the protocol has another value that is not its default.
    """
    name = config.evaluate.protocol
    found, have, known = copy.deepcopy(config), flatten(config), declared()
    for path, value in PROTOCOLS[name].leaves.items():
        if have[path] not in (value, known[path].default):
            raise UserError(
                f"evaluate.protocol {name!r} sets {path} to {value!r}, but it is {have[path]!r}: "
                "leave it unset, or take another protocol"
            )
        set_leaf(found, path, value)
    return found
