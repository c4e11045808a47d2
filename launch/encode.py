"""Runs `dmpo-jax encode` from a clone: encodes raw preference pairs.

python launch/encode.py --help
"""

from dmpo_jax.__main__ import main

if __name__ == "__main__":
    main("encode")
