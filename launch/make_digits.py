"""Runs `dmpo-jax make_digits` from a clone: makes the digits pipeline that the package ships.

python launch/make_digits.py --help
"""

from dmpo_jax.__main__ import main

if __name__ == "__main__":
    main("make_digits")
