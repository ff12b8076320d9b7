"""What a third party would write: a corpus, examples and an objective, from what fedrag documents alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fedrag_cli.config.fields import FileStr, NonEmptyStr, PositiveFloat, config_class
from fedrag_cli.config.problems import Finding, KeyPath
from fedrag_cli.registry import Registry
from fedrag_cli.trainers.config import LMSupervisedConfig

if TYPE_CHECKING:
    from fedrag_cli.config import Config
    from fedrag_cli.data.examples import Example
    from fedrag_cli.data.nodes import KnowledgeNode


@config_class
class LinesConfig:
    """A text file with a passage or a question a line."""

    encoding: ClassVar[str] = "utf-8"
    """No setting."""

    path: FileStr
    """The file."""
    separator: NonEmptyStr = " | "
    """What separates the parts of a line."""

    def check(self, config: Config, path: KeyPath) -> Iterator[Finding]:
        """Yield where the parts could not be told apart."""
        if "\n" in self.separator:
            yield (*path, "separator"), "must not have a line end"

    def lines(self) -> list[list[str]]:
        """Return the parts of each line."""
        return [line.split(self.separator) for line in Path(self.path).read_text(self.encoding).splitlines()]


@config_class
class LinesCorpusConfig(LinesConfig):
    """Passages: id, text."""

    type: Literal["lines"] = "lines"
    """Names this source."""


@config_class
class LinesExamplesConfig(LinesConfig):
    """Examples: question, answer, id of the relevant passage."""

    type: Literal["lines"] = "lines"
    """Names this source."""


@config_class
class MarginConfig(LMSupervisedConfig):
    """The passage that the language model likes best should score higher than the others, by a margin."""

    type: Literal["margin"] = "margin"
    """Names this trainer."""
    margin: PositiveFloat = 0.5
    """By how much."""


def load_corpus(config: LinesCorpusConfig) -> list[KnowledgeNode]:
    from fedrag_cli.data.nodes import KnowledgeNode

    return [KnowledgeNode(id, text) for id, text in config.lines()]


def load_examples(config: LinesExamplesConfig) -> list[Example]:
    from fedrag_cli.data.examples import Example

    return [
        Example(f"line-{number}", question, (answer,), (relevant,))
        for number, (question, answer, relevant) in enumerate(config.lines())
    ]


def build_margin_trainer(config: MarginConfig, *arguments: Any, **options: Any) -> Any:
    from plugin_objective import MarginTrainer

    return MarginTrainer.from_config(config, *arguments, **options)


def register(registry: Registry) -> None:
    module = "plugin_components"
    registry.register("corpus", "lines", LinesCorpusConfig, f"{module}:load_corpus", "a passage a line")
    registry.register("examples", "lines", LinesExamplesConfig, f"{module}:load_examples", "a question a line")
    registry.register("retriever_trainer", "margin", MarginConfig, f"{module}:build_margin_trainer", "a margin")
