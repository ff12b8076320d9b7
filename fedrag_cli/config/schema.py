"""The config's dataclasses that belong to no single component.

Components (retrievers, stores, trainers, data sources) bring their own dataclasses; see `registry.py`.
"""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from annotated_types import Interval

from fedrag_cli.config.fields import (
    ClientName,
    ComponentSlot,
    FederatedMetricName,
    Fraction,
    MetricName,
    Multiple,
    NonEmptyStr,
    OutputPathStr,
    PassageTemplate,
    PathStr,
    PositiveFloat,
    PositiveInt,
    PromptTemplate,
    Seed,
    config_class,
    default_component,
)

TransportDtype = Literal["float32", "float16"]
"""Number formats in which tuned weights travel in a federation."""

DEFAULT_PROMPT = (
    "Answer the question with a few words from the context.\n\nContext:\n{context}\n\nQuestion: {query}\nAnswer:"
)


@config_class
class RunConfig:
    """How a run is named, where it is kept, and what it runs on."""

    name: NonEmptyStr = "run"
    """Name of the run; its directory is <output_dir>/<name>/<UTC time>-<short id>."""
    output_dir: OutputPathStr = "runs"
    """Folder that holds the run directories. A relative one counts from the current folder, while all other relative
    paths count from the folder of the file that names them (on the command line: from the current folder)."""
    seed: Seed = 42
    """Seed of all randomness: data order, LoRA initialisation, dropout, bootstrap; below 2**32."""
    device: str = "auto"
    """auto, cpu, mps, cuda or cuda:N; auto takes cuda, then mps, then cpu."""
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow", "comet_ml", "trackio"], ...] = ()
    """Experiment trackers that also get the training curves; their packages must be installed."""


@config_class
class PromptConfig:
    """How passages and the query become the generator's prompt.

    Control tokens are recognised in the templates and separators alone. In passages, questions, answers and the system
    message they are text.
    """

    template: PromptTemplate = DEFAULT_PROMPT
    """The prompt, with {context} and {query}; the user's turn where a chat template is used."""
    passage_template: PassageTemplate = "{text}"
    """One passage in the context, with {text} and any metadata field of the corpus, such as {title} or, in an object,
    {meta[author]}. Lists are joined by commas. A field that is null, NaN, blank or not there leaves no trace: a line
    whose fields are all empty is left out with its heading, and in a line an empty field goes with its label, the
    brackets or quotes around it, and what joins it to the field before it (after it, where it is the first):
    "{title}: {text}" is the text alone where there is no title. A field that no passage has is an error."""
    separator: str = "\n"
    """What stands between two passages."""
    system: str | None = None
    """System message, for chat templates."""
    chat_template: Literal["auto", "always", "never"] = "auto"
    """auto uses the tokenizer's chat template where it has one. Models that think are asked for the answer alone, after
    an empty block of thoughts, and templates that name today's date get 26 July 2024 on all days."""


@config_class
class FusionConfig:
    """How dense and lexical scores become one ranking."""

    method: Literal["weighted", "rrf", "lexical"] = "weighted"
    """weighted mixes scores that are standardised for each query over its candidates, rrf adds reciprocal ranks, and
    lexical leaves the ranking to the words alone."""
    weight: Annotated[float, Interval(gt=0, le=1)] = 0.7
    """Share of the dense side with method: weighted; 1 is dense retrieval alone."""
    candidates: PositiveInt = 100
    """Passages that each side proposes."""
    rrf_constant: PositiveFloat = 60.0
    """Damps the first ranks with method: rrf; 60 is the paper's."""


@config_class
class RAGSystemConfig:
    """Retriever, generator, knowledge store and prompt."""

    retriever: Annotated[Any, ComponentSlot("retriever", default="sentence_transformer")]
    """Encodes queries and passages."""
    lexical: Annotated[Any, ComponentSlot("lexical", default="bm25")] | None = None
    """Searches by words beside the retriever; {} is BM25 with its defaults."""
    fusion: FusionConfig = field(default_factory=FusionConfig)
    """How both rankings become one, where there is a lexical side."""
    generator: Annotated[Any, ComponentSlot("generator", default="causal_lm")] | None = None
    """Answers from the retrieved passages; needed by all commands but `index` and retrieval-only evaluation."""
    knowledge_store: Annotated[Any, ComponentSlot("knowledge_store", default="memory")] = default_component(
        "knowledge_store", "memory"
    )
    """Holds the passages and their embeddings; an in-memory exact store where nothing is said."""
    prompt: PromptConfig = field(default_factory=PromptConfig)
    """How the prompt is written."""
    top_k: PositiveInt = 3
    """Passages that are retrieved for a prompt."""
    inference: Literal["concat", "ensemble"] = "concat"
    """concat puts all passages into one prompt; ensemble gives each passage a prompt of its own and sums their
    next-token probabilities, weighted by the retriever (REPLUG, RA-DIT)."""
    ensemble_temperature: PositiveFloat | None = None
    """With inference: ensemble, the temperature of the retriever's weights; 0.05 where nothing is said."""


