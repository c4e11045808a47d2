"""The chip that a device's name stands for."""

import jax
import pytest

from dmpo_jax.planning import chips


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
    ],
)
def test_lookup(kind, name):
    assert chips.lookup(kind) == chips.CHIPS[name]


@pytest.mark.parametrize("kind", ["cpu", "TPU v3", "NVIDIA H100 PCIe", "NVIDIA GeForce RTX 4090"])
def test_unknown(kind):
    """Rates of another card would make a wrong MFU; none is better."""
    assert chips.lookup(kind) is None
    assert chips.lookup(jax.devices("cpu")[0].device_kind) is None


def test_rates_are_plausible():
    """A matrix unit outruns its memory, which outruns the links between chips."""
    for chip in chips.CHIPS.values():
        assert 100 < chip.flops / chip.bandwidth < 1000, chip
        assert 2 < chip.bandwidth / chip.interconnect < 15, chip
        assert 16e9 <= chip.memory <= 200e9, chip
