"""Config dataclasses of the benchmarks, and their registration."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import MinLen

from fedrag_cli.config.fields import NonEmptyStr, PathStr, PositiveInt, config_class
from fedrag_cli.data.config import SplitConfig
from fedrag_cli.registry import Registry

Splits = Annotated[tuple[NonEmptyStr, ...], MinLen(1)]
XquadName = Literal[
    "xquad.ar",
    "xquad.de",
    "xquad.el",
    "xquad.en",
    "xquad.es",
    "xquad.hi",
    "xquad.ro",
    "xquad.ru",
    "xquad.th",
    "xquad.tr",
    "xquad.vi",
    "xquad.zh",
]


@config_class
class BenchmarkConfig:
    """Where a benchmark is read from."""

    type: str
    """Names this source."""
    path: PathStr | None = None
    """A local copy of the hub repository's files, from `hf download --repo-type dataset`; then no network is used."""
    revision: NonEmptyStr | None = None
    """Branch, tag or commit of the hub repository."""
    limit: PositiveInt | None = None
    """Read the first so many rows (questions, claims or documents) of a split only."""


@config_class
class BenchmarkCorpusConfig(BenchmarkConfig):
    """The passages of a benchmark."""

    split: SplitConfig | None = None
    """Splitting of long passages; none by default."""


@config_class
class MmluExamplesConfig(BenchmarkConfig):
    """The questions of MMLU; the options are part of the query, the answer is a letter."""

    type: Literal["mmlu"] = "mmlu"
    """Names this source."""
    name: NonEmptyStr = "all"
    """A subject, such as anatomy, or all of them."""
    split: NonEmptyStr = "test"
    """One of test, validation, dev and auxiliary_train."""


@config_class
class BoolqExamplesConfig(BenchmarkConfig):
    """The questions of BoolQ, answered by yes or no."""

    type: Literal["boolq"] = "boolq"
    """Names this source."""
    split: NonEmptyStr = "validation"
    """One of train and validation."""


@config_class
class HellaswagExamplesConfig(BenchmarkConfig):
    """The contexts of HellaSwag with four endings each."""

    type: Literal["hellaswag"] = "hellaswag"
    """Names this source."""
    split: NonEmptyStr = "validation"
    """One of train and validation; test has no labels."""


@config_class
class HotpotExamplesConfig(BenchmarkConfig):
    """The questions of HotpotQA's distractor setting."""

    type: Literal["hotpot_qa"] = "hotpot_qa"
    """Names this source."""
    split: NonEmptyStr = "validation"
    """One of train and validation."""


@config_class
class NqOpenExamplesConfig(BenchmarkConfig):
    """The questions of NQ-Open."""

    type: Literal["nq_open"] = "nq_open"
    """Names this source."""
    split: NonEmptyStr = "validation"
    """One of train and validation."""


@config_class
class PubmedExamplesConfig(BenchmarkConfig):
    """The questions of PubMedQA, answered by yes, no or maybe."""

    type: Literal["pubmed_qa"] = "pubmed_qa"
    """Names this source."""
    name: Literal["pqa_labeled", "pqa_artificial"] = "pqa_labeled"
    """The 1,000 questions labelled by experts, or those with generated labels."""
    split: NonEmptyStr = "train"
    """The only split on the hub."""


@config_class
class Squad2ExamplesConfig(BenchmarkConfig):
    """The questions of SQuAD 2.0; the accepted answer of an unanswerable one is the empty text."""

    type: Literal["squad_v2"] = "squad_v2"
    """Names this source."""
    split: NonEmptyStr = "validation"
    """One of train and validation."""
    answerable_only: bool = False
    """Leave out the unanswerable questions, which training cannot use; `limit` counts them nevertheless."""


@config_class
class TriviaExamplesConfig(BenchmarkConfig):
    """The questions of TriviaQA."""

    type: Literal["trivia_qa"] = "trivia_qa"
    """Names this source."""
    name: Literal["rc.wikipedia", "rc.wikipedia.nocontext", "unfiltered", "unfiltered.nocontext"] = "rc.wikipedia"
    """The configuration; those with `nocontext` have no relevant pages."""
    split: NonEmptyStr = "validation"
    """One of train and validation; test has no labels."""


@config_class
class FeverExamplesConfig(BenchmarkConfig):
    """The claims of FEVER, to be told supported, refuted or neither."""

    type: Literal["fever"] = "fever"
    """Names this source."""
    name: Literal["v1.0", "v2.0"] = "v1.0"
    """The original claims, or those that were written to break systems."""
    split: NonEmptyStr = "labelled_dev"
    """One of train, labelled_dev, paper_dev and paper_test of v1.0; v2.0 has validation only."""
    relevant_pages: bool = False
    """Take the pages with evidence as relevant ids, for a corpus whose ids are page names, as that of BEIR's FEVER."""


@config_class
class XquadExamplesConfig(BenchmarkConfig):
    """The questions of XQuAD in one language."""

    type: Literal["xquad"] = "xquad"
    """Names this source."""
    name: XquadName = "xquad.en"
    """The language."""
    split: NonEmptyStr = "validation"
    """The only split on the hub."""


@config_class
class BeirHubExamplesConfig(BenchmarkConfig):
    """Queries and judgements of a BEIR data set; they have no answers, so they serve retrieval metrics only."""

    type: Literal["beir_hub"] = "beir_hub"
    """Names this source."""
    name: NonEmptyStr
    """The data set, such as scifact or nfcorpus."""
    split: NonEmptyStr = "test"
    """Split of the judgements."""
    qrels_path: PathStr | None = None
    """With `path`: a local copy of the repository of the judgements; by default, they are in the same folder."""
    qrels_revision: NonEmptyStr | None = None
    """Branch, tag or commit of the repository of the judgements."""


