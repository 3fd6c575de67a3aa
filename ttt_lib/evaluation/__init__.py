"""A room of the package."""
