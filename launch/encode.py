"""Encodes raw preference pairs: VAE latents of the images, embeddings of each prompt once.

    python launch/encode.py --source=pickapic:PATH --model=FOLDER --out=DIR
    python launch/encode.py --source=pickapic:PATH --inspect=DIR

Training then reads DIR (`--config.data.encoded=DIR`) and loads neither VAE nor text encoder.
The same command goes on where a killed one stopped. On several machines, the same line on each,
--out being a folder that all of them see (README, "On a cluster"). --inspect encodes nothing: it
writes a page that shows the pairs, DIR/index.html.
"""

from absl import app, flags

from dmpo_jax.config import command_line as command
from dmpo_jax.config.leaves import from_leaves
from dmpo_jax.data.raw import SOURCES
from dmpo_jax.jobs.encode import encode
from dmpo_jax.parallel import processes

KINDS = ", ".join(sorted(SOURCES))
SOURCE = flags.DEFINE_string("source", None, f"raw pairs, KIND:PATH; kinds: {KINDS}", required=True)
MODEL = flags.DEFINE_string("model", None, "diffusers pipeline folder or hub id")
OUT = flags.DEFINE_string("out", None, "folder for the encoded pairs")
INSPECT = flags.DEFINE_string("inspect", None, "folder for a page about the source, instead")
VAE = flags.DEFINE_string("vae", "", "another VAE's folder, such as SDXL's fp16 fix")
VARIANT = flags.DEFINE_string("variant", None, "'fp16' reads *.fp16.safetensors")
RESOLUTION = flags.DEFINE_integer("resolution", None, "side in pixels; default: the model's own")
CROP = flags.DEFINE_enum("crop", "center", ["center", "random"], "of what is not square")
MOMENTS = flags.DEFINE_enum(
    "moments", "sample", ["sample", "mean"], "store mean and variance, or half: the mean alone"
)
MOMENTS_DTYPE = flags.DEFINE_enum(
    "moments_dtype", "bfloat16", ["bfloat16", "float16", "float32"], "to store them in"
)
FLIP = flags.DEFINE_bool("flip", False, "store each pair mirrored too: twice the bytes")
TIES = flags.DEFINE_enum("ties", "keep", ["keep", "drop"], "pairs that nobody prefers")
VALIDATION = flags.DEFINE_float("validation_fraction", 0.01, "of the prompts, held out")
MAX_BAD = flags.DEFINE_float("max_bad", 0.01, "share of bad records to skip before giving up")
BATCH = flags.DEFINE_integer("batch_size", 32, "pairs at a time on each machine", lower_bound=1)
THREADS = flags.DEFINE_integer("num_threads", 16, "that decode images", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "to compute in")
flags.DEFINE_bool("distributed", False, "of no effect: clusters are found without")


@flags.multi_flags_validator(
    ["model", "out", "inspect"], "--model and --out are needed, or --inspect"
)
def _is_enough(values) -> bool:
    return bool(values["inspect"] or (values["model"] and values["out"]))


def main(argv) -> None:
    del argv
    command.log_to_console()
    leaves = {
        "data.source": SOURCE.value,
        "model.folder": MODEL.value or "",
        "model.vae": VAE.value,
        "model.variant": VARIANT.value or "",
        "model.compute_dtype": DTYPE.value,
        "data.resolution": RESOLUTION.value,
        "data.validation_fraction": VALIDATION.value,
        "data.encode_batch": BATCH.value,
        "data.moments": MOMENTS.value,
        "data.moments_dtype": MOMENTS_DTYPE.value,
        "data.flip": FLIP.value,
        "data.crop": CROP.value,
        "data.ties": TIES.value,
        "data.max_bad": MAX_BAD.value,
        "data.num_threads": THREADS.value,
    }
    config = from_leaves(leaves)
    if INSPECT.value:
        # Only here: encoding needs none of what the page is made with.
        from dmpo_jax.jobs.inspect import inspect

        inspect(config, out=INSPECT.value)
        return
    processes.join()
    encode(config, out=OUT.value or "")


if __name__ == "__main__":
    app.run(command.in_words(main))
