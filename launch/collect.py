"""Makes preference pairs from a model's own images: `dmpo-jax collect`, in a clone.

python launch/collect.py --help
"""

from dmpo_jax.__main__ import main

if __name__ == "__main__":
    main("collect")
