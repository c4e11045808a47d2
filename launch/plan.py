"""Compiles a config's training step for chips that need not be there: does it fit, how long.

    python launch/plan.py --config=configs/sdxl_dmpo.py --model=sdxl --topology=v5e:4x4,v5p:2x2x1
    python launch/plan.py --config=... --topology=v5p:4x4x4 --out=plan.json

TPU slices need their compiler alone (pip install libtpu); gpu:N and cpu:N are this machine's.
Full-size models compile for minutes. Plans are remembered: the same one again is instant.
"""

import sys

from absl import flags

from dmpo_jax.config import checks as config_checks
from dmpo_jax.config import command_line as command
from dmpo_jax.families import PUBLISHED
from dmpo_jax.jobs.plan import plan, prepare_process
from dmpo_jax.objectives import OBJECTIVES
from dmpo_jax.planning.report import printed

TOPOLOGY = flags.DEFINE_list("topology", None, "v5p:4x4x4,v5e:4x4,gpu:8,...", required=True)
MODEL = flags.DEFINE_enum("model", "", ["", *PUBLISHED], "shapes of this, not of model.folder")
OUT = flags.DEFINE_string("out", "", "file for the plans, as JSON")
CACHE = flags.DEFINE_string("cache", "", "folder of plans made before; default the user's cache")


def check(config) -> None:
    if MODEL.value and not config.model.folder:
        config.model.folder = MODEL.value
    config_checks.validate(config, objectives=OBJECTIVES)


def main(config) -> None:
    command.log_to_console()
    prepare_process(TOPOLOGY.value)
    options = {"published": MODEL.value, "out": OUT.value, "cache": CACHE.value}
    try:
        plans = plan(config, TOPOLOGY.value, **options)
    except ValueError as error:
        print(f"{sys.argv[0]}: {error}", file=sys.stderr)
        sys.exit(1)
    print(printed(plans))


if __name__ == "__main__":
    command.run(main, check=check)
