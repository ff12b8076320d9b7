"""The run directory: where everything that a run knows is kept."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from fedrag_cli.config.fields import is_there
from fedrag_cli.errors import ConfigError, DataError, FedRAGError
from fedrag_cli.registry import ENTRY_POINT_GROUP
from fedrag_cli.runs.files import lock, os_errors, remove_leftovers, write_json_atomically, write_text_atomically
from fedrag_cli.runs.metrics_log import MetricsLog, read_events

SCHEMA_VERSION = 1
LIBRARIES = ("torch", "transformers", "sentence-transformers", "peft", "datasets", "accelerate", "flwr", "fedrag-cli")


class RunDirectory:
    """One run's folder: `runs/<name>/<UTC time>-<short id>/`; `create` makes one, and `open` checks that it is one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.checkpoints = path / "checkpoints"
        # What was tuned, or its adapter, and the store that fits it.
        self.retriever = path / "retriever"
        self.generator = path / "generator"
        self.knowledge_store = path / "knowledge_store"
        self.plots = path / "plots"

    @classmethod
    def create(
        cls,
        output_dir: str,
        name: str,
        config_yaml: str,
        *,
        command: Sequence[str],
        seed: int,
        outside: Mapping[str, tuple[str, Any]] | None = None,
        **fields: Any,
    ) -> RunDirectory:
        """Make a new run directory with its config and manifest.

        Args:
            output_dir: Folder of all runs.
            name: Name of the run.
            config_yaml: The whole config, secrets as references.
            command: The command line.
            seed: The run's seed.
            outside: References and values of settings that come from outside of the config, by key path. Texts among
                the values are kept as hashes, as they may be secrets; a number or a switch is none.
            fields: What else the manifest says.
        """
        time = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        path = Path(output_dir) / name / f"{time}-{uuid.uuid4().hex[:6]}"
        with os_errors(path):
            path.mkdir(parents=True)
        run = cls(path)
        try:
            write_text_atomically(run.config_file, config_yaml)
            run.update_manifest(
                schema_version=SCHEMA_VERSION,
                run=name,
                status="running",
                command=list(command),
                seed=seed,
                created=datetime.now(UTC).isoformat(timespec="seconds"),
                versions=library_versions(),
                git=_git_state(),
                outside=_record(outside or {}, secrets.token_hex(16)),
                **fields,
            )
        except BaseException:
            run.remove()
            raise
        return run

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Open an existing run directory.

        Raises:
            ConfigError: The folder is no run directory.
            DataError: Its manifest is damaged.
        """
        run = cls(path)
        hint = "Give a folder that 'fedrag train' made, such as runs/NAME/TIME-ID."
        if not is_there(path):
            raise ConfigError(f"'{path}' does not exist.", hint)
        try:
            is_run = run.config_file.is_file() and (path / "manifest.json").is_file()
        except OSError as error:
            reason = f"The run in '{path}' cannot be read: {error.strerror}."
            raise DataError(reason, "Check who may read there.") from error
        if not is_run:
            raise ConfigError(f"'{path}' is no run directory (config.yaml or manifest.json is missing).", hint)
        run.manifest()
        return run

    def manifest(self) -> dict[str, Any]:
        """Return what the manifest says."""
        return self._read_json("manifest.json")

    def update_manifest(self, **fields: Any) -> None:
        """Change fields of the manifest."""
        known = self.manifest() if (self.path / "manifest.json").exists() else {}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        write_json_atomically(self.path / "manifest.json", {**known, **fields, "updated": now})

    def require_same_outside(self, outside: Mapping[str, tuple[str, Any]]) -> None:
        """Raise ConfigError where settings from outside of the config are others than those that the run started with.

        One whose reference is another by now was changed in the run's config on purpose.
        """
        known = self.manifest().get("outside")
        if known is None:
            return
        try:
            bytes.fromhex(known["salt"])
            references = {key: setting["reference"] for key, setting in known["settings"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._damaged("manifest.json", "its section 'outside' is damaged.") from error
        # Where a run is kept does not matter to what it computes, and it may have been moved.
        now = _record({key: found for key, found in outside.items() if key != "run.output_dir"}, known["salt"])
        changed = [
            _change(key, known["settings"][key], setting)
            for key, setting in now["settings"].items()
            if references.get(key) == setting["reference"] and known["settings"][key] != setting
        ]
        if changed:
            raise ConfigError(
                f"The environment gives other values than when this run started: {'; '.join(changed)}.",
                "Set the variables as they were, start a new run, or write what you mean into "
                f"'{self.config_file}' in the place of the reference.",
            )

    def require_finished(self) -> None:
        """Raise ConfigError where the run has not come to its end."""
        status = self.manifest().get("status")
        if status != "done":
            raise ConfigError(
                f"The run in '{self.path}' is not finished (status: {status}).",
                f"Go on with: fedrag resume {self.path}",
            )

    def role(self) -> str | None:
        """Return what the run is: evaluation, or server, client or simulation of a federation; None for a training."""
        manifest = self.manifest()
        if manifest.get("evaluation") is not None:
            return "evaluation"
        federation = manifest.get("federation")
        return federation.get("role") if isinstance(federation, dict) else None

    def summary(self) -> dict[str, Any]:
        """Return the summary of a finished run, with the paths that it has now: it may have been moved."""
        summary = self._read_json("summary.json")
        moved = {"run_dir": str(self.path)}
        if "predictions" in summary:
            moved["predictions"] = str(self.path / "evaluation" / Path(summary["predictions"]).name)
        return {**summary, **moved}

    def missing_models(self) -> list[str]:
        """Return the folders of models that the run has tuned, by its summary, and that are not there."""
        tuned = (self.read_json_if_there("summary.json") or {}).get("tuned") or {}
        if not isinstance(tuned, dict):
            raise self._damaged("summary.json", "its section 'tuned' is damaged.")
        folders = {"retriever": self.retriever, "generator": self.generator}
        return [f"{name}/" for name, folder in folders.items() if tuned.get(name) and not folder.is_dir()]

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file of the run, with its parent folders."""
        write_json_atomically(self.path / name, value)

    def read_json_if_there(self, name: str) -> dict[str, Any] | None:
        """Return a JSON file of the run, or None where it was not written yet."""
        return self._read_json(name) if (self.path / name).is_file() else None

    def log_size(self) -> int:
        """Return how many bytes `metrics.jsonl` has; 0 where it is not there yet."""
        log = self.path / "metrics.jsonl"
        return log.stat().st_size if log.is_file() else 0

    def open_log(self) -> MetricsLog:
        """Open `metrics.jsonl` for appending."""
        return MetricsLog(self.path / "metrics.jsonl")

    def events(self) -> list[dict[str, Any]]:
        """Return all events so far."""
        return read_events(self.path / "metrics.jsonl")

    def remove(self) -> None:
        """Remove the whole run directory, and the folders above it that are empty then."""
        shutil.rmtree(self.path)
        for folder in (self.path.parent, self.path.parent.parent):
            if not any(folder.iterdir()):
                folder.rmdir()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Clean up after a kill, and keep other processes out; raise FedRAGError where one works in the directory."""
        with os_errors(self.path), (self.path / ".lock").open("wb") as file:
            try:
                lock(file)
            except BlockingIOError as error:
                raise FedRAGError(f"Another process is working in '{self.path}'.", "Wait for it or stop it.") from error
            remove_leftovers(self.path)
            yield

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            value = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self._damaged(name, str(error)) from error
        if not isinstance(value, dict):
            raise self._damaged(name, "it holds no JSON object")
        return value

    def _damaged(self, name: str, reason: str) -> DataError:
        hint = "Restore the file, or start a new run with 'fedrag train'."
        return DataError(f"'{self.path / name}' cannot be read: {reason}", hint)


def _record(outside: Mapping[str, tuple[str, Any]], salt: str) -> dict[str, Any]:
    """Return references and values as a manifest may hold them: numbers in clear, all else as hashes."""

    def shown(value: Any) -> dict[str, Any]:
        if value is None or isinstance(value, bool | int | float):
            return {"value": value}
        text = json.dumps(value, sort_keys=True)
        # A slow hash, because few secrets are as hard to guess as they should be.
        return {"hash": hashlib.scrypt(text.encode(), salt=bytes.fromhex(salt), n=2**14, r=8, p=1, dklen=16).hex()}

    settings = {key: {"reference": reference, **shown(value)} for key, (reference, value) in outside.items()}
    return {"salt": salt, "settings": settings}


def _change(key: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    values = f" was {old['value']}, is {new['value']}" if "value" in old and "value" in new else ""
    return f"{key} ({old['reference']}){values}"


def library_versions() -> dict[str, str]:
    """Return the versions of Python, of the libraries that a run depends on, and of the packages of plug-ins."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    for entry_point in metadata.entry_points(group=ENTRY_POINT_GROUP):
        if entry_point.dist is not None:
            versions[entry_point.dist.name] = entry_point.dist.version
    return versions


def _git_state() -> dict[str, Any] | None:
    """Return commit and cleanness of the current folder's repository, or None outside of one."""
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}

    def ask(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", *arguments], capture_output=True, text=True, timeout=10, env=environment, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    return {"commit": commit, "clean": ask("status", "--porcelain") == ""} if commit else None
