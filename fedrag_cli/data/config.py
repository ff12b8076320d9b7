"""Config dataclasses of the data sources, and their registration."""

from __future__ import annotations

from typing import ClassVar, Literal

from fedrag_cli.config.fields import (
    FileStr,
    FolderStr,
    ModelStr,
    NonEmptyStr,
    NonNegativeInt,
    PathStr,
    PositiveInt,
    config_class,
)
from fedrag_cli.registry import Registry


@config_class
class ExampleColumns:
    """Which column holds what; a dot reaches into nested values (`answers.text`)."""

    query: NonEmptyStr = "query"
    """The question."""
    response: NonEmptyStr = "response"
    """The accepted answer, or a list of accepted answers; may be absent where nothing that is trained or measured needs
    it."""
    relevant_ids: str = "relevant_ids"
    """Ids of the passages (or documents) that answer the question; may be absent from the data."""
    choices: str = "choices"
    """For multiple choice: the list of answers to choose from; may be absent from the data."""


@config_class
class PassageColumns:
    """Which column holds what; all other columns become metadata."""

    id: NonEmptyStr = "id"
    """Unique id; rows are numbered where the column is absent."""
    text: NonEmptyStr = "text"
    """The passage."""


@config_class
class SplitConfig:
    """Splitting of long documents into passages, at sentence boundaries."""

    size: PositiveInt = 120
    """Most words of a passage; a sentence that is longer by itself is cut between words. Of scripts without blanks
    between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan) each character counts as a word."""
    overlap: NonNegativeInt = 20
    """Words of whole sentences that a passage repeats from the one before it, at most."""


@config_class
class FileExamplesConfig:
    """Examples from one JSONL, JSON, CSV, TSV or Parquet file."""

    # The builder takes `needs_responses`.
    may_lack_responses: ClassVar[bool] = True

    type: Literal["file"] = "file"
    """Names this source."""
    path: FileStr
    """The file."""
    format: Literal["auto", "jsonl", "json", "csv", "tsv", "parquet"] = "auto"
    """Format of the file; auto goes by its ending."""
    columns: ExampleColumns = ExampleColumns()
    """Which column holds what."""
    list_separator: NonEmptyStr | None = None
    """In CSV and TSV: what separates several answers or ids in one cell; by default a cell holds one, or a list in
    brackets as JSON and Python write it (`["six", "6 am"]`)."""
    limit: PositiveInt | None = None
    """Read the first so many rows only."""


@config_class
class HuggingFaceExamplesConfig:
    """Examples from a directory saved by `datasets`, or from a hub id."""

    # The builder takes `needs_responses`.
    may_lack_responses: ClassVar[bool] = True

    type: Literal["huggingface"] = "huggingface"
    """Names this source."""
    path: ModelStr
    """Directory of `save_to_disk`, or hub id."""
    name: str | None = None
    """Configuration of the hub data set."""
    split: str | None = None
    """Split, needed where the data set has several."""
    revision: str | None = None
    """Branch, tag or commit of the hub data set."""
    columns: ExampleColumns = ExampleColumns()
    """Which column holds what."""
    limit: PositiveInt | None = None
    """Read the first so many rows only."""


@config_class
class SquadExamplesConfig:
    """Examples from a JSON file in SQuAD format."""

    type: Literal["squad"] = "squad"
    """Names this source."""
    path: FileStr
    """The file."""
    limit: PositiveInt | None = None
    """Read the first so many questions only."""


@config_class
class BeirExamplesConfig:
    """Queries and judgements of a BEIR folder; they have no answers, so they serve retrieval metrics only."""

    type: Literal["beir"] = "beir"
    """Names this source."""
    path: FolderStr
    """The folder with queries.jsonl and qrels/."""
    split: NonEmptyStr = "test"
    """Name of the file in qrels/, without .tsv."""
    limit: PositiveInt | None = None
    """Read the first so many queries only."""


