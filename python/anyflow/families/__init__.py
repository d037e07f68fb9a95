"""The families: for each diffusers class, where time enters it. A spec is data."""

from .registry import families, find_spec, register_family
from .spec import EmbedderSite, FamilySpec

__all__ = ["EmbedderSite", "FamilySpec", "families", "find_spec", "register_family"]
