"""Raw pairs as a TFDS dataset. Importing this package registers the builder `preference_pairs`."""

from dmpo_jax.data.tfds.preference_pairs import PairsConfig, PreferencePairs

__all__ = ["PairsConfig", "PreferencePairs"]