@config_class
class DatasetConfig:
    """The passages and the question-answer examples."""

    corpus: Annotated[Any, ComponentSlot("corpus", default="file")] | None = None
    """The passages of the knowledge store; only a federation's server and an evaluation without context need none."""
    train: Annotated[Any, ComponentSlot("examples", default="file")] | None = None
    """Examples to train on."""
    validation: Annotated[Any, ComponentSlot("examples", default="file")] | None = None
    """Examples for early stopping and the choice of the best checkpoint."""
    test: Annotated[Any, ComponentSlot("examples", default="file")] | None = None
    """Examples for the evaluation before and after training."""


@config_class
class TrainerConfig:
    """What is tuned, and how."""

    mode: Literal["retriever", "generator", "alternating"] = "retriever"
    """Tune the retriever, the generator, or both in turn."""
    retriever: Annotated[Any, ComponentSlot("retriever_trainer", default="lsr")] = default_component(
        "retriever_trainer", "lsr"
    )
    """The retriever's trainer; LSR with its defaults where nothing is said."""
    generator: Annotated[Any, ComponentSlot("generator_trainer", default="ralt")] = default_component(
        "generator_trainer", "ralt"
    )
    """The generator's trainer; RALT with its defaults where nothing is said."""
    cycles: PositiveInt = 1
    """In alternating mode: how often retriever and generator are tuned in turn."""


@config_class
class EvaluationConfig:
    """What `train` measures before and after, and what `evaluate` measures."""

    split: Literal["auto", "validation", "test"] = "auto"
    """The split to evaluate on; auto takes test, and validation where there is no test."""
    metrics: tuple[MetricName, ...] | None = None
    """Metrics to compute; by default those of the side that is tuned."""
    context: Literal["retrieved", "oracle", "none"] = "retrieved"
    """What answers are given from: the retrieved passages, the relevant ones, or none."""
    choice_score: Literal["sum", "token", "character", "prior"] = "sum"
    """How accuracy compares the choices of a question: by their log-likelihood, by it a token or a character, or by
    how much the question raises it over an empty prompt's."""
    group_by: NonEmptyStr | None = None
    """Column of the questions; the metrics are given for each of its values too."""
    depth: PositiveInt = 100
    """Length of the rankings that mrr is computed on."""
    limit: PositiveInt | None = None
    """Evaluate on the first so many examples only."""
    confidence: Fraction = 0.95
    """Level of the bootstrap intervals."""
    resamples: PositiveInt = 10000
    """Resamples of the bootstrap."""


@config_class
class SitesConfig:
    """How `fedrag simulate` splits the data over its clients."""

    by: Literal["auto", "owner", "random", "dirichlet"] = "auto"
    """owner follows a column, random deals evenly, dirichlet mixes a column's values unevenly; auto takes owner where
    the examples have the column, and random elsewhere."""
    column: NonEmptyStr = "site"
    """The column of the owner, or of the values that are mixed; passages that have it go to their owner too."""
    alpha: PositiveFloat = 0.5
    """Concentration of the Dirichlet distribution: the smaller, the more sites differ."""


@config_class
class PrivacyConfig:
    """Differential privacy for each client's part in the tuned weights (arXiv 1710.06963).

    Updates are clipped, all count the same, and Gaussian noise is added to their mean. It is drawn from the system's
    entropy, so runs do not repeat. Two epsilons are told: that against zeroing all updates of one site, which moves a
    sum by one clipping norm, and the larger one against replacing them, which moves it by two. Who takes part is no
    secret in either.
    """

    at: Literal["server", "client"] = "server"
    """Who clips and adds noise: the server, which then sees the updates as they are, or each client before it sends,
    with its share of the noise for `min_clients`: multiplier * clipping_norm / sqrt(min_clients), and epsilon is that
    of the mean if as many clients add it."""
    clipping_norm: PositiveFloat
    """Largest L2 norm of an update (trained weights minus global weights); a longer one is scaled down to it."""
    noise_multiplier: PositiveFloat
    """Standard deviation of the noise on the sum of the updates, in clipping norms; on the mean it is divided by the
    number of the round's updates. Every round's record has these numbers and what was spent: epsilon and
    epsilon_replaced, composed over all rounds with the noise that each one had; null where a round had none."""
    delta: Annotated[float, Interval(gt=0, lt=1)] = 1e-5
    """The delta for which epsilon is given; well below one in the number of clients."""


