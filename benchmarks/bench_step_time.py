"""Estimated step times against published ones on an A100: docs/accuracy.md, *Step time*.

The model has 32 alike layers: the time of two and of three layers gives that of 32, within half a percent. A few
lengths stand for those of the 200 samples: the nearest one in as many tiles of 64 rows.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "scoreboard"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import meta_llama2
from published_runs import SAMPLE_LENGTHS

from memscope import Workload, simulate
from memscope.analysis.cost import last_step_seconds
from memscope.targets.gpt.config import PRESETS as GPT
from memscope.targets.gpt.target import build as build_gpt

LENGTHS = (60, 80, 96, 128, 144, 220, 330, 400)
WITHIN = 0.15
LORA = "lora:targets="


def with_layers(monkeypatch: pytest.MonkeyPatch, layers: int, bias: tuple[str, ...] | None, length: int) -> Workload:
    monkeypatch.setattr(meta_llama2, "LLAMA2", {"7b": replace(meta_llama2.LLAMA2["7b"], n_layers=layers)})
    return meta_llama2.build(meta_llama2.Config(bias=bias, accumulation=1, seq_len=length))


@pytest.mark.parametrize(
    ("strategies", "bias", "published"),
    [
        (f"{LORA}wq+wk+wv", ("wq", "wk", "wv"), 0.27913),
        (f"{LORA}wq+wk+wv,amp", ("wq", "wk", "wv"), 0.10721),
        (f"{LORA}wq+wv", None, 0.25675),
        (f"{LORA}wq+wv,amp", None, 0.090911),
    ],
)
def test_llama2_7b_on_single_samples(
    strategies: str, bias: tuple[str, ...] | None, published: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(layers: int, length: int) -> float:
        trace = simulate(
            lambda: with_layers(monkeypatch, layers, bias, length), strategies=strategies, device="a100-80gb"
        )
        return last_step_seconds(trace) or 0.0

    def whole(length: int) -> float:
        two, three = seconds(2, length), seconds(3, length)
        return two + 30 * (three - two)

    counts = Counter(min(LENGTHS, key=lambda one: (-(-one // 64) != -(-n // 64), abs(one - n))) for n in SAMPLE_LENGTHS)
    mean = sum(count * whole(length) for length, count in counts.items()) / len(SAMPLE_LENGTHS)
    print(f"\n{strategies}: published {published:.3f} s a step, estimated {mean:.3f} s ({mean / published - 1:+.1%})")
    assert abs(mean / published - 1) < WITHIN


def test_gpt_166m() -> None:
    published = 173 * 60 / 26_200
    for attention in ("eager", "sdpa"):
        config = replace(GPT["166m"], attention=attention)
        trace = simulate(lambda config=config: build_gpt(config), strategies="amp:dtype=bf16", device="a100-80gb")
        found = last_step_seconds(trace) or 0.0
        difference = f"{found / published - 1:+.1%}"
        print(f"\nGPT 166M, {attention}: published {published:.3f} s, estimated {found:.3f} s ({difference})")
        if attention == "eager":  # the report names no attention; the other one takes 0.6 of the time
            assert abs(found / published - 1) < WITHIN
