"""Runs `dmpo-jax sample` from a clone: draws images from a diffusers pipeline folder.

python launch/sample.py --help
"""

from dmpo_jax.__main__ import main

if __name__ == "__main__":
    main("sample")
