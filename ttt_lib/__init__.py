"""Test-time training of monocular geometry models: a thin library under a set of notebooks."""

__version__ = "0.1.0"
