"""The LLaMA2 architecture: its shapes, its arithmetic and its masks."""

from __future__ import annotations

import dataclasses
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from memscope.targets.llama2 import alpaca
from memscope.targets.llama2.alpaca import Sample
from memscope.targets.llama2.model import Architecture, Llama, RMSNorm, repeat_kv, rotate, rotations, stretched
from memscope.targets.llama2.target import PRESETS, Config, build
from memscope.workload.micro_batches import micro_batches
from memscope.workload.step import Training, run_step

SMALL = Config(
    dim=32, n_layers=2, n_heads=4, vocab_size=1024, multiple_of=8, max_seq_len=512, dtype="fp64", accumulation=4
)


def small_model(seed: int = 0, **changes: Any) -> Llama:
    torch.manual_seed(seed)
    return Llama(dataclasses.replace(SMALL, **changes).architecture)


def token_ids(batch: int, seq: int) -> Tensor:
    return torch.randint(0, SMALL.vocab_size, (batch, seq), generator=torch.Generator().manual_seed(1))


def on_meta(config: Config) -> Llama:
    with torch.device("meta"):
        return Llama(config.architecture)


@pytest.mark.parametrize(
    ("preset", "layers", "dim", "kv_dim", "hidden", "vocab", "total"),
    [
        ("7b", 32, 4096, 4096, 11008, 32000, 6_738_415_616),
        ("13b", 40, 5120, 5120, 13824, 32000, 13_015_864_320),
        ("70b", 80, 8192, 8 * 128, 28672, 32000, 68_976_648_192),
        ("mistral-7b", 32, 4096, 8 * 128, 14336, 32000, 7_241_732_096),
        ("llama3-8b", 32, 4096, 8 * 128, 14336, 128256, 8_030_261_248),
        ("llama3.1-8b", 32, 4096, 8 * 128, 14336, 128256, 8_030_261_248),
        ("llama3.2-1b", 16, 2048, 8 * 64, 8192, 128256, 1_235_814_400),
        ("llama3.2-3b", 28, 3072, 8 * 128, 8192, 128256, 3_212_749_824),
        ("debug", 4, 192, 192, 512, 1024, 2_164_416),
    ],
)
def test_presets_have_the_published_numbers_of_parameters(
    preset: str, layers: int, dim: int, kv_dim: int, hidden: int, vocab: int, total: int
) -> None:
    attention = 2 * dim * dim + 2 * dim * kv_dim  # wq, wo; wk, wv
    feed_forward = 3 * dim * hidden  # w1, w2, w3
    norms = 2 * dim
    tables = 1 if preset.startswith("llama3.2") else 2  # embedding and head, tied in LLaMA 3.2
    by_hand = tables * vocab * dim + layers * (attention + feed_forward + norms) + dim  # tables; layers; last norm
    assert by_hand == total
    config = dataclasses.replace(PRESETS[preset], max_seq_len=64)  # the rotary table has no parameter
    assert sum(parameter.numel() for parameter in on_meta(config).parameters()) == total


def test_the_first_preset_is_the_default() -> None:
    assert next(iter(PRESETS)) == "7b"
    assert PRESETS["7b"] == Config()


def test_state_dict_holds_metas_weights_and_nothing_else() -> None:
    block = [f"attention.w{name}" for name in "qkvo"] + [f"feed_forward.w{i}" for i in (1, 2, 3)]
    block += ["attention_norm", "ffn_norm"]
    expected = {"tok_embeddings.weight", "norm.weight", "output.weight"}
    expected |= {f"layers.{layer}.{name}.weight" for layer in range(2) for name in block}
    assert set(small_model().state_dict()) == expected


