"""Makes a shipped digits pipeline, except for training its model."""

import logging

from etils import epath

from dmpo_jax.parallel import processes
from dmpo_jax.toy.make import write_digits

LOG = logging.getLogger(__name__)
TRAINS = {"sd": "digits_base", "sd3": "digits_flow_base"}  # configs that train the model


@processes.writes_out
def make_digits(
    *,
    out: epath.PathLike,
    family: str = "sd",
    vae: str = "",
    seed: int = 0,
    vae_steps: int = 1000,
) -> epath.Path:
    """Writes the pipeline folder and the pairs of real digits into `out`; returns `out`.

    Args:
        family: of the model: "sd", a UNet, or "sd3", a flow transformer.
        vae: folder of a pipeline whose VAE to take; "" trains one.
        seed: of every random draw.
        vae_steps: updates of the VAE, 64 images each; takes minutes on a CPU.
    """
    out = epath.Path(out)
    write_digits(out, family=family, vae=vae, seed=seed, vae_steps=vae_steps)
    LOG.info("the digits are in %s; next: dmpo-jax train --config=%s", out, TRAINS[family])
    return out
