"""Loading weights onto a GPU and continuing texts there."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from llamas import FORMATS, SMALL, Format, saved, split_by_rank

from memscope.command.run import run_command
from memscope.strategies.lora import LoRALinear, adapt
from memscope.targets.llama2.adapters import save_adapter
from memscope.targets.llama2.generate import command, load_model
from memscope.targets.llama2.generation import Decoding, generate
from memscope.targets.llama2.target import SHIPPED_TOKENIZER

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and PyTorch finds none"),
]

PROMPTS = [[1, 5, 9, 12], [1, 7], [1, *range(20, 40)]]
WAYS = {
    "greedy": Decoding(max_new_tokens=8),
    "beam search": Decoding(max_new_tokens=8, beams=3),
    "drawn from one": Decoding(max_new_tokens=8, temperature=1.0, top_k=1),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = saved(tmp_path_factory.mktemp("weights") / "small", "huggingface")
    shutil.copy(SHIPPED_TOKENIZER, folder / "tokenizer.model")
    return folder


def test_every_weight_arrives_bit_for_bit(tmp_path: Path) -> None:
    folders = {form: saved(tmp_path / form, form) for form in FORMATS}
    split_by_rank(saved(tmp_path / "shards", "meta"), 2)
    for folder in (*folders.values(), tmp_path / "shards"):
        host, device = load_model(folder), load_model(folder, device="cuda")
        for (name, here), there in zip(host.state_dict().items(), device.state_dict().values(), strict=True):
            assert there.is_cuda, name
            assert torch.equal(here, there.cpu()), name
        assert device.freqs_cis.is_cuda
        assert torch.allclose(host.freqs_cis, device.freqs_cis.cpu(), atol=1e-6)


@pytest.mark.parametrize("form", FORMATS)
def test_loading_takes_no_more_of_the_device_than_model_and_one_tensor(form: Format, tmp_path: Path) -> None:
    folder = saved(tmp_path / form, form)
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = load_model(folder, device="cuda")
    held = torch.cuda.memory_allocated() - before
    tensors = [*model.parameters(), model.freqs_cis]
    assert held >= sum(tensor.nbytes for tensor in tensors)
    assert torch.cuda.max_memory_allocated() - before <= held + max(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("decoding", WAYS.values(), ids=WAYS)
def test_texts_are_continued_as_on_a_cpu(decoding: Decoding, weights: Path) -> None:
    found = [generate(load_model(weights, device=d), PROMPTS, decoding, eos_id=None) for d in ("cpu", "cuda")]
    assert found[0] == found[1]
    assert [len(one.tokens) for one in found[1]] == [8, 8, 8]


def test_a_seed_gives_the_same_text_again(weights: Path) -> None:
    model = load_model(weights, device="cuda")
    drawn = [
        generate(model, PROMPTS, Decoding(max_new_tokens=8, temperature=2.0, seed=seed), eos_id=None)
        for seed in (3, 3, 4)
    ]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_generation_leaves_nothing_on_the_device(weights: Path) -> None:
    model = load_model(weights, device="cuda")
    generate(model, PROMPTS, WAYS["greedy"], eos_id=None)  # cuBLAS takes its workspace
    gc.collect()
    before = torch.cuda.memory_allocated()
    generate(model, PROMPTS, WAYS["beam search"], eos_id=None)
    gc.collect()
    assert torch.cuda.memory_allocated() == before


def test_an_adapter_is_put_on_a_model_on_the_device(weights: Path, tmp_path: Path) -> None:
    model = load_model(weights)
    adapt(model, ["layers.0.attention.wq"], r=4, alpha=8, dropout=0.0)
    layer = model.get_submodule("layers.0.attention.wq")
    assert isinstance(layer, LoRALinear)
    torch.nn.init.normal_(layer.lora_b)
    save_adapter(model, tmp_path / "adapter")
    there = load_model(weights, adapter=tmp_path / "adapter", device="cuda")
    assert all(parameter.is_cuda for parameter in there.parameters())
    tokens = torch.tensor([PROMPTS[2]])
    with torch.no_grad():
        expected, plain = model.eval()(tokens), load_model(weights)(tokens)
        assert (there(tokens.cuda()).cpu() - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert (plain - expected).abs().max() > 1e-2 * expected.abs().max()


def test_the_command_continues_a_prompt_on_the_device(weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for device in ("cpu", "cuda"):
        words = ["--weights", str(weights), "--device", device, "--prompt", "The rain", "--max-new-tokens", "6"]
        with pytest.raises(SystemExit) as end:
            run_command(command, "generate", [*words, "--json"])
        assert not end.value.code
        found.append(json.loads(capsys.readouterr().out))
    assert found[1]["device"] == "cuda"
    assert found[0]["results"] == found[1]["results"]
    assert SMALL.vocab_size == 1024  # that of the tokenizer
