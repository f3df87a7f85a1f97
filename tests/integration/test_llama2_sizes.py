"""Sizes of a LLaMA2 step, derived by hand from shapes, compared with the simulation."""

import pytest

from memscope import simulate
from memscope.trace import PHASES
from memscope.workload.target import find_target

TARGET = find_target("llama2")
D, LAYERS, FFN, VOCABULARY = 4096, 32, 11008, 32000
PARAMETERS = VOCABULARY * D * 2 + LAYERS * (4 * D * D + 3 * D * FFN + 2 * D) + D
TOKENS = 16
FAST = {"seq_len": str(TOKENS), "accumulation": "1"}


def trace_of(strategies="", **settings):
    config = TARGET.configure("7b", {**FAST, **settings})
    return simulate(lambda: TARGET.build(config), strategies=strategies)


@pytest.fixture(scope="module")
def plain():
    return trace_of()


@pytest.fixture(scope="module")
def lora():
    return trace_of("lora")


def test_7b_has_the_published_number_of_parameters(plain):
    assert PARAMETERS == 6_738_415_616
    assert plain.meta["parameters"] == {"total": PARAMETERS, "trainable": PARAMETERS}


def test_weights_gradients_and_adamw_state_of_7b_take_one_one_and_two_times_the_parameters(plain):
    largest = plain.max_by_category(step=1)
    assert largest["parameter"] == 4 * PARAMETERS
    assert largest["gradient"] == 4 * PARAMETERS
    assert largest["optimizer_state"] == 2 * 4 * PARAMETERS


def test_full_fine_tuning_peaks_in_the_optimizer_with_a_fifth_copy_of_the_parameters(plain):
    # foreach AdamW holds one temporary as large as all parameters (the square root of the second moments).
    assert plain.peak.phase == "optimizer"
    assert plain.by_category()["temporary"] == 4 * PARAMETERS


def activations_of_one_block(tokens, *, inner=D, feed_forward=FFN, heads=32):
    """Bytes that one layer keeps for its backward pass: eager attention, float32, micro-batch 1; each tensor once."""
    hidden, wide = tokens * inner * 4, tokens * feed_forward * 4
    scale = -(-tokens * 4 // 512) * 512  # [tokens, 1], in whole blocks of the allocator
    return (
        hidden  # input of attention_norm: kept by pow and by its product with rsqrt
        + scale  # rsqrt
        + hidden  # normalized, kept by the product with the weight
        + hidden  # weighted, input of wq, wk, wv
        + 3 * hidden  # rotated q and k, and v, kept by the two matrix products
        + heads * tokens * tokens * 4  # softmax keeps its result; so does the product with v: one storage
        + hidden  # heads joined, input of wo
        + hidden  # input of ffn_norm
        + scale
        + hidden  # normalized
        + hidden  # weighted, input of w1 and w3
        + 4 * wide  # w1's result (silu), silu's (product), w3's (product), the product (w2)
    )


def activations(trace, layer):
    """Bytes of activations made by a layer and alive when the backward pass of step 1 begins."""
    backward = trace.mark_event[(trace.mark_phase == PHASES.index("backward")) & (trace.mark_step == 1)][0]
    made = trace.by("category", "module", at=int(backward) - 1)
    return sum(size for (c, m), size in made.items() if c == "activation" and f"{m}.".startswith(f"layers.{layer}."))


def test_saved_activations_of_a_block_are_those_of_its_shapes(plain):
    # A layer's input is the output of the layer before: layer 5 makes the input of layer 6, so the sum is one layer's.
    assert activations(plain, 5) == activations_of_one_block(TOKENS)


def test_saved_activations_grow_with_the_square_of_the_length_in_the_attention_scores():
    assert activations(trace_of(seq_len="64"), 5) == activations_of_one_block(64)


def test_lora_trains_two_matrices_of_rank_16_for_each_adapted_layer(lora):
    trainable = LAYERS * 2 * (16 * D + D * 16)  # wq and wv, A [16, D] and B [D, 16]
    assert trainable == 8_388_608
    assert lora.meta["parameters"] == {"total": PARAMETERS + trainable, "trainable": trainable}
    assert lora.max_by_category(step=1)["gradient"] == 4 * trainable
    assert lora.max_by_category(step=1)["optimizer_state"] == 2 * 4 * trainable


def test_lora_leaves_the_embedding_gradient_absent(lora, plain):
    def gradient_bytes(trace):
        event = trace.step_range(1)[1] - 1
        backward = trace.mark_event[(trace.mark_phase == PHASES.index("optimizer")) & (trace.mark_step == 1)][0]
        assert event > backward
        found = trace.by("category", "module", at=int(backward) - 1)
        return found.get(("gradient", "tok_embeddings"), 0)

    assert gradient_bytes(plain) == VOCABULARY * D * 4
    assert gradient_bytes(lora) == 0


def test_amp_with_frozen_weights_keeps_a_half_precision_copy_of_every_linear_weight_for_the_backward_pass():
    trace = trace_of("lora,amp")
    linear = LAYERS * (4 * D * D + 3 * D * FFN) + VOCABULARY * D
    adapters = LAYERS * 2 * (16 * D + D * 16)
    # Nothing below the first layer is trained, so its input needs no gradient:
    # wq, wk, wv and the two A there are cast, used and dropped.
    unused = 3 * D * D + 2 * 16 * D
    assert trace.max_by_category(step=1)["weight_copy"] == 2 * (linear + adapters - unused)


def test_accumulation_holds_the_gradients_between_micro_batches(lora):
    both = trace_of("lora", accumulation="2")
    running_loss = 512  # of the micro-batches so far, a scalar in one block of the allocator
    assert both.peak.allocated_bytes - lora.peak.allocated_bytes == 4 * 8_388_608 + running_loss


def test_checkpointing_all_layers_keeps_only_their_inputs():
    trace = trace_of("ckpt")
    assert activations(trace, 5) == TOKENS * D * 4


def test_a_7b_step_has_six_floating_point_operations_for_each_weight_and_token_and_the_attention(plain):
    linear = LAYERS * (4 * D * D + 3 * D * FFN) + VOCABULARY * D
    attention = LAYERS * 2 * (2 * TOKENS * TOKENS * D)  # q·kᵀ and scores·v
    assert plain.meta["flops"][1] == 3 * (2 * linear * TOKENS + attention)
