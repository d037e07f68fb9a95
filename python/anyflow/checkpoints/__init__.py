"""What a student has trained: saved, loaded, averaged, exported and renamed. safetensors only."""

from .conversion import convert
from .export import export_lora, export_pipeline
from .files import on_disk, read, write_atomically, write_tensors
from .namings import NAMINGS, Naming
from .student import EMA_FILE, STUDENT_FILE, load_student, save_student, student_state

__all__ = [
    "EMA_FILE",
    "NAMINGS",
    "STUDENT_FILE",
    "Naming",
    "convert",
    "export_lora",
    "export_pipeline",
    "load_student",
    "on_disk",
    "read",
    "save_student",
    "student_state",
    "write_atomically",
    "write_tensors",
]
