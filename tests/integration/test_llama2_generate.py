"""Generation compared with that of transformers, without a cache, on the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from memscope.targets.llama2.generate import load_model
from memscope.targets.llama2.generation import Continuation, Decoding, generate
from memscope.targets.llama2.model import Llama
from memscope.targets.llama2.sampling import probabilities

transformers = pytest.importorskip("transformers", reason="the reference, transformers, is not installed")

VOCAB, WINDOW, NEW = 96, 7, 10
FAMILY: dict[str, dict[str, Any]] = {"Llama": {}, "Mistral": {"sliding_window": WINDOW}}
# Shorter and longer than the window; the same one twice; one of a single token.
LENGTHS = (3, 11, 1, 6, 11)
PROMPTS = [
    torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist() for length in LENGTHS
]


@pytest.fixture(params=FAMILY, scope="module")
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Llama, Any]:
    """The same random weights in our model and in that of transformers."""
    config = getattr(transformers, f"{request.param}Config")(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        **FAMILY[request.param],
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{request.param}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.25) if parameter.ndim == 2 else parameter.uniform_(0.5, 1.5)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return load_model(folder), theirs


def by_transformers(theirs: Any, prompts: list[list[int]], eos_id: int | None, **settings: Any) -> list[Continuation]:
    """The tokens that transformers adds to prompts, padded on the left as it requires."""
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    real = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = theirs.generate(
        padded, attention_mask=real, do_sample=False, use_cache=False, max_new_tokens=NEW, pad_token_id=0,
        eos_token_id=eos_id, **settings,
    )  # fmt: skip
    return [_continuation(row, eos_id) for row in out[:, longest:].tolist()]


def _continuation(tokens: list[int], eos_id: int | None) -> Continuation:
    if eos_id not in tokens:
        return Continuation(tuple(tokens), "length")
    return Continuation(tuple(tokens[: tokens.index(eos_id)]), "eos")  # type: ignore[arg-type]


def third_token(model: Llama) -> int:
    """The third token added to the first prompt. As EOS, it ends some texts early and others not."""
    return generate(model, PROMPTS[:1], Decoding(max_new_tokens=3), eos_id=None)[0].tokens[2]


@pytest.mark.parametrize("stops", [False, True], ids=["no EOS", "EOS"])
def test_greedy_decoding_equals_that_of_transformers_for_one_prompt_and_for_many(
    models: tuple[Llama, Any], stops: bool
) -> None:
    ours, theirs = models
    eos_id = third_token(ours) if stops else None
    decoding = Decoding(max_new_tokens=NEW)
    together = generate(ours, PROMPTS, decoding, eos_id=eos_id)
    assert together == by_transformers(theirs, PROMPTS, eos_id)
    assert together[0] == by_transformers(theirs, PROMPTS[:1], eos_id)[0]
    assert {one.ended_by for one in together} == ({"eos", "length"} if stops else {"length"})


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.5, -1.0])
def test_beam_search_equals_that_of_transformers(models: tuple[Llama, Any], length_penalty: float) -> None:
    ours, theirs = models
    decoding = Decoding(max_new_tokens=NEW, beams=4, length_penalty=length_penalty)
    endless = generate(ours, PROMPTS, decoding, eos_id=None)
    assert endless == by_transformers(theirs, PROMPTS, None, num_beams=4, length_penalty=length_penalty)
    ends = set()
    for eos_id in {one.tokens[place] for one in endless[:3] for place in (1, 6)}:
        found = generate(ours, PROMPTS, decoding, eos_id=eos_id)
        assert found == by_transformers(theirs, PROMPTS, eos_id, num_beams=4, length_penalty=length_penalty)
        ends |= {one.ended_by for one in found}
    assert ends == {"eos", "length"} or length_penalty > 1  # this favors texts that do not end


def test_beam_search_of_one_prompt_equals_that_of_transformers(models: tuple[Llama, Any]) -> None:
    ours, theirs = models
    eos_id = third_token(ours)
    for beams in (2, 5):
        for prompt in PROMPTS:
            found = generate(ours, [prompt], Decoding(max_new_tokens=NEW, beams=beams), eos_id=eos_id)
            assert found == by_transformers(theirs, [prompt], eos_id, num_beams=beams)


def test_beam_search_finds_texts_that_greedy_decoding_misses(models: tuple[Llama, Any]) -> None:
    ours, _ = models
    greedy, searched = (
        generate(ours, PROMPTS, Decoding(max_new_tokens=NEW, beams=beams), eos_id=None) for beams in (1, 4)
    )
    assert greedy != searched  # without this, the agreement above would prove nothing


FILTERS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.3, "top_k": 20},
    {"temperature": 1.0, "top_k": 5000},
    {"temperature": 1.0, "top_p": 0.3},
    {"temperature": 0.6, "top_p": 0.95},
    {"temperature": 2.0, "top_p": 1e-6},
    {"temperature": 0.9, "top_k": 30, "top_p": 0.8},
]


def filtered_by_transformers(logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Probabilities after the processors of transformers, in the order of its `generate`."""
    scores = transformers.TemperatureLogitsWarper(temperature)(None, logits)
    scores = transformers.TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = transformers.TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    return scores.softmax(dim=-1)  # type: ignore[no-any-return]


@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_tokens_are_sampled_from_those_that_transformers_keeps(settings: dict[str, Any]) -> None:
    logits = 3 * torch.randn(50, 1000, generator=torch.Generator().manual_seed(0))
    ours, theirs = probabilities(logits, Decoding(**settings)), filtered_by_transformers(logits, **settings)
    assert torch.equal(ours > 0, theirs > 0)
    torch.testing.assert_close(ours.float(), theirs)


def test_tokens_that_tie_with_the_last_of_top_k_are_kept_as_in_transformers() -> None:
    logits = torch.randint(0, 6, (20, 100), generator=torch.Generator().manual_seed(0)).float()
    kept = probabilities(logits, Decoding(temperature=1.0, top_k=7)) > 0
    assert torch.equal(kept, filtered_by_transformers(logits, 1.0, top_k=7) > 0)
    assert (kept.sum(dim=-1) > 7).any()


def chance_of(counts: Tensor, expected: Tensor) -> float:
    """Pearson's chi-square test: the probability of a larger difference from the expected counts by chance."""
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2.0), statistic / 2))


def test_tokens_are_sampled_with_the_probabilities_of_transformers(models: tuple[Llama, Any]) -> None:
    ours, theirs = models
    draws, settings = 4000, {"temperature": 1.2, "top_k": 12, "top_p": 0.9}
    decoding = Decoding(max_new_tokens=1, **settings)
    drawn = [one.tokens[0] for one in generate(ours, PROMPTS[:1] * draws, decoding, eos_id=None)]
    counts = torch.bincount(torch.tensor(drawn), minlength=VOCAB).double()
    with torch.no_grad():
        logits = theirs(torch.tensor(PROMPTS[:1])).logits[:, -1]
    expected = draws * filtered_by_transformers(logits, **settings)[0].double()
    possible = expected > 0
    assert possible.sum() > 3
    assert counts[~possible].sum() == 0
    assert chance_of(counts[possible], expected[possible]) > 1e-3
    # The test can fail: it would at a temperature of 1.
    other = draws * filtered_by_transformers(logits, **settings | {"temperature": 1.0})[0].double()
    assert other[possible].min() == 0 or chance_of(counts[possible], other[possible]) < 1e-6
