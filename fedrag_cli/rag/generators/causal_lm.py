"""A causal language model of transformers as the generator."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
)

from fedrag_cli.config import PromptConfig
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import DataError, ModelError
from fedrag_cli.losses import ensemble_log_probs
from fedrag_cli.rag.config import CausalLMConfig
from fedrag_cli.rag.generators.base import EncodedPrompt, OnTexts, OnTokenLogProbs, TokenPair, TrainableGenerator
from fedrag_cli.rag.generators.likelihood import (
    alike,
    all_log_probs,
    base_model,
    can_pack,
    length_sorted_batches,
    packed_log_probs,
    packs,
    padded,
    padding_rule,
    stretched_beyond,
    token_log_probs,
    trial_ids,
)
from fedrag_cli.rag.lengths import Lengths
from fedrag_cli.rag.models import (
    FingerprintMemory,
    ModelLocation,
    choose_device,
    choose_dtype,
    has_fast_bfloat16,
    locate_model,
    model_errors,
    placement_note,
    placement_options,
    require_bfloat16,
    require_vocabulary,
    settled,
)
from fedrag_cli.rag.prompts import PromptEncoder, token_limit

Together = Literal["ragged", "equal", "single"]
"""Which prompts a model answers together as each alone: all, those of the same length, or none."""
MOST_SAMPLED = 50


class EnsembleChooser(LogitsProcessor):
    """Chooses the next token of each group of rows by the weighted sum of their probabilities.

    Source: Shi et al., "REPLUG" (arXiv 2301.12652, equation 2); Lin et al., "RA-DIT" (arXiv 2310.01352, equation 2).
    """

    def __init__(self, log_weights: Sequence[Tensor], temperature: float) -> None:
        """Take the log-weights of each group's rows; a temperature above 0 samples among the 50 likeliest tokens."""
        self.log_weights = log_weights
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores, of shape (rows, vocabulary), that leave each row the token of its group alone."""
        log_probs = torch.log_softmax(scores.float(), dim=-1)
        chosen = torch.full_like(scores, -torch.inf)
        start = 0
        for weights in self.log_weights:
            rows = slice(start, start + len(weights))
            mixture = ensemble_log_probs(weights.to(scores.device), log_probs[rows])
            chosen[rows, self._choose(mixture)] = 0.0
            start += len(weights)
        return chosen

    def _choose(self, mixture: Tensor) -> int:
        if self.temperature == 0:
            return int(mixture.argmax())
        best = torch.topk(mixture, min(MOST_SAMPLED, len(mixture)))
        drawn = torch.multinomial(torch.softmax(best.values / self.temperature, dim=-1), 1)
        return int(best.indices[drawn])


class CausalLMGenerator(TrainableGenerator):
    """Answers queries from passages, and scores answers.

    Args:
        model: A `PreTrainedModel` for causal language modelling, or a `PeftModel` around one.
        tokenizer: Its tokenizer.
        config: Generation settings.
        prompt: How prompts are written.
        seed: Seed of sampling, where the temperature is above 0.

    Raises:
        ModelError: The model is not causal, or needs more than token ids.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        config: CausalLMConfig | None = None,
        prompt: PromptConfig | None = None,
        seed: int = 42,
    ) -> None:
        """Put the model in eval mode, choose a padding token and find out how the model takes padding."""
        self.model = model.eval()
        self.seed = seed
        self._fingerprint_memory = FingerprintMemory()
        self.tokenizer = tokenizer
        self.config = config or CausalLMConfig(model=str(getattr(model, "name_or_path", "") or "model"))
        self.context_window = token_limit(model.config, tokenizer, self.config.context_window)
        self.prompts = PromptEncoder(tokenizer, prompt or PromptConfig(), self.context_window)
        end = self.prompts.end_ids[-1]
        self.pad_id = int(tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else end
        self.padding_rule = padding_rule(self.model, self.pad_id)
        self._together: Together | None = None

    @classmethod
    def from_config(
        cls, config: CausalLMConfig, *, prompt: PromptConfig, device: str = "auto", seed: int = 42
    ) -> CausalLMGenerator:
        """Load model and tokenizer; raises ModelError or ConfigError where that cannot be done on the device."""
        location = locate_model(config.model)
        target = choose_device(device)
        dtype = choose_dtype(config.dtype, target, small=False, setting="rag_system.generator.dtype")
        if config.precision == "bfloat16":
            require_bfloat16(target, "rag_system.generator.precision")
        placement = placement_options(config, location, target)
        # Left out, transformers would ask on stdin whether to run a model's own code.
        options: dict[str, Any] = {"local_files_only": location.is_local, "trust_remote_code": config.trust_remote_code}
        options |= {"gguf_file": location.gguf_file} if location.gguf_file is not None else {}
        options |= {"revision": config.revision} if config.revision is not None else {}
        with model_errors(location, "generator"):
            tokenizer = AutoTokenizer.from_pretrained(location.name_or_path, **options)
            require_vocabulary(tokenizer)
            model = AutoModelForCausalLM.from_pretrained(location.name_or_path, dtype=dtype, **options, **placement)
            if location.gguf_file:
                model = _without_quantizer(model)
            model = settled(model, location) if placement else model.to(target)
        if config.adapter is not None:
            model = _with_adapter(model, config.adapter)
        generator = cls(model, tokenizer, config, prompt, seed)
        generator.notes = tuple(filter(None, [placement_note(config, model)]))
        return generator

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def computes_in_bfloat16(self) -> bool:
        """Whether matrix products are computed in bfloat16, whatever the weights' format is."""
        if self.config.precision == "fast":
            return has_fast_bfloat16(self.device)
        return self.config.precision == "bfloat16"

    @property
    def scoring_settings(self) -> list[Any]:
        """The batches, in which sums are rounded in another order, and the precision."""
        return [self.config.batch_tokens, self.computes_in_bfloat16]

    def with_model(self, model: Any) -> CausalLMGenerator:
        """Return a generator with the same tokenizer and settings around another model of the same kind."""
        return CausalLMGenerator(model, self.tokenizer, self.config, self.prompts.config, self.seed)

    def fingerprint(self) -> str:
        """Return a hash of the weights as they are now, adapters included."""
        return self._fingerprint_memory.fingerprint(self.model)

    def save(self, directory: Path) -> None:
        """Write model (or adapter) and tokenizer, loadable by `from_pretrained`, weights as safetensors."""
        self.model.save_pretrained(directory)
        self.tokenizer.save_pretrained(directory)

    def require_fields(self, passages: Iterable[KnowledgeNode]) -> None:
        """See `PassageFormat.require_fields`."""
        self.prompts.passages.require_fields(passages)

    def context(self, passages: Sequence[KnowledgeNode]) -> str:
        """See `PromptEncoder.context`."""
        return self.prompts.context(passages)

    def encode_prompt(self, query: str, passages: Sequence[KnowledgeNode]) -> EncodedPrompt:
        """Write a prompt that leaves room for an answer of `max_new_tokens`."""
        return self.prompts.encode_prompt(query, passages, reserved_tokens=self.config.max_new_tokens)

    def encode_pair(
        self, query: str, passages: Sequence[KnowledgeNode], answer: str, *, with_end: bool = True
    ) -> EncodedPrompt:
        """See `PromptEncoder.encode_pair`."""
        return self.prompts.encode_pair(query, passages, answer, with_end=with_end)

    def measure(self, kind: str, counts: Mapping[str, int]) -> Lengths:
        """Say how much of prompts did not fit into the context window, and what to do about it."""
        most = token_limit(self.model.config, self.tokenizer, None)
        raising = (
            f"Raise rag_system.generator.context_window to at most {most}, or lower"
            if most > self.context_window
            else "Lower"
        )
        advice = f"{raising} top_k or rag_system.generator.max_new_tokens, or split the passages smaller."
        return dataclasses.replace(super().measure(kind, counts), limit=self.context_window, advice=advice)

    # Answers

    def answer(self, prompts: Sequence[EncodedPrompt], on_batch: OnTexts | None = None) -> list[str]:
        """Answer prompts; see `generate_from_ids`."""
        return self.generate_from_ids([prompt.ids for prompt in prompts], on_batch)

    def answer_ensemble(
        self,
        groups: Sequence[Sequence[EncodedPrompt]],
        log_weights: Sequence[Tensor],
        on_batch: OnTexts | None = None,
    ) -> list[str]:
        """Answer by the weighted sum of next-token probabilities; raises ModelError where the model cannot do that."""
        return self._generate_groups([[prompt.ids for prompt in group] for group in groups], log_weights, on_batch)

    def batch_generate(self, prompts: Sequence[str]) -> list[str]:
        """Continue prompts as they are: they are the caller's own, so a control token in them is a control token."""
        return self.generate_from_ids([self._prompt_ids(prompt) for prompt in prompts])

    def _prompt_ids(self, prompt: str) -> list[int]:
        return self.prompts.tokens.with_start(self.prompts.tokens.ids(prompt))

    def generate_from_ids(self, prompts: Sequence[list[int]], on_batch: OnTexts | None = None) -> list[str]:
        """Answer token ids in length-sorted batches, padded on the left where the model allows; see `answer`.

        Raises:
            DataError: A prompt has no tokens, or leaves no room for an answer in the context window.
        """
        return self._generate_groups([[prompt] for prompt in prompts], None, on_batch)

    def _generate_groups(
        self, groups: Sequence[Sequence[list[int]]], log_weights: Sequence[Tensor] | None, on_batch: OnTexts | None
    ) -> list[str]:
        """Answer each group of prompts, by the weights of its prompts where there are any."""
        self._require_room([prompt for group in groups for prompt in group])
        answers = [""] * len(groups)
        room, temperature = self.config.max_new_tokens, self.config.temperature
        lengths = [max(map(len, group)) + room for group in groups]
        with torch.random.fork_rng(enabled=temperature > 0):
            if temperature > 0:
                torch.manual_seed(self.seed)
            together = self._generates_together(max(lengths)) if groups else "ragged"
            several = [{len(prompt) for prompt in group} for group in groups if len(group) > 1]
            if several and (together == "single" or (together == "equal" and max(map(len, several)) > 1)):
                raise ModelError(
                    f"The generator {type(base_model(self.model)).__name__} cannot answer from several prompts at "
                    "once: they change each other's answers.",
                    "Set rag_system.inference: concat, or use another generator.",
                )
            alone = together == "single" or (together == "equal" and several)
            sizes = [len(group) * length for group, length in zip(groups, lengths, strict=True)]
            budget = 1 if alone else self.config.batch_tokens
            for batch in length_sorted_batches(sizes, budget, equal=together == "equal"):
                chooser = EnsembleChooser([log_weights[n] for n in batch], temperature) if log_weights else None
                texts = self.generate_batch([prompt for n in batch for prompt in groups[n]], chooser)
                # All rows of a group have the same answer.
                firsts = accumulate((len(groups[n]) for n in batch[:-1]), initial=0)
                found = [texts[first] for first in firsts]
                for position, text in zip(batch, found, strict=True):
                    answers[position] = text
                if on_batch is not None:
                    on_batch(batch, found)
        return answers

    def _require_room(self, prompts: Sequence[list[int]]) -> None:
        for row, prompt in enumerate(prompts):
            if not prompt:
                raise DataError(f"Prompt {row} has no tokens.", "Remove empty prompts.")
            if len(prompt) + self.config.max_new_tokens > self.context_window:
                raise DataError(
                    f"Prompt {row} has {len(prompt)} tokens and the answer needs {self.config.max_new_tokens}, "
                    f"but the context window has {self.context_window}.",
                    "Shorten the prompt, or lower rag_system.generator.max_new_tokens.",
                )

    @torch.inference_mode()
    def generate_batch(self, prompts: Sequence[list[int]], chooser: LogitsProcessor | None = None) -> list[str]:
        """Answer token ids in one batch; a chooser takes over which tokens come next, by leaving each row one alone."""
        options: dict[str, Any] = {"do_sample": True, "temperature": self.config.temperature}
        if self.config.temperature == 0 or chooser is not None:
            # Transformers fills what is left out from the model's own settings, such as a penalty for repetition.
            options = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
        own_end = self.tokenizer.eos_token_id
        ends = {self.prompts.end_ids[-1], *([own_end] if isinstance(own_end, int) else own_end or [])}
        config = GenerationConfig(
            max_new_tokens=self.config.max_new_tokens, pad_token_id=self.pad_id, eos_token_id=sorted(ends), **options
        )
        with self._autocast():
            output = self._generate(prompts, config, chooser)
        width = max(len(prompt) for prompt in prompts)
        texts: list[str] = self.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _generate(
        self, prompts: Sequence[list[int]], config: GenerationConfig, chooser: LogitsProcessor | None = None
    ) -> Any:
        """Continue tokenised prompts and return what the model's `generate` gives."""
        self.model.eval()
        input_ids, mask, _ = padded([(prompt, []) for prompt in prompts], self.pad_id, "left")
        # Transformers counts positions from 0 where it is not given any, in RoBERTa and its kin too.
        positions = self.padding_rule.positions(mask) if self.padding_rule.first_position else {}
        return self.model.generate(
            input_ids=input_ids.to(self.device),
            attention_mask=mask.to(self.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([chooser] if chooser is not None else []),
            **{name: value.to(self.device) for name, value in positions.items()},
        )

    def _generates_together(self, longest: int) -> Together:
        """Return which prompts get the answers that they get alone, with `longest` tokens at most; tried once.

        Raises:
            ModelError: The model does not generate what its forward pass says.
        """
        if self._together is None:
            self._together = self._try_generation()
        return "equal" if self._together == "ragged" and self._stretches(longest) else self._together

    @torch.inference_mode()
    def _try_generation(self) -> Together:
        long = trial_ids(self.model)
        if self.padding_rule.on_left and self._generates_as_it_reads([long[:11], long]):
            return "ragged"
        if self._generates_as_it_reads([long[:8], long[8:]]):
            return "equal"
        if self._generates_as_it_reads([long], slack=3):
            return "single"
        raise ModelError(
            f"The generator {type(base_model(self.model)).__name__} does not generate what its forward pass predicts.",
            "Use another model, or an objective and metrics that need no generated answers.",
        )

    def _generates_as_it_reads(self, prompts: Sequence[list[int]], slack: float = 1) -> bool:
        count = 3
        config = GenerationConfig(
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            num_beams=1,
            pad_token_id=self.pad_id,
            eos_token_id=self.prompts.end_ids[-1],
            output_logits=True,
            return_dict_in_generate=True,
        )
        try:
            output = self._generate(prompts, config)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError):
            return False
        answers = output.sequences[:, -count:].tolist()
        found = torch.stack(output.logits, dim=1).float().log_softmax(dim=-1)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            expected = all_log_probs(self.model, torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
            if not alike(self.model, found[row], expected, slack):
                return False
        return True

    def _stretches(self, longest: int) -> bool:
        """Return whether the rotary positions of a batch depend on its longest row."""
        limit = stretched_beyond(self.model)
        return limit is not None and longest > limit

    # Likelihoods

    def target_log_probs(self, prompts: Sequence[str], targets: Sequence[str]) -> Tensor:
        """Return log p(target | prompt), summed over the target's tokens, for each row.

        Prompt and target are tokenised together; see `TextTokens.pair` for where the target begins.

        Args:
            prompts: Texts used as they are, without template; a control token in them is a control token.
            targets: Texts to score, used as they are.

        Returns:
            float32 tensor of shape (len(prompts),).

        Raises:
            DataError: A target has no tokens, the lists differ in length, or a row exceeds the context window.
        """
        if len(prompts) != len(targets):
            raise DataError(f"There are {len(prompts)} prompts but {len(targets)} targets.")
        tokens = self.prompts.tokens
        pairs = [tokens.pair(prompt, "", target) for prompt, target in zip(prompts, targets, strict=True)]
        return self.log_probs_of_ids([(tokens.with_start(prompt), target) for prompt, target in pairs])

    def token_log_probs_of_ids(self, pairs: Sequence[TokenPair], on_batch: OnTokenLogProbs) -> None:
        """Compute log p(token | prompt, tokens before it) of each target, in eval mode, in batches of a token budget.

        Where the model allows, what prompts of a batch have in common at their beginning is computed once.
        """
        for row, (prompt, target) in enumerate(pairs):
            if not prompt or not target:
                raise DataError(f"Row {row} has no {'prompt' if not prompt else 'target'} tokens to score.")
            if len(prompt) + len(target) > self.context_window:
                raise DataError(
                    f"Row {row} has {len(prompt) + len(target)} tokens, "
                    f"but the context window has {self.context_window}."
                )
        lengths = [len(prompt) + len(target) for prompt, target in pairs]
        longest = max(lengths, default=0)
        budget = self.config.batch_tokens
        with self._evaluating():
            packing = longest > 0 and can_pack(self.model, longest, self.padding_rule.first_position)
        batches = (
            packs(pairs, budget) if packing else length_sorted_batches(lengths, budget, equal=self._stretches(longest))
        )
        for batch in batches:
            rows = self._score([pairs[position] for position in batch], packing)
            on_batch(batch, [row.cpu() for row in rows])

    def _score(self, pairs: Sequence[TokenPair], packing: bool) -> list[Tensor]:
        with self._evaluating(), self._autocast():
            if packing:
                return packed_log_probs(self.model, pairs, self.padding_rule.first_position or 0)
            return token_log_probs(self.model, pairs, pad_id=self.pad_id)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                yield
        finally:
            self.model.train(was_training)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.computes_in_bfloat16)


def _without_quantizer(model: Any) -> Any:
    """Forget that a GGUF file was quantised: its weights are plain tensors now, and would not be saved otherwise."""
    for name in ("hf_quantizer", "quantization_method", "is_quantized"):
        vars(model).pop(name, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model


def _with_adapter(model: Any, adapter: str) -> Any:
    from peft import PeftModel

    with model_errors(ModelLocation(adapter, adapter), "adapter"):
        if not (Path(adapter) / "adapter_config.json").is_file():
            raise ModelError(
                f"'{adapter}' holds no LoRA adapter (adapter_config.json is missing).",
                "Give the folder of a saved adapter.",
            )
        return PeftModel.from_pretrained(model, adapter, is_trainable=True)
