"""Draws images from a diffusers pipeline folder: `dmpo-jax sample`, in a clone.

python launch/sample.py --help
"""

from dmpo_jax.__main__ import main

if __name__ == "__main__":
    main("sample")
