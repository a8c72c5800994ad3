"""Tiny random models of many architectures: two layers, a few thousand weights, a vocabulary of bytes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

__all__ = ["ARCHITECTURES", "END", "MORE", "REFUSED", "STATEFUL", "build_model"]

END = 257
WINDOW = 24
HALF_SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
ALL_SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention"] * 2}
EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
MANY_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
ROUTED: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "head_dim": 8,
}
"""Multi-head latent attention: values are narrower than keys."""
LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
MAMBA2: dict[str, Any] = {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 16}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16},
    "qwen2": {"num_attention_heads": 3, "num_key_value_heads": 1},
    "qwen3": {"head_dim": 16},
    "mistral": {"head_dim": 16, "sliding_window": WINDOW},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 16, **HALF_SLIDING},
    "phi3": {"num_attention_heads": 3, "num_key_value_heads": 1},
    "mixtral": {"head_dim": 16, **EXPERTS},
    "gemma2": {"head_dim": 16, "attn_logit_softcapping": 2.0, **HALF_SLIDING},
    "gpt_oss": {
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        **EXPERTS,
        **HALF_SLIDING,
    },
}
"""One of each kind of attention; every test of the engine's own work runs on them."""

MORE: dict[str, dict[str, Any]] = {
    "afmoe": {"head_dim": 16, **MANY_EXPERTS, **HALF_SLIDING},
    "bitnet": {},
    "cohere2": HALF_SLIDING,
    "cwm": {"head_dim": 16, "bos_token_id": 1, **HALF_SLIDING},
    "deepseek_v3": {**LATENT, **ROUTED},
    "ernie4_5": {"head_dim": 16},
    "exaone4": {"head_dim": 16, **HALF_SLIDING},
    "glm4": {"head_dim": 16, "partial_rotary_factor": 0.5},
    "glm4_moe": {"head_dim": 16, **ROUTED},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": {},
    "granite": {"logits_scaling": 2.0, "residual_multiplier": 0.5},
    "helium": {"head_dim": 12},
    "hunyuan_v1_dense": {"head_dim": 16},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "mimo_v2_flash": {"head_dim": 16, "v_head_dim": 12, **ROUTED, **HALF_SLIDING},
    "nanochat": {},
    "olmo2": {},
    "olmo3": {**HALF_SLIDING},
    "olmoe": MANY_EXPERTS,
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 48},
    "persimmon": {},
    "phi": {"partial_rotary_factor": 0.5},
    "phimoe": {"sliding_window": WINDOW, **EXPERTS},
    "qwen2-sliding": {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1, **HALF_SLIDING},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2_moe": {"use_sliding_window": True, "max_window_layers": 0, **MANY_EXPERTS, **ALL_SLIDING},
    "qwen3_moe": {"head_dim": 16, **MANY_EXPERTS},
    "seed_oss": {"head_dim": 16},
    "smollm3": {"no_rope_layers": [1, 0]},
    "starcoder2": {"sliding_window": WINDOW},
}

STATEFUL: dict[str, dict[str, Any]] = {
    "bamba": {**MAMBA2, "attn_layer_indices": [1], "partial_rotary_factor": 0.5},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "mamba_d_state": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 6, "head_dim": 16, "n_groups": 1, "state_size": 16},
    "qwen3_5_text": {"head_dim": 16, **LINEAR},
    "qwen3_next": {"head_dim": 16, **MANY_EXPERTS, **LINEAR},
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "lru_width": 48,
        "attention_window_size": WINDOW,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "rwkv": {},
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"],
        "n_mamba_heads": 6,
        "mamba_ngroups": 1,
        "mamba_d_state": 16,
        "num_mem_blocks": 1,
        "adapter_rank": 8,
    },
}
"""Layers that cannot forget a token again."""

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": ({}, "gives other logits over our KV"),
    "diffllama": ({"head_dim": 12}, "gives other logits over our KV"),
    "doge": ({}, "mask=True"),
    "falcon": ({"alibi": True}, "gives other logits over our KV"),
    "gpt_neo": (
        {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
        "gives other logits over our KV",
    ),
    "llama4_text": ({"head_dim": 16, **EXPERTS, "attention_chunk_size": WINDOW}, "chunked_attention layers"),
    "mpt": ({}, "gives other logits over our KV"),
    "stablelm": ({"partial_rotary_factor": 0.5}, "asks for attention that this engine does not serve"),
}
"""What the engine must notice and refuse rather than serve wrongly, and what it then says."""


def build_model(name: str, seed: int = 1) -> PreTrainedModel:
    """The same weights for the same name and seed."""
    tables = ARCHITECTURES | MORE | STATEFUL | {refused: extra for refused, (extra, _) in REFUSED.items()}
    options = {
        "model_type": name,
        "vocab_size": 258,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": END,
        "pad_token_id": 0,
        **tables[name],
    }
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    torch.manual_seed(seed)
    auto: Any = AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(config).eval()
    for module in model.modules():
        sinks = getattr(module, "sinks", None)
        if sinks is not None:
            torch.nn.init.normal_(sinks, std=1.0)
    if name not in ARCHITECTURES:  # as they are initialised many say the same token for ever
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.data.mul_(12.0)
    return model
