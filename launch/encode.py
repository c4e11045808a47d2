"""Encodes raw preference pairs: `dmpo-jax encode`, in a clone.

python launch/encode.py --help
"""

from dmpo_jax.__main__ import main

if __name__ == "__main__":
    main("encode")
