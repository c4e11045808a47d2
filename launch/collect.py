"""Runs `dmpo-jax collect` from a clone: makes preference pairs from a model's own images.

python launch/collect.py --help
"""

from dmpo_jax.__main__ import main

if __name__ == "__main__":
    main("collect")
