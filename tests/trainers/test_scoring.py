"""Cached likelihoods: nothing is computed twice, and a cache that a kill cut off is completed to the same numbers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import data_rows

from fedrag_cli.config import PromptConfig, load_config
from fedrag_cli.data.examples import Example
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import DataError
from fedrag_cli.rag.build import build_rag_system
from fedrag_cli.rag.config import CausalLMConfig
from fedrag_cli.rag.generators.causal_lm import CausalLMGenerator
from fedrag_cli.trainers.config import LSRConfig
from fedrag_cli.trainers.huggingface import HuggingFaceTrainerForLSR
from fedrag_cli.trainers.huggingface.scoring import LikelihoodCache, LikelihoodScorer, Pair


class Counted:
    """A generator with the number of pairs of each batch that it has scored."""

    def __init__(self, folder: Path, prompt: PromptConfig | None = None, **settings: Any) -> None:
        config = CausalLMConfig(model=str(folder), **{"batch_tokens": 250, **settings})
        self.generator = CausalLMGenerator.from_config(config, prompt=prompt or PromptConfig(), device="cpu")
        self.rows: list[int] = []
        score = self.generator._score

        def counted(pairs: Any, packing: bool) -> Any:
            self.rows.append(len(pairs))
            return score(pairs, packing)

        self.generator._score = counted  # type: ignore[method-assign]


def pairs_of_data(count: int = 20) -> list[Pair]:
    rows = data_rows()
    nodes = [KnowledgeNode(row["id"], row["text"] + " and the tree" * (n % 5)) for n, row in enumerate(rows["corpus"])]
    answers = ("red", "the blue house", "in the barn of the owl")
    return [
        (Example(str(n), rows["train"][n % 14]["query"], (answers[n % 3],)), [nodes[(7 * n) % 24]])
        for n in range(count)
    ]


def cache_file(folder: Path) -> Path:
    [file] = folder.iterdir()
    return file


def test_totals_and_lengths_equal_those_of_the_generator(models: dict[str, Path]) -> None:
    counted, pairs = Counted(models["generator"]), pairs_of_data()
    totals, lengths = LikelihoodScorer(counted.generator).score(pairs)
    generator = counted.generator
    encoded = []
    for example, nodes in pairs:
        pair = generator.prompts.encode_pair(example.query, nodes, example.response, with_end=False)
        encoded.append((pair.ids, pair.answer))
    assert torch.allclose(totals, generator.log_probs_of_ids(encoded), atol=1e-5)
    assert lengths.tolist() == [len(target) for _, target in encoded]
    assert (totals.dtype, lengths.dtype) == (torch.float32, torch.int64)


def test_each_pair_is_tokenised_once(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    counted, pairs, encoded = Counted(models["generator"]), pairs_of_data(), []
    encode_pair = counted.generator.encode_pair

    def encoding(query: str, *rest: Any, **options: Any) -> Any:
        encoded.append(query)
        return encode_pair(query, *rest, **options)

    monkeypatch.setattr(counted.generator, "encode_pair", encoding)
    scorer = LikelihoodScorer(counted.generator)
    scorer.score(pairs)
    scorer.score(pairs)
    assert encoded == [example.query for example, _ in pairs]


def test_the_second_time_nothing_is_computed(models: dict[str, Path], tmp_path: Path) -> None:
    counted, pairs = Counted(models["generator"]), pairs_of_data()
    scorer = LikelihoodScorer(counted.generator, tmp_path)
    first = scorer.score(pairs)
    assert sum(counted.rows) == 20
    assert len(counted.rows) > 2
    again = scorer.score(pairs[::-1])
    assert sum(counted.rows) == 20
    assert torch.equal(again[0].flip(0), first[0])
    fresh = Counted(models["generator"])
    other = LikelihoodScorer(fresh.generator, tmp_path)
    assert torch.equal(other.score(pairs)[0], first[0])
    assert torch.equal(other.score(pairs)[1], first[1])
    assert fresh.rows == []


def test_a_pair_that_comes_up_twice_is_computed_once(models: dict[str, Path]) -> None:
    counted, pairs = Counted(models["generator"]), pairs_of_data(3)
    totals, lengths = LikelihoodScorer(counted.generator).score([*pairs, *pairs])
    assert sum(counted.rows) == 3
    assert torch.equal(totals[:3], totals[3:])
    assert torch.equal(lengths[:3], lengths[3:])


def test_only_what_is_missing_is_computed(models: dict[str, Path]) -> None:
    counted, pairs = Counted(models["generator"]), pairs_of_data()
    scorer = LikelihoodScorer(counted.generator)
    some = scorer.score(pairs[:12])[0]
    totals = scorer.score(pairs)[0]
    assert sum(counted.rows) == 20
    assert torch.equal(totals[:12], some)


@pytest.mark.parametrize("finished", [0, 1, 2])
@pytest.mark.parametrize("torn", [False, True])
def test_a_cache_that_a_kill_cut_off_is_completed_bit_identically(
    models: dict[str, Path], tmp_path: Path, finished: int, torn: bool
) -> None:
    counted, pairs = Counted(models["generator"]), pairs_of_data()
    expected = LikelihoodScorer(counted.generator, tmp_path).score(pairs)[0]
    file = cache_file(tmp_path)
    content = file.read_bytes()
    lines = content.splitlines(keepends=True)
    assert len(lines) == len(counted.rows) > 3
    kept = b"".join(lines[:finished])
    file.write_bytes(kept + (lines[finished][:-7] if torn else b""))
    resumed = Counted(models["generator"])
    assert torch.equal(LikelihoodScorer(resumed.generator, tmp_path).score(pairs)[0], expected)
    assert resumed.rows == counted.rows[finished:]
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    "damage",
    [
        b"not json",
        b"[1, 2]",
        b'{"keys": ["a"]}',
        b'{"keys": ["a", "b"], "values": [1.0]}',
        b"\xff\xfe",
        b'{"keys": 1, "values": 2}',
    ],
)
def test_a_damaged_line_in_the_middle_is_a_data_error(models: dict[str, Path], tmp_path: Path, damage: bytes) -> None:
    counted = Counted(models["generator"])
    LikelihoodScorer(counted.generator, tmp_path).score(pairs_of_data())
    file = cache_file(tmp_path)
    lines = file.read_bytes().splitlines()
    lines[1] = damage
    file.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(DataError, match="is damaged") as caught:
        LikelihoodScorer(counted.generator, tmp_path)
    assert str(file) in caught.value.message
    assert "Remove the file" in caught.value.hint


def test_values_survive_the_file_to_the_last_bit(tmp_path: Path) -> None:
    values = torch.rand(50, generator=torch.Generator().manual_seed(0)).mul(-30).tolist()
    keys = [str(number) for number in range(50)]
    LikelihoodCache(tmp_path / "cache.jsonl").put(keys, values)
    again = LikelihoodCache(tmp_path / "cache.jsonl")
    assert [again.get(key) for key in keys] == values
    assert again.get("unknown") is None
    assert len(again) == 50


def test_other_weights_and_other_batches_have_a_cache_of_their_own(models: dict[str, Path], tmp_path: Path) -> None:
    pairs = pairs_of_data(3)
    first = Counted(models["generator"])
    before = LikelihoodScorer(first.generator, tmp_path).score(pairs)[0]
    with torch.no_grad():
        first.generator.model.lm_head.weight.mul_(1.5)
    after = LikelihoodScorer(first.generator, tmp_path).score(pairs)[0]
    assert (after - before).abs().min() > 1e-3
    LikelihoodScorer(Counted(models["generator"], batch_tokens=300).generator, tmp_path).score(pairs)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_scorer_serves_the_weights_that_it_was_made_for_and_no_others(
    models: dict[str, Path], tmp_path: Path
) -> None:
    generator = Counted(models["generator"]).generator
    scorer = LikelihoodScorer(generator, tmp_path)
    assert scorer.serves(generator, tmp_path)
    assert not scorer.serves(generator, tmp_path / "other")
    assert not scorer.serves(generator, None)
    assert not scorer.serves(Counted(models["generator"]).generator, tmp_path)
    with torch.no_grad():
        generator.model.lm_head.weight.mul_(1.5)
    assert not scorer.serves(generator, tmp_path)


def test_a_trainer_scores_anew_once_the_language_model_has_changed(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    system, folder = build_rag_system(load_config(write_config())), tmp_path / "likelihoods"
    trainer = HuggingFaceTrainerForLSR(system, config=LSRConfig(top_k=4))
    pairs: list[Pair] = [(example, [system.knowledge_store.nodes[0]]) for example in trainer.train_examples[:3]]
    generator = system.require_generator()
    trainer._prepare(folder, None)
    before = trainer._scoring().score(pairs)[0]
    with torch.no_grad():
        generator.model.lm_head.weight.mul_(1.5)
    trainer._prepare(folder, None)
    after = trainer._scoring().score(pairs)[0]
    assert torch.allclose(after, LikelihoodScorer(generator).score(pairs)[0], atol=1e-4)
    assert (after - before).abs().min() > 1e-3
    assert len(list(folder.iterdir())) == 2


def test_another_prompt_shares_the_file_but_no_likelihood(models: dict[str, Path], tmp_path: Path) -> None:
    pairs = pairs_of_data(3)
    before = LikelihoodScorer(Counted(models["generator"]).generator, tmp_path).score(pairs)[0]
    other = Counted(models["generator"], PromptConfig(template="{query} {context}"))
    assert (LikelihoodScorer(other.generator, tmp_path).score(pairs)[0] - before).abs().min() > 1e-4
    assert sum(other.rows) == 3
    assert len(list(tmp_path.iterdir())) == 1


def test_metadata_that_the_prompt_shows_makes_another_pair(models: dict[str, Path]) -> None:
    counted = Counted(models["generator"], PromptConfig(passage_template="{title} : {text}"))
    example = Example("1", "where ?", ("red",))
    first, second = (KnowledgeNode("p", "the barn", {"title": title}) for title in ("cat", "the blue house"))
    totals = LikelihoodScorer(counted.generator).score([(example, [first]), (example, [second])])[0]
    assert abs(float(totals[0] - totals[1])) > 1e-4


def test_cut_prompts_are_counted_once(models: dict[str, Path]) -> None:
    counted, pairs = Counted(models["generator"], context_window=120), pairs_of_data(6)
    scorer = LikelihoodScorer(counted.generator)
    long = KnowledgeNode("long", " ".join(["the cat"] * 60))
    scorer.score([*pairs, (Example("x", "where ?", ("red",)), [long])])
    first = scorer.truncation.to_dict()
    scorer.score([*pairs, (Example("x", "where ?", ("red",)), [long])])
    assert scorer.truncation.to_dict() == first
    assert first["truncated"] >= 1
    assert first["prompts"] == 7
    assert first["dropped_tokens"] > 60


def test_several_passages_make_one_prompt_and_their_order_counts(models: dict[str, Path]) -> None:
    counted = Counted(models["generator"])
    example = Example("1", "where ?", ("red",))
    first, second = KnowledgeNode("a", "the barn of the cat"), KnowledgeNode("b", "the blue house")
    scorer = LikelihoodScorer(counted.generator)
    totals, lengths = scorer.score([(example, [first, second]), (example, [second, first]), (example, [first])])
    generator = counted.generator
    pair = generator.prompts.encode_pair("where ?", [first, second], "red", with_end=False)
    expected = generator.log_probs_of_ids([(pair.ids, pair.answer)])
    assert totals[0].item() == pytest.approx(expected.item(), abs=1e-5)
    assert len({round(value, 5) for value in totals.tolist()}) == 3
    assert len(set(lengths.tolist())) == 1


def test_the_cache_holds_no_text(models: dict[str, Path], tmp_path: Path) -> None:
    LikelihoodScorer(Counted(models["generator"]).generator, tmp_path).score(pairs_of_data())
    for line in cache_file(tmp_path).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        assert set(record) == {"keys", "values"}
        assert "colour" not in line