@pytest.mark.parametrize(("dtype", "expected"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_every_weight_has_the_dtype_that_was_set(dtype: str, expected: torch.dtype) -> None:
    model = small_model(dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert model(token_ids(1, 5)).dtype == torch.float32  # the logits, as in Meta's code


@pytest.mark.parametrize("n_kv_heads", [None, 2, 1])
def test_eager_and_sdpa_attention_agree(n_kv_heads: int | None) -> None:
    eager, sdpa = (small_model(n_kv_heads=n_kv_heads, attention=name) for name in ("eager", "sdpa"))
    tokens = token_ids(2, 17)
    torch.testing.assert_close(eager(tokens), sdpa(tokens), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_later_token_does_not_change_earlier_logits(attention: str) -> None:
    model = small_model(attention=attention)
    tokens = token_ids(1, 12)
    changed = tokens.clone()
    changed[0, 7] = (changed[0, 7] + 1) % SMALL.vocab_size
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-12)
    assert (before[:, 7:] - after[:, 7:]).abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_sliding_window_hides_earlier_tokens(attention: str) -> None:
    model = small_model(attention=attention, sliding_window=3, n_layers=1)
    tokens = token_ids(1, 12)
    changed = tokens.clone()
    changed[0, 4] = (changed[0, 4] + 1) % SMALL.vocab_size
    difference = (model(tokens) - model(changed)).abs().amax((0, 2))
    sees_it = [4, 5, 6]  # itself and the two after it; with one layer there is no indirect path
    assert difference[sees_it].min() > 1e-6
    difference[sees_it] = 0
    assert difference.max() < 1e-12


def test_a_window_as_long_as_the_sequence_adds_no_mask_to_sdpa() -> None:
    with Operations() as operations:
        small_model(attention="sdpa", sliding_window=5)(token_ids(1, 5))
    assert "aten::triu" not in {name for name, _ in operations.seen}


def test_a_tied_head_is_the_embedding() -> None:
    model = small_model(tied_head=True)
    assert model.output.weight is model.tok_embeddings.weight
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in small_model().parameters()) - 1024 * 32


def test_stretched_wavelengths_follow_their_turns_in_the_original_context() -> None:
    # 8192 · f / 2π turns: 16 are kept, half a turn is divided by 8, and 2.5 is halfway between 1 and 4.
    turns = torch.tensor([16.0, 2.5, 0.5])
    freqs = turns * (2 * math.pi) / 8192
    expected = freqs * torch.tensor([1.0, 0.5 + 0.5 / 8, 1 / 8])
    torch.testing.assert_close(stretched(freqs, 8.0, 1.0, 4.0, 8192), expected)


def test_grouped_heads_equal_full_heads_that_are_repeated() -> None:
    grouped, full = small_model(n_kv_heads=2), small_model()
    weights = grouped.state_dict()
    for name, weight in weights.items():
        if name.endswith(("wk.weight", "wv.weight")):
            heads = weight.view(2, 8, 32)  # [kv_heads, head_dim, dim]: each serves two query heads
            weights[name] = torch.stack([heads[0], heads[0], heads[1], heads[1]]).view(32, 32)
    full.load_state_dict(weights)
    tokens = token_ids(2, 9)
    torch.testing.assert_close(grouped(tokens), full(tokens), rtol=1e-12, atol=1e-12)


def test_repeat_kv_copies_nothing_when_every_query_has_its_own_head() -> None:
    x = torch.randn(1, 3, 4, 8)
    assert repeat_kv(x, 1) is x
    assert repeat_kv(x, 3).shape == (1, 3, 12, 8)


def architecture(**changes: Any) -> Architecture:
    return dataclasses.replace(SMALL, **changes).architecture


def test_rotary_embedding_depends_on_the_distance_of_two_tokens_only() -> None:
    freqs_cis = rotations(architecture())
    assert freqs_cis.shape == (2 * 512, 4)
    query, key = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    here = query.expand(1, 40, 1, 8)
    there = key.expand(1, 40, 1, 8)
    q, k = rotate(here, there, freqs_cis[:40])
    scores = q[0, :, 0] @ k[0, :, 0].T  # [position of the query, position of the key]
    for distance in (-5, 0, 3):
        line = scores.diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), rtol=0, atol=1e-5)  # the table is complex64
    assert scores[0, 1:].sub(scores[0, 0]).abs().min() > 1e-3


def test_rotary_embedding_turns_neighbours_by_position_times_frequency() -> None:
    freqs_cis = rotations(architecture(rope_theta=10000.0))
    x = torch.zeros(1, 4, 1, 8, dtype=torch.float64)
    x[..., 2] = 1.0  # the second pair: frequency 10000^(-2/8) = 0.1
    turned, _ = rotate(x, x, freqs_cis[:4])
    angles = 0.1 * torch.arange(4, dtype=torch.float64)
    torch.testing.assert_close(turned[0, :, 0, 2], angles.cos(), rtol=0, atol=1e-6)
    torch.testing.assert_close(turned[0, :, 0, 3], angles.sin(), rtol=0, atol=1e-6)


def test_rms_norm_is_computed_in_float32_and_cast_back() -> None:
    norm = RMSNorm(architecture(dtype="fp32")).half()
    # 300² does not fit float16, whose largest number is 65504: computed there, the result would be 0.
    output = norm(torch.full((1, 2, 32), 300.0, dtype=torch.float16))
    assert output.dtype == torch.float16
    assert torch.equal(output, torch.ones(1, 2, 32, dtype=torch.float16))


