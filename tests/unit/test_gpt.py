"""The target `gpt`: the number of parameters, its variants, and text as windows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from memscope import simulate
from memscope.errors import UsageError
from memscope.targets.gpt.config import PRESETS, Config
from memscope.targets.gpt.experts import RoutedExperts
from memscope.targets.gpt.model import Decoder, GeluMlp
from memscope.targets.gpt.target import build
from memscope.targets.gpt.text import read_windows

SMALL = Config(dim=16, n_layers=2, n_heads=2, vocab_size=256, seq_len=8, micro_batch=2)


def small(**changes: Any) -> Config:
    return dataclasses.replace(SMALL, **changes)


def parameters(config: Config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Decoder(config).parameters())


# The embedding, which is the head; in each layer four matrices of attention and eight of the feed-forward, of 768².
EMBEDDING, SQUARE = 50_304 * 768, 768 * 768


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # 512 positions; weight and bias of two norms in each layer, and of the last one
        (PRESETS["166m"], EMBEDDING + 512 * 768 + 18 * (12 * SQUARE + 2 * 2 * 768) + 2 * 768),
        (PRESETS["209m"], EMBEDDING + 512 * 768 + 24 * (12 * SQUARE + 2 * 2 * 768) + 2 * 768),
        # no positions, and norms without bias; 3 matrices of 768 × 2048 are 8 of 768²
        (PRESETS["llama-166m"], EMBEDDING + 18 * (12 * SQUARE + 2 * 768) + 768),
    ],
)
def test_parameters(config: Config, expected: int) -> None:
    assert parameters(config) == expected


def test_the_published_numbers_of_parameters() -> None:
    assert (parameters(PRESETS["166m"]), parameters(PRESETS["209m"])) == (166_485_504, 208_971_264)


def test_variants_add_the_weights_of_residuals_and_of_experts() -> None:
    plain = parameters(PRESETS["166m"])
    # after layer i, one weight for the embedding and for each of i results: 2 + 3 + … + 19
    assert parameters(dataclasses.replace(PRESETS["166m"], residual="all")) - plain == 189
    # 7 more feed-forwards of 8 · 768² in each layer, and a router
    more = 18 * (7 * 8 * SQUARE + 8 * 768)
    assert parameters(dataclasses.replace(PRESETS["166m"], experts=8)) - plain == more


@pytest.mark.parametrize("style", ["gpt", "llama"])
def test_no_token_sees_a_later_one_and_both_kinds_of_attention_agree(style: str) -> None:
    tokens = torch.arange(16).view(2, 8)
    changed = tokens.clone()
    changed[:, 5] = 200
    logits = []
    for attention in ("sdpa", "eager"):
        torch.manual_seed(0)
        model = Decoder(small(style=style, attention=attention)).eval()
        logits.append(model(tokens))
        torch.testing.assert_close(model(changed)[:, :5], logits[-1][:, :5])
        assert not torch.equal(model(changed)[:, 5:], logits[-1][:, 5:])
    torch.testing.assert_close(*logits)


def test_weighted_residuals_begin_as_plain_ones() -> None:
    tokens = torch.arange(16).view(2, 8)
    logits = []
    for residual in ("plain", "all"):
        torch.manual_seed(0)
        logits.append(Decoder(small(residual=residual)).eval()(tokens))
    torch.testing.assert_close(*logits)


@pytest.mark.parametrize("routing", ["expert", "token"])
def test_a_single_expert_is_a_feed_forward(routing: str) -> None:
    config = small(experts=1, experts_per_token=1, routing=routing)
    dense, experts = GeluMlp(config), RoutedExperts(config)
    with torch.no_grad():
        experts.up[0], experts.down[0] = dense.up.weight.t(), dense.down.weight.t()
    x = torch.randn(2, 8, 16)
    torch.testing.assert_close(experts(x), dense(x))


def test_a_token_visits_the_experts_that_it_chooses_while_there_is_room() -> None:
    config = small(experts=2, experts_per_token=1, routing="token")
    experts = RoutedExperts(config)
    x = torch.ones(1, 4, 16)
    x[0, :, 0] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    with torch.no_grad():
        experts.router.weight.zero_()
        experts.router.weight[0, 0] = 1.0  # every token prefers the first expert, the first token most
        experts.up.fill_(0.1), experts.down.fill_(0.1)
    y = experts(x)[0]
    assert y[:2].abs().sum(-1).min() > 0
    assert y[2:].abs().sum() == 0, "an expert has room for 4 · 1 / 2 tokens"


@pytest.mark.parametrize("changes", [{"style": "llama", "residual": "all"}, {"experts": 4, "routing": "token"}])
def test_a_variant_is_simulated_with_all_its_weights(changes: dict[str, Any]) -> None:
    config = small(**changes)
    trace = simulate(lambda: build(config), device="cpu", strategies="amp:dtype=bf16")
    sizes = [4 * p.numel() for p in Decoder(config).parameters()]
    assert trace.by("category", at="peak")["parameter"] == sum(sizes)


def test_windows_overlap_by_the_token_that_the_first_predicts(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abcdefghij")
    windows = read_windows(small(seq_len=4, data=str(text)))
    assert [bytes(window.tolist()) for window in windows] == [b"abcde", b"efghi"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b" \n", "the text is empty, so there is nothing to train on"),
        (b"abc", "the text has 3 tokens, but a sample takes 9"),
        (b"abc\xff", "byte 3 is not UTF-8"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused(content: bytes, said: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    with pytest.raises(UsageError, match=said):
        read_windows(small(data=str(text)))


def test_every_wrong_setting_is_named() -> None:
    with pytest.raises(UsageError) as caught:
        Config(style="gtp", dropout=1.0, dim=50, experts=0)
    for said in ('style="gtp"', "dropout=1.0", "dim must be a multiple of 24", "experts=0"):
        assert said in str(caught.value)
