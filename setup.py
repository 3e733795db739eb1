"""Builds the compiled extensions, of which there are none yet; everything else about the package is in pyproject.toml."""

from setuptools import setup

setup(ext_modules=[])
