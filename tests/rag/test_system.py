"""The RAG system: single calls and batches agree, and a stale index is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import data_rows
from sentence_transformers import SentenceTransformer

from fedrag_cli.config import PromptConfig
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import ConfigError, DataError, KnowledgeStoreError
from fedrag_cli.rag.build import build_knowledge_store
from fedrag_cli.rag.config import CausalLMConfig, SentenceTransformerConfig
from fedrag_cli.rag.generators.causal_lm import CausalLMGenerator
from fedrag_cli.rag.retrievers.sentence_transformer import SentenceTransformerRetriever
from fedrag_cli.rag.system import RAGSystem, refresh_store
from fedrag_cli.runs.reporter import SilentReporter

QUERIES = ["what is the colour of the cat ?", "where ?", "where is the owl , the fox and the hen ?"]


def corpus() -> list[KnowledgeNode]:
    return [KnowledgeNode(row["id"], row["text"], {"title": row["title"]}) for row in data_rows()["corpus"]]


def retriever_of(folder: Path) -> SentenceTransformerRetriever:
    return SentenceTransformerRetriever.from_config(SentenceTransformerConfig(model=str(folder)), device="cpu")


@pytest.fixture
def system(models: dict[str, Path]) -> RAGSystem:
    retriever = retriever_of(models["retriever"])
    generator = CausalLMGenerator.from_config(
        CausalLMConfig(model=str(models["generator"]), max_new_tokens=6), prompt=PromptConfig(), device="cpu"
    )
    return RAGSystem(retriever, build_knowledge_store(retriever, corpus(), SilentReporter()), generator, top_k=2)


def nudge(encoder: SentenceTransformer) -> None:
    with torch.no_grad():
        next(encoder.parameters()).add_(0.05 * torch.arange(32))


def test_single_calls_equal_batches(system: RAGSystem) -> None:
    retrieved = system.batch_retrieve(QUERIES)
    for query, row in zip(QUERIES, retrieved, strict=True):
        single = system.retrieve(query)
        assert [scored.node for scored in single] == [scored.node for scored in row]
        assert [scored.score for scored in single] == pytest.approx([scored.score for scored in row], abs=1e-5)
    answers = system.batch_query(QUERIES)
    assert [answer.text for answer in answers] == [system.query(query).text for query in QUERIES]
    assert [answer.query for answer in answers] == QUERIES
    assert [answer.sources for answer in answers] == retrieved
    assert system.answer(QUERIES, retrieved) == answers
    assert system.batch_generate(QUERIES) == [system.generate(query) for query in QUERIES]


def test_retrieval_equals_cosines_computed_by_hand(system: RAGSystem) -> None:
    scores = system.retriever.encode_queries(QUERIES) @ system.retriever.encode_passages([n.text for n in corpus()]).T
    for row, found in zip(scores.tolist(), system.batch_retrieve(QUERIES, 5), strict=True):
        best = sorted(range(24), key=lambda position: -row[position])[:5]
        assert [scored.node for scored in found] == [corpus()[position] for position in best]
        assert [scored.score for scored in found] == pytest.approx([row[position] for position in best], abs=1e-5)


def test_an_answer_is_the_generators_on_the_prompt_of_its_sources(system: RAGSystem) -> None:
    generator = system.require_generator()
    for answer in system.batch_query(QUERIES, top_k=3):
        assert len(answer.sources) == 3
        prompt = generator.encode_prompt(answer.query, [scored.node for scored in answer.sources])
        assert answer.text == generator.generate_from_ids([prompt.ids])[0]
        assert all(scored.node.text in generator.tokenizer.decode(prompt.ids) for scored in answer.sources)


def test_sources_reach_the_answer(system: RAGSystem) -> None:
    sources = [[scored] for scored in system.retrieve(QUERIES[0], 24)]
    texts = {answer.text for answer in system.answer([QUERIES[0]] * 24, sources)}
    assert len(texts) > 1


@pytest.mark.parametrize("top_k", [0, -1, 25])
def test_top_k_out_of_range_is_refused_and_never_replaced_by_the_default(system: RAGSystem, top_k: int) -> None:
    for call in (system.retrieve, system.query):
        with pytest.raises(KnowledgeStoreError, match=f"top_k is {top_k}"):
            call(QUERIES[0], top_k)


def test_no_queries_give_no_answers(system: RAGSystem) -> None:
    assert system.batch_retrieve([]) == []
    assert system.batch_query([]) == []
    assert system.batch_generate([]) == []


def test_a_blank_query_is_refused(system: RAGSystem) -> None:
    with pytest.raises(DataError, match="Text 1"):
        system.batch_query(["where ?", " "])


def test_progress_counts_every_query(system: RAGSystem) -> None:
    done: list[int] = []
    system.batch_retrieve(QUERIES, progress=done.append)
    assert sum(done) == 3
    system.batch_query(QUERIES, progress=done.append)
    assert sum(done) == 6


def test_without_generator_only_retrieval_works(system: RAGSystem) -> None:
    system.generator = None
    assert len(system.retrieve(QUERIES[0])) == 2
    for call in (system.query, system.generate):
        with pytest.raises(ConfigError, match="no generator") as caught:
            call(QUERIES[0])
        assert "rag_system.generator" in caught.value.hint


def test_an_empty_store_is_refused(models: dict[str, Path], system: RAGSystem) -> None:
    system.knowledge_store.clear()
    with pytest.raises(KnowledgeStoreError, match="empty"):
        system.retrieve(QUERIES[0])


def test_another_encoder_is_refused_until_the_store_is_refreshed(models: dict[str, Path], system: RAGSystem) -> None:
    system.retriever = retriever_of(models["other_retriever"])
    with pytest.raises(KnowledgeStoreError, match="another encoder") as caught:
        system.retrieve(QUERIES[0])
    assert "fedrag index" in caught.value.hint
    refresh_store(system)
    fresh = build_knowledge_store(system.retriever, corpus(), SilentReporter())
    assert torch.equal(system.knowledge_store.embeddings, fresh.embeddings)
    assert len(system.retrieve(QUERIES[0])) == 2


def test_a_passage_encoder_that_was_tuned_is_refused_until_the_store_is_refreshed(system: RAGSystem) -> None:
    before = system.retrieve(QUERIES[0], 24)
    nudge(system.retriever.passage_encoder)
    for call in (system.retrieve, system.query):
        with pytest.raises(KnowledgeStoreError, match="another encoder"):
            call(QUERIES[0])
    done: list[int] = []
    refresh_store(system, done.append)
    assert sum(done) == 24
    assert [scored.score for scored in system.retrieve(QUERIES[0], 24)] != [scored.score for scored in before]
    assert system.knowledge_store.nodes == corpus()


def test_a_query_encoder_of_its_own_may_change_without_refresh(system: RAGSystem) -> None:
    system.retriever.separate_encoders()
    before, embeddings = system.retrieve(QUERIES[0], 24), system.knowledge_store.embeddings.clone()
    nudge(system.retriever.query_encoder)
    after = system.retrieve(QUERIES[0], 24)
    assert [scored.score for scored in after] != [scored.score for scored in before]
    assert torch.equal(system.knowledge_store.embeddings, embeddings)


def test_retrieval_is_the_same_where_a_module_was_left_in_training_mode(system: RAGSystem) -> None:
    before = system.batch_retrieve(QUERIES)
    system.retriever.query_encoder.train()
    assert system.batch_retrieve(QUERIES) == before


def test_cut_context_is_told_and_counted(models: dict[str, Path], system: RAGSystem) -> None:
    generator = system.require_generator()
    bare = len(generator.encode_prompt(QUERIES[0], []).ids)
    config = CausalLMConfig(model=str(models["generator"]), max_new_tokens=6, context_window=bare + 6 + 5)
    system.generator = CausalLMGenerator.from_config(config, prompt=PromptConfig(), device="cpu")
    answers = system.batch_query([QUERIES[0], QUERIES[1]], top_k=3)
    assert all(answer.dropped_tokens > 0 for answer in answers)
    assert len(answers[0].sources) == 3
    assert all(answer.prompt_tokens > answer.dropped_tokens for answer in answers)
    with pytest.raises(DataError, match="context window has"):
        system.query(QUERIES[2] * 5)
