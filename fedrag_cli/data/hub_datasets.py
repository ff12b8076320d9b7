"""Rows of data sets of the `datasets` library: in memory, saved to disk, or from the hub."""

from __future__ import annotations

import dataclasses
import difflib
import glob
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedrag_cli.data.readers import Table, reaching, table_of_mappings
from fedrag_cli.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset


MARKS_OF_SAVED = ("dataset_dict.json", "dataset_info.json", "state.json")


def read_dataset(path: str, name: str | None, split: str | None, revision: str | None, limit: int | None) -> Table:
    """Read the rows of a saved data set or of one from the hub.

    Args:
        path: Directory of `save_to_disk`, or hub id.
        name: Configuration of the hub data set.
        split: Split, needed where the data set has several.
        revision: Branch, tag or commit of the hub data set.
        limit: Read the first so many rows only.

    Returns:
        The rows, at least one.

    Raises:
        ConfigError: A setting of hub data sets is given for a directory.
        DataError: The data set cannot be loaded, or its split is not named.
    """
    folder = Path(path)
    with reaching(folder):
        is_saved, is_file = any((folder / mark).is_file() for mark in MARKS_OF_SAVED), folder.is_file()
    if is_saved:
        for key, value in (("name", name), ("revision", revision)):
            if value is not None:
                raise ConfigError(
                    f"`{key}` is for data sets of the hub, but {path} is a directory.", f"Remove `{key}`."
                )
        dataset = _one_split(path, _load_saved(path), split)
    elif is_file:
        raise DataError(
            f"{path} is a file, but a directory or a hub id is expected.", "For a file, use the type 'file'."
        )
    else:
        dataset = _one_split(path, load_from_hub(path, name, split, revision), None)
    stem = folder.name or path
    return table_of_dataset(dataset, stem, limit)


def table_of_dataset(dataset: Dataset, name: str, limit: int | None = None) -> Table:
    """Return the rows of a data set.

    Raises:
        DataError: It has no rows.
    """
    # Pictures and sounds are neither text nor metadata, and decoding them may need further libraries.
    media = [
        column
        for column, feature in dataset.features.items()
        if hasattr(feature, "decode") and type(feature).__name__ != "Json"
    ]
    rows = dataset.remove_columns(media).with_format(None)
    if limit is not None and limit < len(rows):
        rows = rows.select(range(limit))
    for column, feature in rows.features.items():
        by_text = _with_floats_as(feature, "string")
        if by_text != feature:
            # By way of the shortest text, 84.1 stays 84.1 and becomes no 84.0999984741211.
            rows = rows.cast_column(column, by_text).cast_column(column, _with_floats_as(feature, "float64"))
    if not len(rows):
        raise DataError(f"The data set '{name}' has no rows.", "Check how it was made, or name another split.")
    # Looking into every value takes long, so only where there are labels.
    labels = {column: feature for column, feature in rows.features.items() if "ClassLabel(" in repr(feature)}
    named = ({**row, **{column: _with_label_names(row[column], labels[column]) for column in labels}} for row in rows)
    return table_of_mappings(name, named if labels else rows)


def _with_floats_as(feature: Any, dtype: str) -> Any:
    """Return a feature in which another type stands in the place of floats of 16 and 32 bits, in lists too."""
    from datasets import LargeList, List, Value

    if isinstance(feature, dict):
        return {name: _with_floats_as(inner, dtype) for name, inner in feature.items()}
    if isinstance(feature, List | LargeList):
        return dataclasses.replace(feature, feature=_with_floats_as(feature.feature, dtype))
    return Value(dtype) if getattr(feature, "dtype", None) in ("float16", "float32") else feature


def _with_label_names(value: Any, feature: Any) -> Any:
    """Return a value with the names of labels for their numbers, in lists and objects too; -1 is a missing label."""
    if value is None:
        return None
    if isinstance(feature, dict):
        return {name: _with_label_names(value[name], inner) for name, inner in feature.items()}
    if hasattr(feature, "feature"):
        return [_with_label_names(item, feature.feature) for item in value]
    if hasattr(feature, "int2str"):
        return feature.int2str(value) if value >= 0 else None
    return value


def load_from_hub(
    path: str,
    name: str | None,
    split: str | None,
    revision: str | None,
    *,
    data_files: dict[str, str] | None = None,
    way_without_network: str = "save the data set with `save_to_disk` and name that",
) -> Any:
    """Load a data set from the hub.

    Args:
        path: Hub id.
        name: Configuration of the data set.
        split: Split; with None, all of them.
        revision: Branch, tag or commit.
        data_files: File pattern by split, where the repository's own description is not to be followed.
        way_without_network: What else to do where the hub cannot be reached, for the error's hint.

    Returns:
        A `datasets.Dataset`, or a `datasets.DatasetDict` where no split is named.

    Raises:
        DataError: It cannot be loaded.
    """
    import datasets

    try:
        return datasets.load_dataset(
            path, name, split=split, revision=revision, data_files=data_files, **_data_dir(path)
        )
    except Exception as error:
        # The library raises its own errors, those of the hub's client and those of the network.
        raise DataError(
            f"The data set '{path}' cannot be loaded: {_first_line(error)}", _hint(path, error, way_without_network)
        ) from error


def _data_dir(path: str) -> dict[str, str]:
    """Return, for a folder with characters in its path that `datasets` takes for a pattern's, the way to it escaped."""
    if not Path(path).is_dir():
        return {}
    folder = str(Path(path).resolve())
    escaped = glob.escape(folder)
    return {"data_dir": os.path.relpath(escaped, folder)} if escaped != folder else {}


def _load_saved(path: str) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(path)
    except Exception as error:
        raise DataError(
            f"The data set in {path} cannot be loaded: {_first_line(error)}", "Save it again with `save_to_disk`."
        ) from error


def _hint(path: str, error: Exception, way_without_network: str) -> str:
    if Path(path).is_dir():
        return "The directory was not written by `save_to_disk`, and has no data files that `datasets` can load."
    if isinstance(error, ConnectionError):
        return f"The hub cannot be reached: check the network, or {way_without_network}."
    if isinstance(error, FileNotFoundError):
        return "Check the spelling of `path`; for a private data set, log in with `hf auth login`."
    return "Check `path`, `name`, `split` and `revision`."


def _one_split(path: str, loaded: Any, split: str | None) -> Any:
    import datasets

    if not isinstance(loaded, datasets.DatasetDict):
        if split is not None and str(getattr(loaded, "split", None)) != split:
            raise DataError(f"The data set '{path}' is a single one without a split '{split}'.", "Remove the split.")
        return loaded
    if split is None and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split is None:
        raise DataError(f"The data set '{path}' has several splits: {_listed(loaded)}.", "Name one of them.")
    if split not in loaded:
        close = difflib.get_close_matches(split, list(loaded), n=1)
        raise DataError(
            f"The data set '{path}' has no split '{split}'; its splits are: {_listed(loaded)}.",
            f"Did you mean '{close[0]}'?" if close else "Name one of them.",
        )
    return loaded[split]


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(str(name) for name in names)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
