"""`tfds build preference_pairs --imports=dmpo_jax.data.tfds`, where TensorFlow is not installed.

The `tfds` command imports TensorFlow for its other sub-commands; `build` itself does without.
"""

import sys

from absl import app
from tensorflow_datasets.scripts.cli import build, cli_utils

from dmpo_jax.data.tfds import PreferencePairs
from dmpo_jax.errors import STOPPED_ANEW, in_words


def main(args: build.Args) -> None:
    with in_words(STOPPED_ANEW):
        args.execute()


if __name__ == "__main__":
    parse = cli_utils.make_flags_parser(build.Args, description=__doc__ or "")
    named = [sys.argv[0], PreferencePairs.name, "--imports=dmpo_jax.data.tfds", *sys.argv[1:]]
    app.run(main, argv=named, flags_parser=parse)
