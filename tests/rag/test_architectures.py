"""Every causal architecture of transformers: a single forward, scoring, training and generation agree."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import data_rows
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fedrag_cli.config import PromptConfig
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.errors import ModelError
from fedrag_cli.rag.build import build_knowledge_store
from fedrag_cli.rag.config import CausalLMConfig, SentenceTransformerConfig
from fedrag_cli.rag.generators.causal_lm import CausalLMGenerator
from fedrag_cli.rag.generators.likelihood import TokenPair
from fedrag_cli.rag.retrievers.sentence_transformer import SentenceTransformerRetriever
from fedrag_cli.rag.system import RAGSystem
from fedrag_cli.runs.reporter import SilentReporter
from fedrag_cli.trainers.config import RALTConfig
from fedrag_cli.trainers.huggingface import HuggingFaceTrainerForRALT
from fedrag_cli.trainers.huggingface.generator import AnswerInstance, answer_loss

pytestmark = pytest.mark.slow

VOCABULARY = 400
NEW_TOKENS = 4

# What a config's setting is called, in one architecture or the other, and how small it is here.
SIZES: dict[str, float] = {
    name: value
    for value, names in {
        VOCABULARY: "vocab_size vocab_size_per_layer_input unpadded_vocab_size encoder_hash_byte_group_vocab",
        32: "hidden_size d_model n_embd embedding_size embedding_dim word_embed_proj_dim attention_hidden_size "
        "lru_width hidden_size_per_layer_input hidden_size_global ple_embed_dim",
        64: "intermediate_size ffn_dim d_ff dff n_inner ffn_hidden_size decoder_ffn_dim encoder_ffn_dim dim_ff "
        "mamba_d_ssm",
        4: "num_attention_heads n_head num_heads n_heads decoder_attention_heads encoder_attention_heads "
        "swa_num_attention_heads linear_num_value_heads mamba_num_heads linear_num_heads mamba_n_heads num_experts "
        "n_routed_experts num_local_experts moe_num_experts",
        2: "num_key_value_heads num_kv_heads kv_n_heads swa_num_key_value_heads linear_num_key_heads index_n_heads "
        "num_experts_per_tok moe_topk moe_k moe_top_k num_experts_per_token top_k_experts zero_expert_num "
        "num_hidden_layers n_layer n_layers num_layers num_blocks decoder_layers encoder_layers depth",
        8: "head_dim swa_head_dim qk_rope_head_dim kv_channels attention_head_size linear_key_head_dim "
        "linear_value_head_dim dim_head index_head_dim linear_head_dim d_kv global_head_dim rotary_dim head_size "
        "mamba_head_dim d_rel qk_nope_head_dim v_head_dim kv_lora_rank q_lora_rank o_lora_rank gated_norm_rank "
        "mamba_dt_rank time_step_rank mamba_d_state state_size ssm_state_size",
        16: "qk_head_dim moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size "
        "shared_intermediate_size expert_ffn_hidden_size mamba_d_head "
        # Shorter than the texts here, and longer than those that a model is tried with.
        "sliding_window sliding_window_size attention_window_size attention_chunk_size chunk_size mamba_chunk_size "
        "block_size local_attention_window_len lsh_attn_chunk_length local_attn_chunk_length",
        1: "n_group topk_group num_expert_group n_groups n_shared_experts num_shared_experts first_k_dense_replace "
        "moe_num_shared_experts mamba_n_groups bos_token_id",
        128: "max_position_embeddings n_positions max_seq_len n_ctx max_source_positions max_target_positions",
        0: "pad_token_id eos_token_id num_kv_shared_layers hidden_dropout attention_dropout dropout resid_pdrop "
        "embd_pdrop attn_pdrop hidden_dropout_prob attention_probs_dropout_prob activation_dropout embedding_dropout "
        "summary_first_dropout layerdrop decoder_layerdrop dropout_rate expert_dropout router_jitter_noise "
        "attention_dropout_prob emb_pdrop residual_dropout",
        3: "image_token_id video_token_id audio_token_id image_token_index boi_token_id eoi_token_id boa_token_id "
        "boi_token_index eoi_token_index sep_token_id decoder_start_token_id eoa_token_index forced_eos_token_id "
        "vision_start_token_id vision_end_token_id",
    }.items()
    for name in names.split()
}
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")

DECODER = {"is_decoder": True}
ENCODERS = tuple(
    """bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta
    roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod""".split()  # noqa: SIM905
)
LATENT_KEYS = tuple(
    """axk1 axk2 bailing_hybrid deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa kimi_linear longcat_flash
    minicpm3 sarvam_mla youtu dots3_note_text""".split()  # noqa: SIM905
)
ONE_KEY_A_HEAD = {"num_key_value_heads": 4}
OF_HYBRIDS = {"num_hidden_layers": 4, "attention_hidden_size": 64, "attention_head_dim": 16}
OF_HYBRIDS["layers_block_type"] = ["linear_attention", "hybrid"] * 2  # type: ignore[assignment]
INDEXER = {f"indexer_{name}": value for name, value in zip(("n_heads", "kv_heads", "head_dim"), (2, 1, 8), strict=True)}
QWEN4 = {**INDEXER, "indexer_budget": 64, "indexer_compress_ratio": 4, "output_gate_type": "sigmoid", "hc_count": 2}
ROTARY = {"rope_type": "default", "rope_theta": 10000.0}

# What an architecture needs besides, so that its sizes fit each other.
SETTINGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(ENCODERS, DECODER),
    **dict.fromkeys(LATENT_KEYS, ONE_KEY_A_HEAD),
    "bamba": {"attn_layer_indices": [1]},
    "big_bird": {**DECODER, "attention_type": "original_full"},
    "blt": {"num_hidden_layers": 2},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROTARY, "sliding_attention": ROTARY}},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 32},
    },
    "deepseek_v2": {**ONE_KEY_A_HEAD, "num_experts_per_tok": 2},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    # It masks by its window in generation only.
    "moshi": {"sliding_window": 128},
    "mpt": {"attn_config": None},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        **DECODER,
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"],
    },
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "xmod": {**DECODER, "default_language": "en_XX", "languages": ["en_XX"]},
    "zamba": OF_HYBRIDS,
    "zamba2": {
        **OF_HYBRIDS,
        "hybrid_layer_ids": [1, 3],
        "mamba_headdim": 16,
        "n_mamba_heads": 4,
        "num_query_groups": 4,
        "num_key_value_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}

REFUSED = {
    "cpmant": "is not causal",
    "gemma4_assistant": "cannot read a text by itself",
    "gemma4_unified_assistant": "cannot read a text by itself",
    "prophetnet": "is not causal",
    "reformer": "is not causal",
    "xlnet": "predicts something else for texts of different lengths together",
}
CANNOT_GENERATE = {
    "blt": "it groups bytes into patches anew at each step",
    "dory": "its cache and its loops over the layers do not fit together in transformers 5.24",
    "xlm": "it appends a mask token to what it continues",
}
NOT_MADE = {
    "dots3_note": "its vision and audio towers have sizes of their own that must fit",
    "gemma3n": "its vision tower needs the package timm",
    "musicgen": "it takes the config of its decoder, which is not the one that the mapping names",
    "musicgen_melody": "the same",
}


def shrunk(default: Any) -> dict[str, Any]:
    """Return a config's settings that make its model tiny, with a layer of each kind."""
    given = vars(default)
    count = next((given[name] for name in LAYERS if isinstance(given.get(name), int)), 0)
    by_layer = [name for name, value in given.items() if isinstance(value, list | tuple) and len(value) == count > 2]
    kinds: dict[tuple[str, ...], int] = {}
    for number in range(count):
        kinds.setdefault(
            tuple(given[name][number] for name in by_layer if isinstance(given[name][number], str)), number
        )
    chosen = sorted({*kinds.values(), 0, 1})[:4] if by_layer else []
    settings: dict[str, Any] = {}
    for name, value in given.items():
        if hasattr(value, "to_dict"):
            settings[name] = shrunk(value)
        elif name in by_layer:
            settings[name] = [value[number] for number in chosen]
        elif name in LAYERS and chosen:
            settings[name] = len(chosen)
        elif name in SIZES and value is not None and not isinstance(value, bool):
            settings[name] = type(value)(SIZES[name]) if isinstance(value, int | float) else SIZES[name]
    return settings


