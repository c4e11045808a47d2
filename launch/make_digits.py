"""Makes the digits pipeline that the package ships: `dmpo-jax make_digits`, in a clone.

python launch/make_digits.py --help
"""

from dmpo_jax.__main__ import main

if __name__ == "__main__":
    main("make_digits")
