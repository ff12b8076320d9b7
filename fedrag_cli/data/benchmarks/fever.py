"""FEVER: claims that pages of Wikipedia support, refute or leave open.

Source: Thorne et al., "FEVER: a Large-scale Dataset for Fact Extraction and VERification", arXiv 1803.05355;
`fever/fever` on the hub, which has one row for each sentence of evidence. The authors report the accuracy of the
label, and the FEVER score, which asks for the evidence too. Wikipedia itself is not part of the benchmark here; the
corpus of BEIR's FEVER has the same page names as ids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fedrag_cli.data.benchmarks.config import FeverExamplesConfig
from fedrag_cli.data.benchmarks.loading import HubSplit, map_rows
from fedrag_cli.data.benchmarks.values import label_value
from fedrag_cli.data.columns import get_value, id_value, text_value
from fedrag_cli.data.examples import Example
from fedrag_cli.data.readers import kind_of
from fedrag_cli.data.row_problems import BadValueError, Problems

CHOICES = ("SUPPORTS", "REFUTES", "NOT ENOUGH INFO")
LABELLED = {"v1.0": ("train", "labelled_dev", "paper_dev", "paper_test"), "v2.0": ("validation",)}


@dataclasses.dataclass(frozen=True)
class _Claim:
    id: str
    text: str
    label: str


def load_examples(config: FeverExamplesConfig) -> list[Example]:
    """Load the claims; the pages with evidence are in `evidence_pages` of the metadata.

    Args:
        config: The version, the split, and whether the pages with evidence are the relevant ids.

    Raises:
        ConfigError: A revision is given for a local copy.
        DataError: The split is missing or bad, or has no labels.
    """
    source = HubSplit(
        "fever/fever", config.name, config.split, config.path, config.revision, (config.name,), converted=True
    )
    problems = Problems(source.label)
    claims: dict[str, _Claim] = {}
    pages: dict[str, dict[str, None]] = {}
    # The limit counts claims, and nothing promises that the rows of a claim follow each other.
    for number, (claim, page) in map_rows(source, None, _evidence, LABELLED[config.name]):
        if claims.setdefault(claim.id, claim) != claim:
            problems.add(f"row {number}", f"claim {claim.id} has another text or label than in a row before it")
        pages.setdefault(claim.id, {}).update({page: None} if page else {})
    problems.raise_if_any()
    return [
        Example(
            claim.id,
            claim.text,
            (claim.label,),
            tuple(pages[claim.id]) if config.relevant_pages else (),
            {"evidence_pages": list(pages[claim.id])},
            CHOICES,
        )
        for claim in list(claims.values())[: config.limit]
    ]


def _evidence(values: Mapping[str, Any]) -> tuple[_Claim, str]:
    label = label_value(values, "label", CHOICES)
    claim = _Claim(id_value(values, "id"), text_value(values, "claim"), label)
    page = get_value(values, "evidence_wiki_url")
    if page is not None and not isinstance(page, str):
        raise BadValueError(f"evidence_wiki_url is {kind_of(page)}, not a text")
    return claim, (page or "").strip()
