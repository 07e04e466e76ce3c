"""Slow, independent truths that the tests hold the package against."""
