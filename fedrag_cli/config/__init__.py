"""The config: its schema, loading it from YAML, and the checks that come before any weight is loaded."""

from fedrag_cli.config.load import ConfigSource, load_config, load_config_with_source
from fedrag_cli.config.schema import (
    Config,
    DatasetConfig,
    EvaluationConfig,
    PromptConfig,
    RAGSystemConfig,
    RunConfig,
    TrainerConfig,
)

__all__ = [
    "Config",
    "ConfigSource",
    "DatasetConfig",
    "EvaluationConfig",
    "PromptConfig",
    "RAGSystemConfig",
    "RunConfig",
    "TrainerConfig",
    "load_config",
    "load_config_with_source",
]