class Operations(TorchDispatchMode):
    """Counts the operations that run inside it, and records the dtype of the first argument of each."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.dtype | None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append((func.name(), getattr(args[0], "dtype", None) if args else None))
        return func(*args, **(kwargs or {}))


def test_softmax_norm_and_rotation_run_in_float32_when_weights_are_bf16() -> None:
    model = small_model(dtype="bf16", n_layers=1)
    with Operations() as operations:
        model(token_ids(1, 5))
    seen = operations.seen
    assert [dtype for name, dtype in seen if name == "aten::_softmax"] == [torch.float32]
    assert [dtype for name, dtype in seen if name == "aten::rsqrt"] == [torch.float32] * 3
    assert [dtype for name, dtype in seen if name == "aten::view_as_complex"] == [torch.float32] * 2


def test_sdpa_makes_no_mask_and_no_scores() -> None:
    with Operations() as operations:
        small_model(attention="sdpa")(token_ids(1, 5))
    assert not {"aten::triu", "aten::_softmax"} & {name for name, _ in operations.seen}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_7b_block_is_differentiated_on_fake_tensors(attention: str) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        workload = build(dataclasses.replace(PRESETS["7b"], n_layers=1, attention=attention, accumulation=1))
    [batch] = workload.split(workload.batches[0], 1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        workload.loss(workload.model, batch).backward()
    for name, parameter in workload.model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.shape == parameter.shape


def lengths_and_prompts() -> list[Sample]:
    ids = token_ids(4, 40).tolist()
    return [Sample(tuple(ids[i][:n]), prompt) for i, (n, prompt) in enumerate([(40, 3), (6, 5), (21, 10), (13, 12)])]


class Gradients:
    """A `StepObserver` that copies the gradients just before the optimizer uses them."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.found: dict[str, Tensor | None] = {}

    def phase(self, name: str, micro_batch: int) -> None:
        if name == "optimizer":
            self.found = {
                name: p.grad if p.grad is None else p.grad.clone() for name, p in self.model.named_parameters()
            }

    def inputs(self, data: Any) -> None:
        pass


def gradients_of_a_step(config: Config, parts: int) -> tuple[Tensor, dict[str, Tensor | None]]:
    workload = build(config)
    workload.plan = dataclasses.replace(workload.plan, micro_batches=parts)
    gradients = Gradients(workload.model)
    pieces = micro_batches(workload, lengths_and_prompts())
    loss = run_step(Training.start(workload, "cpu", lambda data: data), pieces, gradients)
    return loss, gradients.found


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_accumulation_over_samples_of_different_length_equals_the_large_batch(attention: str, parts: int) -> None:
    config = dataclasses.replace(SMALL, attention=attention)
    whole_loss, whole = gradients_of_a_step(config, 1)
    loss, split = gradients_of_a_step(config, parts)
    torch.testing.assert_close(loss, whole_loss, rtol=1e-12, atol=0)
    assert len(whole) == 2 * 9 + 3  # weights of two layers; embedding, last norm, head
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-12, atol=1e-14)


def test_padding_leaves_loss_and_gradients_as_they_are() -> None:
    workload = build(SMALL)
    sample = Sample((1, 7, 8, 9, 2), 2)
    alone = alpaca.collate([sample])
    padded = {
        "tokens": torch.nn.functional.pad(alone["tokens"], (0, 3), value=0),
        "labels": torch.nn.functional.pad(alone["labels"], (0, 3), value=-100),
    }
    losses, gradients = [], []
    for batch in (alone, padded):
        losses.append(workload.loss(workload.model, batch))
        gradients.append(torch.autograd.grad(losses[-1], list(workload.model.parameters())))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-13, atol=0)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


def test_logits_are_given_back_before_the_backward_pass() -> None:
    workload = build(SMALL)
    logits: list[weakref.ref[Tensor]] = []
    workload.model.register_forward_hook(lambda module, args, output: logits.append(weakref.ref(output)))
    loss = workload.loss(workload.model, alpaca.collate(lengths_and_prompts()))
    assert loss.requires_grad
    assert logits[0]() is None


def test_the_seed_decides_the_weights_and_nothing_else_does() -> None:
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    first = build(SMALL).model.state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(5)
    again, other = build(SMALL).model.state_dict(), build(dataclasses.replace(SMALL, seed=1)).model.state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["output.weight"], other["output.weight"])


def test_the_debug_model_learns_the_shipped_instructions() -> None:
    workload = build(dataclasses.replace(PRESETS["debug"], lr=3e-3, samples=8))
    training = Training.start(workload, "cpu", lambda data: data)
    losses = [run_step(training, micro_batches(workload, workload.batches[0])).item() for _ in range(5)]
    # An untrained model is about as good as a guess among 1,024 tokens: ln 1024 = 6.93.
    assert 6.4 < losses[0] < 7.9
    assert losses[-1] < losses[0] / 2
