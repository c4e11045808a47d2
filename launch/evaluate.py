"""Compares two models: same prompts, same seeds, each judge's win rate with its interval.

    python launch/evaluate.py --a=BASE --b=TUNED --prompts=FILE --out=DIR

Writes DIR/result.json, DIR/report.html and DIR/samples/before_after.png.
"""

import pathlib
import sys

# `evaluate` is also a library's name, which this folder, first on the path, would hide.
HERE = pathlib.Path(__file__).parent.resolve()
sys.path[:] = [p for p in sys.path if pathlib.Path(p).resolve() != HERE]

from absl import app, flags  # noqa: E402

from dmpo_jax.config import command_line as command  # noqa: E402
from dmpo_jax.config.leaves import from_leaves  # noqa: E402
from dmpo_jax.jobs.evaluate import evaluate  # noqa: E402
from dmpo_jax.scoring import SCORERS  # noqa: E402

A = flags.DEFINE_string("a", None, "pipeline folder: the base", required=True)
B = flags.DEFINE_string("b", None, "pipeline folder: the tuned model", required=True)
PROMPTS = flags.DEFINE_string("prompts", None, "text file, a prompt a line", required=True)
OUT = flags.DEFINE_string("out", None, "folder for the result", required=True)
JUDGES = flags.DEFINE_list("judges", sorted(SCORERS), f"of {', '.join(sorted(SCORERS))}")
SEEDS = flags.DEFINE_integer("seeds", 256, "images of each model", lower_bound=2)
SEED = flags.DEFINE_integer("seed", 0, "another number, other images")
VARIANT = flags.DEFINE_string("variant", None, "of the base: 'fp16' reads *.fp16.safetensors")
STEPS = flags.DEFINE_integer("steps", 50, "sampler steps an image", lower_bound=1)
GUIDANCE = flags.DEFINE_float("guidance_scale", 7.5, "classifier-free guidance; 1 is none")
BATCH = flags.DEFINE_integer("batch_size", 8, "images at a time, over all devices", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "to compute in")


def main(argv) -> None:
    del argv
    command.log_to_console()
    leaves = {
        "model.variant": VARIANT.value or "",
        "model.compute_dtype": DTYPE.value,
        "seed": SEED.value,
        "sample.steps": STEPS.value,
        "sample.guidance_scale": GUIDANCE.value,
        "sample.batch_size": BATCH.value,
        "evaluate.judges": tuple(JUDGES.value),
        "evaluate.seeds": SEEDS.value,
    }
    config = from_leaves(leaves)
    evaluate(config, a=A.value, b=B.value, prompts=PROMPTS.value, out=OUT.value)


if __name__ == "__main__":
    app.run(command.in_words(main))
