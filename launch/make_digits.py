"""Makes the digits pipeline that the package ships, less its UNet's training.

    python launch/make_digits.py --out=runs/digits
    python launch/train.py --config=configs/digits_base.py --workdir=runs/digits_base

The first trains the VAE on scikit-learn's digits and writes an untrained UNet; the second
trains the UNet. `runs/digits_base/export` is then what stands in `dmpo_jax/toy/pipeline`.
"""

from absl import app, flags

from dmpo_jax.config import command_line as command
from dmpo_jax.jobs.make_digits import make_digits

OUT = flags.DEFINE_string("out", None, "folder of the new pipeline", required=True)
SEED = flags.DEFINE_integer("seed", 0, "of every random draw")
VAE_STEPS = flags.DEFINE_integer("vae_steps", 1000, "updates of the VAE, 64 images each")


def main(argv) -> None:
    del argv
    command.log_to_console()
    make_digits(out=OUT.value, seed=SEED.value, vae_steps=VAE_STEPS.value)


if __name__ == "__main__":
    app.run(command.in_words(main))
