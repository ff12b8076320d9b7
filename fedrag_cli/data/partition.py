"""Splitting examples over the sites of a simulated federation: by owner, at random, or skewed (Dirichlet)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedrag_cli.data.examples import Example
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import ConfigError, DataError

DRAWS = 1000


def split_by_owner(examples: Sequence[Example], column: str) -> dict[str, list[Example]]:
    """Give every example to the owner that its column names.

    Args:
        examples: The examples; further columns of their rows are in their metadata.
        column: The owner column, such as `site`.

    Returns:
        Examples by owner, owners sorted.

    Raises:
        DataError: An example has no such column.
    """
    found: dict[str, list[Example]] = {}
    for example in examples:
        found.setdefault(_owner(example.metadata, column, f"The example '{example.id}'"), []).append(example)
    return dict(sorted(found.items()))


def corpus_by_owner(nodes: Sequence[KnowledgeNode], column: str) -> dict[str, list[KnowledgeNode]] | None:
    """Give every passage to its owner; None where no passage has an owner, so that all sites share the corpus.

    Raises:
        DataError: Some passages have the column and others have not.
    """
    if not any(column in node.metadata for node in nodes):
        return None
    found: dict[str, list[KnowledgeNode]] = {}
    for node in nodes:
        found.setdefault(_owner(node.metadata, column, f"The passage '{node.id}'"), []).append(node)
    return found


def split_at_random(examples: Sequence[Example], sites: int, seed: int) -> list[list[Example]]:
    """Deal examples out evenly, in random order.

    Returns:
        One list a site; their lengths differ by one at most.
    """
    order = np.random.default_rng(seed).permutation(len(examples))
    return [[examples[position] for position in sorted(order[site::sites])] for site in range(sites)]


def split_by_dirichlet(
    examples: Sequence[Example], column: str, sites: int, alpha: float, seed: int
) -> list[list[Example]]:
    """Give each site its own mixture of a column's values (Hsu et al., arXiv 1909.06335).

    For every value a share for each site is drawn from a symmetric Dirichlet distribution, and the examples with that
    value are dealt out by it. Draws that leave a site without examples are thrown away.

    Args:
        examples: The examples.
        column: The column whose values are mixed.
        sites: Number of sites.
        alpha: Concentration; small values give sites of their own kind, large ones equal mixtures.
        seed: Seed of the draws.

    Returns:
        One list a site, none empty.

    Raises:
        DataError: An example has no such column, or no draw gave every site an example.
    """
    groups: dict[str, list[int]] = {}
    for position, example in enumerate(examples):
        groups.setdefault(_owner(example.metadata, column, f"The example '{example.id}'"), []).append(position)
    generator = np.random.default_rng(seed)
    for _ in range(DRAWS):
        dealt: list[list[int]] = [[] for _ in range(sites)]
        for value in sorted(groups):
            members = generator.permutation(groups[value])
            shares = generator.dirichlet(np.full(sites, alpha))
            cuts = np.floor(np.cumsum(shares)[:-1] * len(members)).astype(int)
            for site, part in enumerate(np.split(members, cuts)):
                dealt[site] += part.tolist()
        if all(dealt):
            return [[examples[position] for position in sorted(part)] for part in dealt]
    raise DataError(
        f"{len(examples)} examples cannot be split over {sites} sites with alpha {alpha:g} so that each has one.",
        "Raise federated.sites.alpha, or lower --clients.",
    )


def require_sites(found: dict[str, list[Example]], sites: int | None, column: str) -> None:
    """Raise ConfigError where an owner column does not have as many values as sites are wanted."""
    if sites is not None and len(found) != sites:
        raise ConfigError(
            f"The column '{column}' names {len(found)} owners ({', '.join(list(found)[:8])}), not {sites}.",
            f"Say --clients {len(found)}, or set federated.sites.by to random or dirichlet.",
        )


def _owner(metadata: dict[str, Any], column: str, what: str) -> str:
    value = metadata.get(column)
    if value is None or value == "":
        raise DataError(
            f"{what} has no '{column}', which says whose it is.", "Fill the column, or set federated.sites.column."
        )
    return str(value)
