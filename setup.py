"""Everything is declared in pyproject.toml; native libraries will be built from here."""

from setuptools import setup

setup()
