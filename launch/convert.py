"""Turns a training checkpoint into a folder that PyTorch diffusers opens.

python launch/convert.py --checkpoint=WORKDIR [--step=N] --out=DIR
"""

from absl import app, flags

from dmpo_jax import flags as command
from dmpo_jax.jobs.convert import convert

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "a run's --workdir", required=True)
STEP = flags.DEFINE_integer("step", None, "which checkpoint; default the newest")
OUT = flags.DEFINE_string("out", None, "folder for the pipeline", required=True)


def main(argv) -> None:
    del argv
    command.log_to_console()
    convert(workdir=CHECKPOINT.value, out=OUT.value, at=STEP.value)


if __name__ == "__main__":
    app.run(main)