def tiny(kind: str, settings: dict[str, Any]) -> Any:
    config_class = CONFIG_MAPPING[kind]
    # The defaults of this one do not pass its own validation.
    values = shrunk(config_class()) if kind != "gemma4_assistant" else {}
    for name, value in settings.items():
        if isinstance(value, dict) and isinstance(values.get(name), dict):
            values[name] = {**values[name], **value}
        else:
            values[name] = value
        if value is None:
            del values[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**values))
    model.generation_config = GenerationConfig()
    with torch.no_grad():
        # The padding's row is zero at first, of which the gradient in Gemma 3n is not finite.
        model.get_input_embeddings().weight[0].normal_(0, 0.02)
        # Larger weights than the usual ones, so that what should not count would be seen.
        for parameter in model.parameters():
            if parameter.ndim > 1 and 0 < parameter.std() < 0.05:
                parameter.mul_(4.0)
    return model.eval()


@pytest.fixture(scope="module")
def trainer(models: dict[str, Path]) -> HuggingFaceTrainerForRALT:
    """Return a trainer whose generator the tests replace."""
    retriever = SentenceTransformerRetriever.from_config(
        SentenceTransformerConfig(model=str(models["retriever"])), device="cpu"
    )
    nodes = [KnowledgeNode(row["id"], row["text"]) for row in data_rows()["corpus"]]
    config = CausalLMConfig(model=str(models["generator"]), max_new_tokens=NEW_TOKENS)
    generator = CausalLMGenerator.from_config(config, prompt=PromptConfig(), device="cpu")
    store = build_knowledge_store(retriever, nodes, SilentReporter())
    rows = [{"query": "where ?", "response": "red"}]
    return HuggingFaceTrainerForRALT(RAGSystem(retriever, store, generator), rows, config=RALTConfig(lora=None))


