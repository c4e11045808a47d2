"""Turns a training checkpoint into what PyTorch diffusers opens: `dmpo-jax convert`, in a clone.

python launch/convert.py --help
"""

from dmpo_jax.__main__ import main

if __name__ == "__main__":
    main("convert")
