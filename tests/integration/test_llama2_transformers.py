"""The LLaMA2 target against transformers' models of the family: same weights, same logits, through both formats."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from memscope.strategies import Plan
from memscope.targets.llama2.model import Llama
from memscope.targets.llama2.target import Config, read_preset
from memscope.targets.llama2.weights import load_weights, save_weights
from memscope.workload.description import Workload

transformers = pytest.importorskip("transformers", reason="the reference, transformers, is not installed")

SMALL = {
    "vocab_size": 96, "hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
}  # fmt: skip
# With heads of 8 and this base, two wavelengths stay, one is divided by the factor and one is in between.
SCALED = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
FAMILY: dict[str, dict[str, Any]] = {
    "llama2": {"num_key_value_heads": 6},
    "grouped heads": {},
    "llama3": {"rope_theta": 500_000.0, "rope_scaling": SCALED},
    "llama3.2": {"rope_theta": 500_000.0, "rope_scaling": SCALED | {"factor": 32.0}, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 7},
    "mistral, without a window": {"sliding_window": None},
}
TOKENS = torch.randint(0, 96, (2, 100), generator=torch.Generator().manual_seed(1))  # far longer than the window


def reference(kind: str) -> Any:
    """A transformers model with random weights, norms included."""
    name = "Mistral" if "sliding_window" in FAMILY[kind] else "Llama"
    config = getattr(transformers, f"{name}Config")(**(SMALL | FAMILY[kind]))
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2) if parameter.ndim == 2 else parameter.uniform_(0.5, 1.5)
    return model


@pytest.fixture(params=FAMILY)
def theirs(request: pytest.FixtureRequest) -> Any:
    return reference(request.param)


def loaded(config: Config, folder: Path) -> Llama:
    model = Llama(config.architecture)
    load_weights(model, folder)
    return model


@torch.no_grad()
def assert_same_logits(ours: Tensor, theirs: Tensor) -> None:
    """Assert equal logits in float32, to 1e-4 of the largest logit and, unless near zero, of each."""
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_equal_those_of_transformers(tmp_path: Path, theirs: Any, attention: str) -> None:
    theirs.save_pretrained(tmp_path)
    ours = loaded(dataclasses.replace(read_preset(tmp_path), attention=attention), tmp_path)
    assert_same_logits(ours(TOKENS), theirs(TOKENS).logits)


def test_logits_equal_those_of_transformers_after_a_round_trip_through_both_formats(
    tmp_path: Path, theirs: Any
) -> None:
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    config = read_preset(tmp_path / "theirs")
    save_weights(loaded(config, tmp_path / "theirs"), tmp_path / "meta", "meta")
    save_weights(loaded(config, tmp_path / "meta"), tmp_path / "ours", "huggingface")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert_same_logits(opened(TOKENS).logits, theirs(TOKENS).logits)
    for name, weight in theirs.state_dict().items():
        assert torch.equal(opened.state_dict()[name], weight), name


def rms(values: Tensor) -> float:
    """The root mean square."""
    return values.square().mean().sqrt().item()


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bf16_is_as_close_to_float32_as_transformers_and_closer_to_transformers(
    tmp_path: Path, theirs: Any, attention: str
) -> None:
    # Not equal: transformers rounds the rotation to bfloat16 too, which is float32 here, as in Meta's code.
    theirs.save_pretrained(tmp_path)
    config = dataclasses.replace(read_preset(tmp_path), attention=attention)
    ours = Workload(loaded(config, tmp_path), [TOKENS], lambda model, batch: model(batch).sum(), torch.optim.AdamW)
    Plan.parse("bf16").apply(ours)
    low = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, attn_implementation=attention
    )
    exact, mine, peer = theirs(TOKENS).logits, ours.model(TOKENS), low(TOKENS).logits.float()
    assert rms(mine - exact) < 1.1 * rms(peer - exact)
    assert rms(mine - peer) < rms(peer - exact)
    ours.model.freqs_cis = torch.complex(
        ours.model.freqs_cis.real, torch.zeros(())
    )  # the value that a cast would leave
    assert rms(ours.model(TOKENS) - exact) > 3 * rms(peer - exact)


# Without this, the agreement above would prove nothing.


def logits_without(setting: str, theirs: Any, folder: Path) -> Tensor:
    theirs.save_pretrained(folder)
    config = read_preset(folder)
    model = Llama(dataclasses.replace(config, **{setting: None}).architecture)
    model.load_state_dict(loaded(config, folder).state_dict())
    return model(TOKENS)  # type: ignore[no-any-return]


def test_the_window_hides_earlier_tokens(tmp_path: Path) -> None:
    theirs = reference("mistral")
    difference = (logits_without("sliding_window", theirs, tmp_path) - theirs(TOKENS).logits).abs().amax((0, 2))
    assert difference[:7].max() < 1e-4  # the first seven tokens see everything before them
    assert difference[7:].min() > 1e-2


def test_rope_scaling_changes_the_logits(tmp_path: Path) -> None:
    theirs = reference("llama3")
    difference = (logits_without("rope_scaling", theirs, tmp_path) - theirs(TOKENS).logits).abs().amax()
    assert difference > 1e-2 * theirs(TOKENS).logits.abs().max()


def test_transformers_opens_saved_half_precision_weights(tmp_path: Path) -> None:
    theirs = reference("grouped heads").bfloat16()
    theirs.save_pretrained(tmp_path / "theirs")
    config = dataclasses.replace(read_preset(tmp_path / "theirs"), dtype="bf16")
    save_weights(loaded(config, tmp_path / "theirs"), tmp_path / "ours")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert opened.dtype == torch.bfloat16
    for name, weight in theirs.state_dict().items():
        assert torch.equal(opened.state_dict()[name], weight), name
