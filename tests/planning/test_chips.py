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
        ("NVIDIA L40S", "L40S"),
    ],
)
def test_lookup(kind, name):
    assert chips.lookup(kind) == chips.CHIPS[name]


@pytest.mark.parametrize(
    "kind", ["cpu", "TPU v3", "NVIDIA H100 PCIe", "NVIDIA L40", "NVIDIA GeForce RTX 4090"]
)
def test_unknown(kind):
    """Rates of another card would make a wrong MFU; none is better."""
    assert chips.lookup(kind) is None
    assert chips.lookup(jax.devices("cpu")[0].device_kind) is None


def test_rates_are_plausible():
    """A matrix unit outruns its memory, which outruns the links between chips."""
    for chip in chips.CHIPS.values():
        assert 100 < chip.flops / chip.bandwidth < 1000, chip
        bus = 30 if chip.name == "L40S" else 15  # PCIe, not links of its own
        assert 2 < chip.bandwidth / chip.interconnect < bus, chip
        assert 16e9 <= chip.memory <= 200e9, chip


def test_rings_over_hosts_are_no_faster_than_their_network():
    h100, a100 = chips.CHIPS["H100"], chips.CHIPS["A100"]
    assert chips.over_hosts(h100, 1) == h100
    assert chips.over_hosts(h100, 2).interconnect == 8 * 400e9 / 8 < h100.interconnect
    assert chips.over_hosts(a100, 4).interconnect == 8 * 200e9 / 8 < a100.interconnect
    assert chips.over_hosts(chips.CHIPS["v5e"], 4) == chips.CHIPS["v5e"]
