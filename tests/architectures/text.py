"""Language models of transformers: decoders, mixtures of experts, state spaces, encoders, encoders with decoders."""

from __future__ import annotations

from typing import Any

from architectures.row import Hf, Row

__all__ = ["ENCODERS", "EXPERTS", "PAIRS", "STATES", "TEXT"]

_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BASE = {"vocab_size": 64, **_IDS}
_LLAMA = {
    **_BASE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
_BERT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
_GPT = {**_BASE, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 64,
    "decoder_start_token_id": 0,
}
_BART = {
    **_BASE, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "decoder_start_token_id": 1,
}  # fmt: skip
_BOTH = ("eager", "sdpa")
_SLICES = (
    "All sizes are equal. Where a slice is written into, a gradient of the same size is a copy (`clone`) in the "
    "simulation, and zeros that are then filled (`new_zeros`) in the run."
)
_NO_FFT = "PyTorch's Fourier transform takes no bfloat16, on a GPU either."


def _decoder(name: str, kind: str, *, both: bool = True, about: str = "", usual: Any = None, **tiny: Any) -> Row:
    values = tiny.pop("base", _LLAMA)
    how = Hf({"model_type": kind, **values, **tiny}, usual or {}, task="causal-lm")
    return Row(name, "Text", how, _BOTH if both else ("eager",), about)


TEXT = [
    _decoder("GPT-2", "gpt2", base=_GPT),
    _decoder("GPT-Neo", "gpt_neo", both=False, base=_BASE, hidden_size=32, num_layers=2, num_heads=4,
             attention_types=[[["global", "local"], 1]], max_position_embeddings=64),
    _decoder("GPT-NeoX", "gpt_neox"),
    _decoder("GPT-J", "gptj", both=False, base=_GPT, rotary_dim=4),
    _decoder("CodeGen", "codegen", both=False, base=_GPT, rotary_dim=4),
    _decoder("GPT-BigCode", "gpt_bigcode", base=_GPT),
    _decoder("OPT", "opt", base=_BASE, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=64, word_embed_proj_dim=32),
    _decoder("BLOOM", "bloom", both=False, base=_BASE, hidden_size=32, n_layer=2, n_head=4,
             usual={"hidden_size": 1024, "n_layer": 24, "n_head": 16}, about="usual size: bloom-560m"),
    _decoder("Falcon", "falcon", base=_BASE, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    _decoder("MPT", "mpt", both=False, base=_BASE, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    _decoder("Llama", "llama"),
    _decoder("Mistral", "mistral", head_dim=8),
    _decoder("Ministral", "ministral", head_dim=8, usual={"head_dim": 128}),
    _decoder("Qwen2", "qwen2"),
    _decoder("Qwen3", "qwen3", head_dim=8),
    _decoder("Gemma", "gemma", head_dim=8),
    _decoder("Gemma 2", "gemma2", both=False, head_dim=8, query_pre_attn_scalar=8),
    _decoder("Gemma 3", "gemma3_text", head_dim=8, query_pre_attn_scalar=8),
    _decoder("Phi", "phi"),
    _decoder("Phi-3", "phi3"),
    _decoder("StableLM", "stablelm"),
    _decoder("Cohere", "cohere"),
    _decoder("OLMo", "olmo"),
    _decoder("OLMo 2", "olmo2"),
    _decoder("StarCoder2", "starcoder2"),
    _decoder("Granite", "granite"),
    _decoder("Nemotron", "nemotron", usual={"num_key_value_heads": 48, "head_dim": 128}),
    _decoder("GLM", "glm", head_dim=8),
    _decoder("SmolLM3", "smollm3"),
]  # fmt: skip


def _experts(name: str, kind: str, *, both: bool = True, about: str = "", usual: Any = None, **tiny: Any) -> Row:
    how = Hf({"model_type": kind, **_LLAMA, **tiny}, usual or {}, task="causal-lm")
    return Row(name, "Mixtures of experts", how, _BOTH if both else ("eager",), about)


EXPERTS = [
    _experts("Mixtral", "mixtral", num_local_experts=4, num_experts_per_tok=2, head_dim=8),
    _experts("Qwen3-MoE", "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8),
    _experts("OLMoE", "olmoe", num_experts=4, num_experts_per_tok=2),
    _experts("DeepSeek-V3", "deepseek_v3", num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
             qk_nope_head_dim=8, v_head_dim=8, moe_intermediate_size=16, n_routed_experts=8, n_group=2, topk_group=1,
             num_experts_per_tok=2, first_k_dense_replace=1,
             usual={"num_hidden_layers": 8}, about="usual size: 8 of its 61 layers"),
    _experts("gpt-oss", "gpt_oss", both=False, num_local_experts=4, num_experts_per_tok=2, head_dim=8,
             sliding_window=8),
    _experts("Granite-MoE", "granitemoe", num_local_experts=4, num_experts_per_tok=2),
    _experts("Jamba", "jamba", num_experts=4, num_experts_per_tok=2, attn_layer_period=2, attn_layer_offset=1,
             expert_layer_period=2, expert_layer_offset=1, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False,
             usual={"num_hidden_layers": 8, "use_mamba_kernels": False}, about="usual size: 8 of its 32 layers"),
]  # fmt: skip


def _states(name: str, kind: str, *, about: str = "", usual: Any = None, settings: Any = None, **tiny: Any) -> Row:
    how = Hf({"model_type": kind, **_BASE, **tiny}, usual or {}, usual_settings=settings or {}, task="causal-lm")
    return Row(name, "State space and recurrent", how, (), about)


STATES = [
    _states("Mamba", "mamba", hidden_size=32, state_size=4, num_hidden_layers=2, time_step_rank=4,
            settings={"seq_len": 64}, about="one operator per token: 64 tokens"),
    _states("Mamba-2", "mamba2", hidden_size=32, state_size=4, num_hidden_layers=2, head_dim=8, num_heads=8, n_groups=2,
            chunk_size=8, usual={"hidden_size": 2048, "num_heads": 64}, about="usual size: mamba2-1.3b's widths"),
    _states("Falcon-Mamba", "falcon_mamba", hidden_size=32, state_size=4, num_hidden_layers=2, time_step_rank=4,
            settings={"seq_len": 64}, about="one operator per token: 64 tokens"),
    _states("RWKV", "rwkv", hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, intermediate_size=64,
            context_length=64, settings={"seq_len": 64}, about="one operator per token: 64 tokens"),
    _states("RecurrentGemma", "recurrent_gemma", hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
            intermediate_size=96, lru_width=32, attention_window_size=8),
]  # fmt: skip


def _encoder(
    name: str,
    kind: str,
    *,
    both: bool = True,
    about: str = "",
    why: str = "",
    usual: Any = None,
    seq_len: int = 512,
    **tiny: Any,
) -> Row:
    values = tiny.pop("base", _BERT)
    how = Hf({"model_type": kind, **values, **tiny}, usual or {}, usual_settings={"seq_len": seq_len}, task="masked-lm")
    return Row(name, "Encoders", how, _BOTH if both else ("eager",), about, why)


ENCODERS = [
    _encoder("BERT", "bert"),
    _encoder("RoBERTa", "roberta", usual={"vocab_size": 50265, "max_position_embeddings": 514}, pad_token_id=1),
    _encoder("XLM-R", "xlm-roberta", usual={"vocab_size": 250002, "max_position_embeddings": 514}, pad_token_id=1),
    _encoder("DistilBERT", "distilbert", base={"vocab_size": 64}, dim=32, n_layers=2, n_heads=4, hidden_dim=48,
             max_position_embeddings=64),
    _encoder("ELECTRA", "electra", embedding_size=16),
    _encoder("ALBERT", "albert", embedding_size=16),
    _encoder("DeBERTa-v2", "deberta-v2", both=False, relative_attention=True, pos_att_type=["p2c", "c2p"],
             usual={"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12, "intermediate_size": 3072,
                    "relative_attention": True, "position_buckets": 256, "pos_att_type": ["p2c", "c2p"],
                    "norm_rel_ebd": "layer_norm", "share_att_key": True, "position_biased_input": False},
             about="usual size: deberta-v3-base"),
    _encoder("ModernBERT", "modernbert", pad_token_id=0, global_attn_every_n_layers=2, local_attention=8),
    _encoder("MPNet", "mpnet", both=False, usual={"max_position_embeddings": 514}, pad_token_id=1),
    _encoder("Longformer", "longformer", both=False, why=_SLICES, attention_window=4, pad_token_id=1, seq_len=1024,
             usual={"max_position_embeddings": 4098, "vocab_size": 50265}),
    _encoder("BigBird", "big_bird", both=False, block_size=2, num_random_blocks=1, attention_type="original_full",
             usual={"attention_type": "original_full"}, about="full attention, as it takes below 704 tokens"),
    _encoder("FNet", "fnet", both=False, why=_NO_FFT),
    _encoder("SqueezeBERT", "squeezebert", both=False, embedding_size=32),
]  # fmt: skip


def _pair(
    name: str, kind: str, *, both: bool = True, about: str = "", why: str = "", usual: Any = None, **tiny: Any
) -> Row:
    values = tiny.pop("base", _BART)
    start = {"decoder_start_token_id": 0} if values is _T5 else {}  # as in their published configurations
    how = Hf({"model_type": kind, **values, **tiny}, {**start, **(usual or {})}, task="seq2seq")
    return Row(name, "Encoders with decoders", how, _BOTH if both else ("eager",), about, why)


PAIRS = [
    _pair("T5", "t5", base=_T5),
    _pair("mT5", "mt5", base=_T5),
    _pair("LongT5", "longt5", base=_T5, local_radius=3, both=False),
    _pair("BART", "bart", forced_eos_token_id=2),
    _pair("mBART", "mbart", forced_eos_token_id=2),
    _pair("Pegasus", "pegasus", forced_eos_token_id=2),
    _pair("Marian", "marian", forced_eos_token_id=2),
    _pair("M2M-100", "m2m_100", encoder_layerdrop=0, decoder_layerdrop=0,
          usual={"encoder_layerdrop": 0, "decoder_layerdrop": 0}, about="without dropped layers, which are random"),
    _pair("LED", "led", why=_SLICES, base={key: _BART[key] for key in _BART if key != "max_position_embeddings"},
          max_encoder_position_embeddings=64, max_decoder_position_embeddings=64, attention_window=4, both=False),
]  # fmt: skip
