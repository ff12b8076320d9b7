"""RAFT: the generator learns to answer among distractors, and now and then from distractors alone.

Zhang et al. (arXiv 2403.10131, section 3): for a share P of the examples the prompt holds the relevant passages and
distractors, for the others distractors only. The loss is that of RALT, on the answer's tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from fedrag_cli.data.examples import Example
from fedrag_cli.data.relevance import distinct_ids, first_ids, not_negatives
from fedrag_cli.rag.system import RAGSystem
from fedrag_cli.trainers.config import RAFTConfig
from fedrag_cli.trainers.huggingface.generator import Context, HuggingFaceTrainerForGenerator


class HuggingFaceTrainerForRAFT(HuggingFaceTrainerForGenerator):
    """Tunes the generator on relevant passages and distractors; arguments as `HuggingFaceTrainer`.

    Whether an example's prompt has its relevant passages, and the order of the passages, follow from the seed and the
    example's id alone: every epoch, every validation and a resumed run have the same prompts. Examples without relevant
    ids are left out and counted.
    """

    config: RAFTConfig

    def __init__(self, rag_system: RAGSystem, *args: Any, **kwargs: Any) -> None:
        """Keep the examples whose relevant passages are known."""
        super().__init__(rag_system, *args, **kwargs)
        self._left_out = self._keep_judged()
        # The rounds of a federation change `seed` for the order of the examples; their prompts stay.
        self._prompt_seed = self.seed

    def _default_config(self) -> RAFTConfig:
        return RAFTConfig()

    def contexts(self, examples: Sequence[Example]) -> list[Context]:
        """Choose relevant passages and distractors for examples with relevant ids; distractors are retrieved.

        What answers the question is no distractor: neither a relevant passage, nor one of another example that asks the
        same, nor a passage with the same text as one of these.

        Returns:
            One context for each example, of at most top_k passages.
        """
        if not examples:
            return []
        store, top_k = self.rag_system.knowledge_store, self.config.top_k
        nodes = {node.id: node for node in store.nodes}
        same = first_ids(nodes.values())
        known = (*self.train_examples, *self.validation_examples)
        spared = not_negatives(examples, known, same)
        most = max(len(names) for names in spared)
        found = self.rag_system.batch_retrieve([example.query for example in examples], min(len(store), top_k + most))
        result = []
        for example, never, scored in zip(examples, spared, found, strict=True):
            chance = random.Random(f"{self._prompt_seed}:{example.id}")
            with_gold = chance.random() < self.config.gold_share
            relevant = [nodes[name] for name in distinct_ids(example.relevant_ids, same)]
            gold = relevant[:top_k] if with_gold else []
            distractors = [item.node for item in scored if item.node.id not in never]
            context = gold + distractors[: top_k - len(gold)]
            chance.shuffle(context)
            result.append(Context(example, context))
        return result

    def _counts(self) -> dict[str, Any]:
        return {**super()._counts(), "without_relevant_ids": self._left_out}