@config_class
class FileCorpusConfig:
    """Passages from one JSONL, JSON, CSV, TSV or Parquet file."""

    type: Literal["file"] = "file"
    """Names this source."""
    path: FileStr
    """The file."""
    format: Literal["auto", "jsonl", "json", "csv", "tsv", "parquet"] = "auto"
    """Format of the file; auto goes by its ending."""
    columns: PassageColumns = PassageColumns()
    """Which column holds what."""
    split: SplitConfig | None = None
    """Splitting of long texts; none by default."""
    limit: PositiveInt | None = None
    """Read the first so many rows only."""


@config_class
class HuggingFaceCorpusConfig:
    """Passages from a directory saved by `datasets`, or from a hub id."""

    type: Literal["huggingface"] = "huggingface"
    """Names this source."""
    path: ModelStr
    """Directory of `save_to_disk`, or hub id."""
    name: str | None = None
    """Configuration of the hub data set."""
    data_split: str | None = None
    """Split of the data set, needed where it has several."""
    revision: str | None = None
    """Branch, tag or commit of the hub data set."""
    columns: PassageColumns = PassageColumns()
    """Which column holds what."""
    split: SplitConfig | None = None
    """Splitting of long texts; none by default."""
    limit: PositiveInt | None = None
    """Read the first so many rows only."""


@config_class
class SquadCorpusConfig:
    """The paragraphs of a JSON file in SQuAD format."""

    type: Literal["squad"] = "squad"
    """Names this source."""
    path: FileStr
    """The file."""
    split: SplitConfig | None = None
    """Splitting of long paragraphs; none by default."""
    limit: PositiveInt | None = None
    """Read the first so many paragraphs only."""


@config_class
class BeirCorpusConfig:
    """The corpus of a BEIR folder; title and text are joined."""

    type: Literal["beir"] = "beir"
    """Names this source."""
    path: FolderStr
    """The folder with corpus.jsonl."""
    split: SplitConfig | None = None
    """Splitting of long documents; none by default."""
    limit: PositiveInt | None = None
    """Read the first so many documents only."""


@config_class
class TextCorpusConfig:
    """A folder of text or Markdown files (or one such file), split into passages."""

    type: Literal["text"] = "text"
    """Names this source."""
    path: PathStr
    """The folder, read with its subfolders, or one file."""
    patterns: tuple[str, ...] = ("*.txt", "*.md", "*.markdown")
    """Which files to read, in upper or lower case; hidden files and folders are left out, linked ones are read."""
    split: SplitConfig = SplitConfig()
    """Splitting into passages."""


def register(registry: Registry) -> None:
    """Register the data sources."""
    loader = "fedrag_cli.data.examples:load_"
    registry.register(
        "examples", "file", FileExamplesConfig, loader + "file_examples", "JSONL, JSON, CSV, TSV or Parquet file"
    )
    registry.register(
        "examples",
        "huggingface",
        HuggingFaceExamplesConfig,
        loader + "huggingface_examples",
        "datasets directory or hub id",
    )
    registry.register("examples", "squad", SquadExamplesConfig, loader + "squad_examples", "JSON file in SQuAD format")
    registry.register(
        "examples", "beir", BeirExamplesConfig, loader + "beir_examples", "BEIR folder (queries and judgements)"
    )
    loader = "fedrag_cli.data.corpora:load_"
    registry.register(
        "corpus", "file", FileCorpusConfig, loader + "file_corpus", "JSONL, JSON, CSV, TSV or Parquet file"
    )
    registry.register(
        "corpus", "huggingface", HuggingFaceCorpusConfig, loader + "huggingface_corpus", "datasets directory or hub id"
    )
    registry.register(
        "corpus", "squad", SquadCorpusConfig, loader + "squad_corpus", "paragraphs of a JSON file in SQuAD format"
    )
    registry.register("corpus", "beir", BeirCorpusConfig, loader + "beir_corpus", "BEIR folder (corpus.jsonl)")
    registry.register("corpus", "text", TextCorpusConfig, loader + "text_corpus", "folder of text or Markdown files")
