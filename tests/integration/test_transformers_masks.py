"""Attention masks in transformers: a mask of ones is dropped, as in a real run, and the fast attention kernel stays."""

from __future__ import annotations

import pytest
import torch

from memscope import Workload, record, simulate

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

BATCH, TOKENS = 4, 256
MASK_BYTES = BATCH * TOKENS * 8
ONES = torch.ones(BATCH, TOKENS, dtype=torch.int64)
PADDED = torch.where(torch.arange(TOKENS) < torch.tensor([[TOKENS], [TOKENS], [200], [TOKENS]]), 1, 0)


def build(mask: torch.Tensor | None, use_cache: bool = True) -> Workload:
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_cache=use_cache, attn_implementation="sdpa",
    )  # fmt: skip
    batch = {"input_ids": torch.zeros(BATCH, TOKENS, dtype=torch.int64)}
    batch |= {"labels": batch["input_ids"]} | ({} if mask is None else {"attention_mask": mask})
    return Workload(
        model=transformers.LlamaForCausalLM(config),
        batches=[batch],
        loss=lambda model, batch: model(**batch).loss,
        optimizer_factory=torch.optim.AdamW,
    )


def attention(trace):
    """The attention kernels that a trace shows."""
    return {op.split(".")[1] for op in trace.ops if "attention" in op and "backward" not in op}


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_mask_of_ones_leaves_the_kernel_and_adds_its_own_bytes_only(use_cache):
    without = simulate(lambda: build(None, use_cache), device="a100-40gb", strategies="amp")
    with_ones = simulate(lambda: build(ONES, use_cache), device="a100-40gb", strategies="amp")
    assert attention(without) == attention(with_ones) == {"_scaled_dot_product_flash_attention"}
    assert 0 <= with_ones.peak.allocated_bytes - without.peak.allocated_bytes <= MASK_BYTES


def test_a_mask_of_floating_point_ones_that_a_model_makes_itself_is_dropped_too():
    # modeling_bart.py makes the mask of its decoder with torch.ones(batch, seq), in float32.
    config = transformers.BartConfig(
        vocab_size=128, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, attn_implementation="sdpa",
    )  # fmt: skip
    tokens = torch.ones(BATCH, TOKENS, dtype=torch.int64)

    def build_bart() -> Workload:
        return Workload(
            model=transformers.BartForConditionalGeneration(config),
            batches=[{"input_ids": tokens, "labels": tokens}],
            loss=lambda model, batch: model(**batch).loss,
            optimizer_factory=torch.optim.AdamW,
        )

    trace = simulate(build_bart, device="a100-40gb", strategies="amp")
    assert attention(trace) == {"_scaled_dot_product_flash_attention"}


def test_a_mask_with_padding_takes_the_kernel_that_accepts_masks():
    padded = simulate(lambda: build(PADDED), device="a100-40gb", strategies="amp")
    assert attention(padded) == {"_scaled_dot_product_efficient_attention"}


@pytest.mark.parametrize("mask", [None, ONES, PADDED], ids=["none", "ones", "padded"])
def test_the_allocations_of_a_simulated_cpu_are_those_of_a_real_run(mask):
    simulated, real = simulate(lambda: build(mask), device="cpu"), record(lambda: build(mask))
    assert simulated.requested.tolist() == real.requested.tolist()
    assert [simulated.modules[i] for i in simulated.module] == [real.modules[i] for i in real.module]
    assert attention(simulated) == attention(real)