def pairs_of_texts() -> list[TokenPair]:
    """Return prompts of many lengths with answers; some begin alike, and two are equally long."""
    numbers = random.Random(4)

    def ids(count: int) -> list[int]:
        return [numbers.randrange(100, VOCABULARY) for _ in range(count)]

    passage = ids(33)
    return [
        (passage + ids(3), ids(4)),
        (passage + ids(9), ids(2)),
        (ids(5), ids(3)),
        (ids(60), ids(1)),
        (ids(19), ids(6)),
        (ids(19), ids(6)),
    ]


@torch.no_grad()
def single(model: Any, pair: TokenPair) -> list[float]:
    """Return the log-probabilities of an answer's tokens by the plainest call of the model."""
    prompt, answer = pair
    logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    rows: list[float] = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).squeeze(1).tolist()
    return rows


@torch.no_grad()
def likeliest(model: Any, prompt: list[int], end: int) -> list[int]:
    """Return the greedy continuation of a prompt, by whole forward passes."""
    ids = list(prompt)
    for _ in range(NEW_TOKENS):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] == end:
            break
    return ids[len(prompt) :]


def generator_of(model: Any, trainer: HuggingFaceTrainerForRALT) -> CausalLMGenerator:
    given = trainer.rag_system.require_generator()
    return CausalLMGenerator(model, given.tokenizer, given.config)


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_is_refused(kind: str, trainer: HuggingFaceTrainerForRALT) -> None:
    with pytest.raises(ModelError, match="is not causal"):
        generator_of(tiny(kind, {**SETTINGS[kind], "is_decoder": False}), trainer)


@pytest.mark.parametrize("kind", sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(NOT_MADE)))
def test_scoring_training_and_generation_agree_with_a_single_forward(
    kind: str, trainer: HuggingFaceTrainerForRALT
) -> None:
    model = tiny(kind, SETTINGS.get(kind, {}))
    if kind in REFUSED:
        with pytest.raises(ModelError, match=f"The generator {type(model).__name__} {REFUSED[kind]}"):
            generator_of(model, trainer)
        return
    generator, pairs = generator_of(model, trainer), pairs_of_texts()
    trainer.rag_system.generator = generator
    expected = [single(model, pair) for pair in pairs]

    scored: dict[int, list[float]] = {}
    generator.token_log_probs_of_ids(
        pairs, lambda batch, rows: scored.update(zip(batch, (row.tolist() for row in rows), strict=True))
    )
    batched = generator._score(pairs, packing=False)
    for position, values in enumerate(expected):
        assert scored[position] == pytest.approx(values, abs=1e-4)
        assert batched[position].tolist() == pytest.approx(values, abs=1e-4)

    batch = trainer._collate([AnswerInstance(prompt, answer) for prompt, answer in pairs])
    labels = batch.pop("labels")
    model.train()
    # As transformers.Trainer does.
    model.config.use_cache = False
    loss = answer_loss(model(**batch), labels)
    assert float(loss.detach()) == pytest.approx(-sum(map(sum, expected)) / sum(map(len, expected)), abs=1e-5)
    loss.backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters() if parameter.grad is not None)
    model.eval()

    prompts = [prompt for prompt, _ in pairs]
    if kind in CANNOT_GENERATE:
        with pytest.raises(ModelError, match=f"The generator {type(model).__name__} does not generate"):
            generator.generate_from_ids(prompts)
        return
    end = generator.prompts.end_ids[-1]
    greedy = [generator.tokenizer.decode(likeliest(model, prompt, end), skip_special_tokens=True) for prompt in prompts]
    assert generator.generate_from_ids(prompts) == [text.strip() for text in greedy]
