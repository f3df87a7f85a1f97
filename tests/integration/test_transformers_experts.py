"""Mixtures of experts of transformers are simulated as they run, also where tokens choose the experts."""

from __future__ import annotations

import pytest
import torch

from memscope import Workload, record, simulate
from memscope.trace import CATEGORIES, PHASES

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
if not hasattr(torch.nn.functional, "grouped_mm"):
    pytest.skip("grouped products of any dtype need PyTorch 2.10", allow_module_level=True)

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 4, "num_experts_per_tok": 2,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "moe_intermediate_size": 32, "n_routed_experts": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 0,
}  # fmt: skip
MODELS = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 32, "head_dim": 8},
    "DeepseekV3": LATENT,
}


def build(name, **more):
    def made():
        config = getattr(transformers, f"{name}Config")(**SMALL, **MODELS[name], **more)
        ids = torch.arange(32).view(2, 16)
        return Workload(
            model=getattr(transformers, f"{name}ForCausalLM")(config),
            batches=[{"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}],
            loss=lambda model, batch: model(**batch).loss,
            optimizer_factory=torch.optim.AdamW,
        )

    return made


def rows(trace):
    names = ["brought" if name in ("aten.clone.default", "aten.empty_strided.default") else name for name in trace.ops]
    return [
        (names[op], size, CATEGORIES[category], PHASES[phase], trace.modules[module])
        for op, size, category, phase, module in zip(
            trace.op, trace.requested.tolist(), trace.category, trace.phase, trace.module, strict=True
        )
    ]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_experts_allocates_what_a_run_does(name):
    simulated = simulate(build(name), device="cpu")
    assert rows(simulated) == rows(record(build(name)))
    assert simulated.meta["assumptions"] == []  # one product for all experts: no size depends on their choice


def test_a_loop_over_experts_assumes_equal_shares_and_says_so():
    trace = simulate(build("Mixtral", experts_implementation="eager"), device="a100-80gb")
    (assumption,) = trace.meta["assumptions"]
    assert assumption["what"] == "the choices of torch.topk"
    assert assumption["value"] == "each of 4 equally often"
    # 32 tokens choose 2 of 4 experts: 16 rows of 32 floats for each expert, in each of two steps.
    gathered = trace.requested[(trace.op == trace.ops.index("aten.index.Tensor")) & (trace.requested == 16 * 32 * 4)]
    assert len(gathered) >= 2 * 4
