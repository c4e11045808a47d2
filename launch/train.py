"""Runs the jobs that a config names: for most, training; for the digits, everything.

    python launch/train.py --config=configs/digits_dmpo.py [--workdir=DIR]
    python launch/train.py --config=configs/sdxl_dmpo.py --config.model.folder=FOLDER ...
    python launch/train.py --config=configs/sdxl_dmpo.py:debug

Run again with the same --workdir, it goes on from where it stopped.
"""

import functools
import pathlib

from absl import flags

from dmpo_jax.config import checks as config_checks
from dmpo_jax.config import command_line as command
from dmpo_jax.jobs.run import run
from dmpo_jax.objectives import OBJECTIVES

WORKDIR = flags.DEFINE_string("workdir", "", "the run's folder; default runs/NAME-OF-CONFIG")


def main(config) -> None:
    command.log_to_console()
    name = pathlib.Path(flags.FLAGS.config).name.replace(".py", "").replace(":", "_")
    run(config, WORKDIR.value or f"runs/{name}")


if __name__ == "__main__":
    check = functools.partial(config_checks.validate, objectives=OBJECTIVES)
    command.run(main, check=check)