@config_class
class FederatedConfig:
    """How several sites tune one model together, each on its own data."""

    rounds: PositiveInt = 3
    """Rounds; in each one every chosen client trains as `trainer` says, starting from the global weights."""
    strategy: Annotated[Any, ComponentSlot("strategy", default="FedAvg")] = default_component("strategy", "FedAvg")
    """How the clients' updates become the next global weights."""
    min_clients: PositiveInt = 2
    """Quorum: a round with fewer usable updates fails the run."""
    wait_for_clients: PositiveInt | None = None
    """Clients to wait for before the first round; the quorum by default."""
    gather_timeout: PositiveFloat = 600.0
    """Seconds to wait for clients before a round; then the run goes on with the quorum, or fails."""
    round_timeout: PositiveFloat = 3600.0
    """Seconds a round may take; updates that come later are refused."""
    rejoin_timeout: PositiveFloat = 60.0
    """Seconds that a client which vanished in a round is waited for, after it was found to be gone, and half as many
    each time that it had not come back; as long at most does a server wait for clients to hand the final model to."""
    connect_timeout: PositiveFloat = 600.0
    """Seconds that a client tries to reach a server that does not answer."""
    transport_dtype: TransportDtype = "float32"
    """How tuned weights travel. float16 halves the traffic: clients get the global weights rounded to 11 bits of
    precision and send what training has changed, so that small steps are kept; values above 65504 are refused by the
    tensor's name. What is aggregated and saved is float32."""
    max_update_norm: PositiveFloat | None = None
    """Largest L2 norm of an update (trained weights minus global weights); a larger one is refused."""
    max_norm_ratio: Multiple | None = 5.0
    """Largest L2 norm of an update as a multiple of the lower median of the round's norms, from three updates on: a
    longer one is scaled down to it, and the round's record names its client under outliers. Not under privacy, which
    clips by itself, and not for FedMedian, FedTrimmedAvg, Krum, MultiKrum and Bulyan, which leave outliers out; null
    leaves norms to max_update_norm."""
    max_weight_ratio: Multiple | None = 10.0
    """Most that an update counts for, as a multiple of the lower median of the round: numbers of training and of
    validation examples above it, and losses under QFedAvg, count as that, and the round's record names the client. So
    two clients with 10 and 1,000 examples are weighed 10 to 100; null counts what clients say, whoever they are."""
    lora_aggregation: Literal["average", "svd", "freeze_a"] = "average"
    """How LoRA adapters become one. average takes the means of their factors B and A apart, though what is learned is
    their product; every round's record has the share of it that this misses, as lora_gap. svd takes the adapter of the
    same rank that is closest to the mean of the products. freeze_a trains B alone, with the same A everywhere, which
    makes the mean exact and halves the traffic."""
    privacy: PrivacyConfig | None = None
    """Differential privacy of the tuned weights; none by default."""
    metrics: tuple[FederatedMetricName, ...] = ("loss", "validation_loss")
    """What clients report beside their numbers of examples; nothing else leaves them but the tuned weights."""
    evaluate_every: PositiveInt = 1
    """Rounds between two evaluations by the server, where it evaluates; the first and the last model always are."""
    sites: SitesConfig = field(default_factory=SitesConfig)
    """How a simulation splits the data."""
    name: ClientName | None = None
    """Name of this client in the server's table; with `allowed_keys` the name of its key's file counts."""
    key: PathStr | None = None
    """This client's private key (`fedrag keys node`)."""
    allowed_keys: PathStr | None = None
    """Folder with the public keys of the clients that may join, a file NAME.pub each; read by the server."""
    certificate: PathStr | None = None
    """The server's TLS certificate, with its chain, as PEM."""
    certificate_key: PathStr | None = None
    """The private key of the server's certificate."""
    ca_certificate: PathStr | None = None
    """The authority that clients trust, as PEM; the system's authorities by default."""


@config_class
class Config:
    """One file that describes a RAG system, its data and how to tune it."""

    rag_system: RAGSystemConfig
    """The RAG system."""
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    """Its data; only a federation's server can do without. Relative paths count from the folder of the file that names
    them."""
    run: RunConfig = field(default_factory=RunConfig)
    """Name, folder, seed and device."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """What is tuned, and how."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """What is measured."""
    federated: FederatedConfig | None = None
    """How several sites tune together; the defaults where a federation is run without this section."""
