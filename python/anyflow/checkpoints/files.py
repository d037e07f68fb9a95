"""Files that are written whole or not at all, and read strictly."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..distributed import whole

Content = tuple[Mapping[str, Tensor], Mapping[str, str]]  # tensors, metadata


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. FileNotFoundError, or ValueError for a truncated or foreign file."""
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except Exception as error:  # of the library, of the operating system, or of a header that is not what it should be
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def on_disk(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as a file can hold them: whole, on the CPU, contiguous copies. With FSDP2 a collective."""
    return {name: whole(tensor).to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def write_atomically(path: Path, content: bytes) -> Path:
    """Write under a temporary name beside it, flush to disk, rename: a crash leaves the old file or the new one."""
    _write({path: lambda temporary: _append(temporary, content)})
    return path


def write_tensors(files: Mapping[Path, Content]) -> None:
    """Write safetensors files, each as ``write_atomically`` does. No file is renamed before all are on disk."""
    _write({path: _saver(*content) for path, content in files.items()})


def _saver(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Callable[[Path], None]:
    return lambda temporary: save_file(dict(tensors), temporary, dict(metadata))


def _append(path: Path, content: bytes) -> None:
    with path.open("ab") as file:
        file.write(content)


def _write(files: Mapping[Path, Callable[[Path], None]]) -> None:
    temporary: dict[Path, Path] = {}
    try:
        for path, write in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary[path] = _temporary_name(path)
            temporary[path].open("xb").close()
            mode = temporary[path].stat().st_mode
            write(temporary[path])
            temporary[path].chmod(mode)  # the umask's; safetensors makes files that their owner alone can read
            _flush(temporary[path])
        for path, written in temporary.items():
            os.replace(written, path)
    except BaseException:
        for written in temporary.values():
            written.unlink(missing_ok=True)
        raise
    for folder in {path.parent for path in files}:
        _flush(folder)


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory that is renamed to ``path`` at the end of the block, or removed after an exception.

    Raises FileExistsError when there is something at ``path``: two directories cannot be exchanged in one step.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} is there already and is not empty")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    temporary.mkdir()
    try:
        yield temporary
        for written in sorted(temporary.rglob("*")):
            _flush(written)
        _flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _flush(path.parent)
