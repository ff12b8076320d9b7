"""The configs that fedrag ships, and copying one of them with its data."""

from __future__ import annotations

import shutil
from pathlib import Path

from fedrag_cli.config.problems import suggestion
from fedrag_cli.config.source import DEFAULT_CONFIG
from fedrag_cli.errors import ConfigError

SCHEMA_FILE = "fedrag.schema.json"
DATA_FOLDER = "quickstart"


def template_folder() -> Path:
    """Return the folder of the shipped configs: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "_templates"
    return installed if installed.is_dir() else package.parent / "configs"


def template_names() -> list[str]:
    """Return the names of the shipped configs."""
    return sorted(path.stem for path in template_folder().glob("*.yaml"))


def write_template(name: str, directory: Path) -> list[Path]:
    """Copy a shipped config as `fedrag.yaml`, with its schema and data, and return the files; none is overwritten."""
    if name not in template_names():
        raise ConfigError(f"There is no template '{name}'{suggestion(name, template_names())}.")
    folder = template_folder()
    sources = {folder / f"{name}.yaml": directory / DEFAULT_CONFIG, folder / SCHEMA_FILE: directory / SCHEMA_FILE}
    if f"{DATA_FOLDER}/" in (folder / f"{name}.yaml").read_text(encoding="utf-8"):
        sources |= {path: directory / DATA_FOLDER / path.name for path in sorted((folder / DATA_FOLDER).iterdir())}
    present = [str(target) for target in sources.values() if target.exists()]
    if present:
        raise ConfigError(
            f"There is something in the way: {', '.join(present)}.", "Choose another folder; nothing is overwritten."
        )
    try:
        for source, target in sources.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    except OSError as error:
        raise ConfigError(f"'{directory}' cannot be written: {error.strerror}.", "Choose another folder.") from error
    return list(sources.values())
