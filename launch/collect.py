"""Makes preference pairs from a model's own images: two a prompt, labelled by a scorer.

    python launch/collect.py --model=FOLDER --prompts=FILE --scorer=NAME --out=DIR

Writes DIR/pairs.parquet in Pick-a-Pic's schema, for launch/encode.py --source=pickapic:DIR.
"""

from absl import app, flags

from dmpo_jax.config import command_line as command
from dmpo_jax.config.leaves import from_leaves
from dmpo_jax.jobs.collect import collect
from dmpo_jax.scoring import SCORERS

MODEL = flags.DEFINE_string("model", None, "diffusers pipeline folder or hub id", required=True)
PROMPTS = flags.DEFINE_string("prompts", None, "text file, a prompt a line", required=True)
SCORER = flags.DEFINE_enum("scorer", None, sorted(SCORERS), "what judges", required=True)
OUT = flags.DEFINE_string("out", None, "folder for pairs.parquet", required=True)
PAIRS = flags.DEFINE_integer("pairs", 1024, "pairs to make; prompts take turns", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "runs of different seeds share no image")
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "Bradley-Terry: how noisy the labels are")
TIE = flags.DEFINE_float("tie_margin", 0.0, "score differences below this are ties")
VARIANT = flags.DEFINE_string("variant", None, "'fp16' reads *.fp16.safetensors")
STEPS = flags.DEFINE_integer("steps", 50, "sampler steps an image", lower_bound=1)
GUIDANCE = flags.DEFINE_float("guidance_scale", 7.5, "classifier-free guidance; 1 is none")
BATCH = flags.DEFINE_integer("batch_size", 8, "images at a time, over all devices", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "to compute in")


def main(argv) -> None:
    del argv
    command.log_to_console()
    leaves = {
        "model.folder": MODEL.value,
        "model.variant": VARIANT.value or "",
        "model.compute_dtype": DTYPE.value,
        "seed": SEED.value,
        "sample.steps": STEPS.value,
        "sample.guidance_scale": GUIDANCE.value,
        "sample.batch_size": BATCH.value,
        "collect.scorer": SCORER.value,
        "collect.pairs": PAIRS.value,
        "collect.temperature": TEMPERATURE.value,
        "collect.tie_margin": TIE.value,
    }
    collect(from_leaves(leaves), prompts=PROMPTS.value, out=OUT.value)


if __name__ == "__main__":
    app.run(command.in_words(main))