@config_class
class BoolqCorpusConfig(BenchmarkCorpusConfig):
    """The passages of BoolQ."""

    type: Literal["boolq"] = "boolq"
    """Names this source."""
    data_splits: Splits = ("validation",)
    """The splits whose passages are taken."""


@config_class
class HotpotCorpusConfig(BenchmarkCorpusConfig):
    """The paragraphs of all contexts of HotpotQA's distractor setting."""

    type: Literal["hotpot_qa"] = "hotpot_qa"
    """Names this source."""
    data_splits: Splits = ("validation",)
    """The splits whose paragraphs are taken."""


@config_class
class PubmedCorpusConfig(BenchmarkCorpusConfig):
    """The abstracts of PubMedQA, without their conclusions."""

    type: Literal["pubmed_qa"] = "pubmed_qa"
    """Names this source."""
    name: Literal["pqa_labeled", "pqa_artificial", "pqa_unlabeled"] = "pqa_labeled"
    """The configuration whose abstracts are taken."""
    data_splits: Splits = ("train",)
    """The only split on the hub."""


@config_class
class Squad2CorpusConfig(BenchmarkCorpusConfig):
    """The paragraphs of SQuAD 2.0."""

    type: Literal["squad_v2"] = "squad_v2"
    """Names this source."""
    data_splits: Splits = ("validation",)
    """The splits whose paragraphs are taken."""


@config_class
class TriviaCorpusConfig(BenchmarkCorpusConfig):
    """The Wikipedia pages of TriviaQA."""

    type: Literal["trivia_qa"] = "trivia_qa"
    """Names this source."""
    name: Literal["rc.wikipedia", "unfiltered"] = "rc.wikipedia"
    """The configuration whose pages are taken."""
    data_splits: Splits = ("validation",)
    """The splits whose pages are taken; test has pages too."""
    split: SplitConfig | None = SplitConfig()
    """Splitting of the pages into passages."""


@config_class
class XquadCorpusConfig(BenchmarkCorpusConfig):
    """The paragraphs of XQuAD in one language."""

    type: Literal["xquad"] = "xquad"
    """Names this source."""
    name: XquadName = "xquad.en"
    """The language."""
    data_splits: Splits = ("validation",)
    """The only split on the hub."""


@config_class
class BeirHubCorpusConfig(BenchmarkCorpusConfig):
    """The documents of a BEIR data set; title and text are joined."""

    type: Literal["beir_hub"] = "beir_hub"
    """Names this source."""
    name: NonEmptyStr
    """The data set, such as scifact or nfcorpus."""


COMPONENTS: tuple[tuple[str, type[BenchmarkConfig], str, str], ...] = (
    ("examples", MmluExamplesConfig, "choices:MMLU.load_examples", "MMLU (multiple choice)"),
    ("examples", BoolqExamplesConfig, "choices:BOOLQ.load_examples", "BoolQ (yes or no)"),
    ("examples", HellaswagExamplesConfig, "choices:HELLASWAG.load_examples", "HellaSwag (endings to choose from)"),
    ("examples", HotpotExamplesConfig, "short_answers:HOTPOT_QA.load_examples", "HotpotQA, distractor setting"),
    ("examples", NqOpenExamplesConfig, "short_answers:NQ_OPEN.load_examples", "NQ-Open (no passages)"),
    ("examples", PubmedExamplesConfig, "choices:PUBMED_QA.load_examples", "PubMedQA (yes, no or maybe)"),
    (
        "examples",
        Squad2ExamplesConfig,
        "short_answers:load_squad_v2_examples",
        "SQuAD 2.0, with unanswerable questions",
    ),
    ("examples", TriviaExamplesConfig, "short_answers:TRIVIA_QA.load_examples", "TriviaQA"),
    ("examples", FeverExamplesConfig, "choices:load_fever_examples", "FEVER (claims to be judged)"),
    ("examples", XquadExamplesConfig, "short_answers:XQUAD.load_examples", "XQuAD, one language"),
    (
        "examples",
        BeirHubExamplesConfig,
        "beir_hub:load_examples",
        "BEIR data set of the hub (queries and judgements)",
    ),
    ("corpus", BoolqCorpusConfig, "choices:BOOLQ.load_corpus", "passages of BoolQ"),
    ("corpus", HotpotCorpusConfig, "short_answers:HOTPOT_QA.load_corpus", "paragraphs of HotpotQA, distractor setting"),
    ("corpus", PubmedCorpusConfig, "choices:PUBMED_QA.load_corpus", "abstracts of PubMedQA"),
    ("corpus", Squad2CorpusConfig, "short_answers:SQUAD_V2.load_corpus", "paragraphs of SQuAD 2.0"),
    ("corpus", TriviaCorpusConfig, "short_answers:TRIVIA_QA.load_corpus", "Wikipedia pages of TriviaQA"),
    ("corpus", XquadCorpusConfig, "short_answers:XQUAD.load_corpus", "paragraphs of XQuAD, one language"),
    ("corpus", BeirHubCorpusConfig, "beir_hub:load_corpus", "BEIR data set of the hub (documents)"),
)


def register(registry: Registry) -> None:
    """Register the benchmarks."""
    for kind, config, builder, help in COMPONENTS:
        registry.register(kind, str(config.type), config, f"fedrag_cli.data.benchmarks.{builder}", help)
