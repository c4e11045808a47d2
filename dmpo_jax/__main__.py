"""Entry point of `dmpo-jax` and of launch/NAME.py.

Imports little, so that an unknown command is rejected before JAX is imported.
"""

import difflib
import sys

from dmpo_jax.errors import in_words

NAMES = (
    "train",
    "calibrate",
    "encode",
    "collect",
    "sample",
    "evaluate",
    "convert",
    "verify",
    "plan",
    "make_digits",
)


def main(name: str = "") -> None:
    """Runs a command with the rest of the command line, then ends the process.

    Args:
        name: the command; '' takes the first word of the command line.
    """
    called, *argv = sys.argv
    if not name:
        called = "dmpo-jax"
        if not argv or argv[0] not in NAMES:
            asked = not argv or argv[0] in ("--help", "-h", "help")
            usage = (
                f"usage: dmpo-jax COMMAND --FLAG=VALUE ...\ncommands: {', '.join(NAMES)}\n"
                "dmpo-jax COMMAND --help lists the command's flags and every option of a config."
            )
            if asked:
                print(usage)
            else:
                near = difflib.get_close_matches(argv[0], NAMES, 1, 0)[0]
                words = f"there is no command {argv[0]!r}; did you mean {near}?"
                print(f"dmpo-jax: {words}\n{usage}", file=sys.stderr)
            sys.exit(0 if asked and argv else 1)
        name, *argv = argv
        called = f"dmpo-jax {name}"
    with in_words():  # importing takes seconds
        from dmpo_jax import commands

        commands.main(name, [called, *argv])


if __name__ == "__main__":
    main()
