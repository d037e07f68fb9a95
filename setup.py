"""The build needs nothing but setuptools: metadata and the pure Python package never import torch."""

from setuptools import setup

setup()
