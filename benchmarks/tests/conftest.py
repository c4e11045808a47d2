"""Fixtures of the package's own tests."""

from tests.conftest import triple

__all__ = ["triple"]
