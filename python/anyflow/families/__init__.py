"""The families: for each diffusers class, where time enters it. A spec is data."""

from .registry import families, find_spec, register_family
from .spec import CONSTANT, GIVEN, TIME, EmbedderSite, FamilySpec, NativeTime, Rows, Sinusoid

__all__ = [
    "CONSTANT",
    "GIVEN",
    "TIME",
    "EmbedderSite",
    "FamilySpec",
    "NativeTime",
    "Rows",
    "Sinusoid",
    "families",
    "find_spec",
    "register_family",
]
