"""Runs `dmpo-jax convert` from a clone: exports a training checkpoint for PyTorch diffusers.

python launch/convert.py --help
"""

from dmpo_jax.__main__ import main

if __name__ == "__main__":
    main("convert")
