"""Encodes raw preference pairs: VAE latents of the images, embeddings of each prompt once.

    python launch/encode.py --source=pickapic:PATH --model=FOLDER --out=DIR

Training then reads DIR (`--config.data.encoded=DIR`) and loads neither VAE nor text encoder.
"""

from absl import app, flags

from dmpo_jax import flags as command
from dmpo_jax.jobs.encode import encode

SOURCE = flags.DEFINE_string("source", None, "raw pairs, KIND:PATH; kinds: pickapic", required=True)
MODEL = flags.DEFINE_string("model", None, "diffusers pipeline folder or hub id", required=True)
OUT = flags.DEFINE_string("out", None, "folder for the encoded pairs", required=True)
VAE = flags.DEFINE_string("vae", "", "another VAE's folder, such as SDXL's fp16 fix")
VARIANT = flags.DEFINE_string("variant", None, "'fp16' reads *.fp16.safetensors")
RESOLUTION = flags.DEFINE_integer("resolution", None, "side in pixels; default: the model's own")
VALIDATION = flags.DEFINE_float("validation_fraction", 0.01, "of the pairs, held out")
BATCH = flags.DEFINE_integer("batch_size", 32, "pairs at a time, over all devices", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "to compute in")


def main(argv) -> None:
    del argv
    command.log_to_console()
    encode(
        source=SOURCE.value,
        model=MODEL.value,
        out=OUT.value,
        vae=VAE.value,
        variant=VARIANT.value,
        resolution=RESOLUTION.value,
        validation_fraction=VALIDATION.value,
        batch_size=BATCH.value,
        dtype=DTYPE.value,
    )


if __name__ == "__main__":
    app.run(main)
