"""Shared by all tests: hypothesis without deadlines (no timed tests), one torch thread count."""

from hypothesis import settings

settings.register_profile("package", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("package")
