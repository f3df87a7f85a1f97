"""What `hf:WHAT` may name: a shipped model, a folder, a name on the hub; and what is said when it names nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

import torch
from hubs import GATED, served

import memscope.targets.hf.libraries as libraries
from memscope.errors import UsageError
from memscope.targets.hf.catalogue import load_catalogue
from memscope.targets.hf.config import HfConfig
from memscope.targets.hf.sources import find_model
from memscope.targets.hf.target import build, hf
from memscope.workload.target import find_target

TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip


def write(folder: Path, **changes: object) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**TINY, **changes}))
    return str(folder)


def refusal(model: str | Path, **settings: object) -> str:
    with torch.device("meta"), pytest.raises(UsageError) as caught:
        build(HfConfig(model=str(model), **settings))  # type: ignore[arg-type]
    return str(caught.value)


@pytest.mark.parametrize("name", load_catalogue())
def test_a_shipped_model_has_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        total, _ = build(HfConfig(model=name)).parameter_counts()
    assert total == load_catalogue()[name].parameters


def test_the_shipped_models_are_those_that_people_use_most() -> None:
    shipped = load_catalogue()
    assert len(shipped) >= 25
    assert all(model.published and model.sizes and "/" in model.source for model in shipped.values())


def test_phi_2_drops_values_of_the_residual_stream() -> None:
    """Source: convert_phi_weights_to_hf.py of huggingface/transformers. PhiConfig has none by default, as phi-1 has."""
    assert load_catalogue()["phi-2"].config["resid_pdrop"] == 0.1


def test_the_text_after_the_colon_is_the_model() -> None:
    assert find_target("hf:gpt2").configure(words={"seq_len": "8"}) == HfConfig(model="gpt2", seq_len=8)
    assert find_target("targets/hf:org/name").configure().model == "org/name"


def test_a_target_without_an_argument_refuses_one() -> None:
    with pytest.raises(UsageError, match=r'"llama2" takes nothing after a colon, but "13b" was given: choose a preset'):
        find_target("llama2:13b")
    with pytest.raises(UsageError, match=r'"hf:" names no model. See: memscope targets'):
        find_target("hf:")


@pytest.mark.parametrize("inside", ["", "config.json"])
def test_a_folder_or_its_config_is_a_model(inside: str, tmp_path: Path) -> None:
    write(tmp_path / "tiny")
    found = find_model(str(tmp_path / "tiny" / inside))
    assert (found.name, found.values["hidden_size"]) == ("tiny", 32)


def test_only_the_config_is_fetched_from_the_hub_and_then_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served({"org/tiny/config.json": json.dumps(TINY)}, str(tmp_path), monkeypatch) as asked, torch.device("meta"):
        assert build(HfConfig(model="org/tiny")).name == "tiny"
        assert {path for path in asked if path.startswith("org/")} == {"org/tiny/config.json"}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert find_model("org/tiny").values == TINY


def test_what_the_hub_does_not_give_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"org/data/other.json": "{}", "meta-llama/Llama-2-7b-hf/config.json": GATED}
    with served(files, str(tmp_path), monkeypatch):
        assert 'the hub has no model "meta-lama/Llama-2-7b-hf"' in (message := refusal("meta-lama/Llama-2-7b-hf"))
        assert 'did you mean "meta-llama/Llama-2-7b-hf"?' in message
        assert refusal("org/data") == '"org/data" has no config.json on the hub: it is not a model of transformers'
        gated = refusal("meta-llama/Llama-2-7b-hf")
    assert "ask for access on its page, then log in with `hf auth login`" in gated
    assert "memscope ships its sizes: hf:llama-2-7b" in gated


def test_offline_the_message_names_the_file_and_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refusal("org/tiny")
    assert "the hub cannot be reached" in message
    assert "save https://huggingface.co/org/tiny/resolve/main/config.json as tiny/config.json" in message
    assert message.endswith("name that folder: hf:./tiny")


def test_a_name_that_is_nearly_right_is_offered() -> None:
    assert 'did you mean "llama-2-7b"?' in refusal("lama-2-7b")


def test_a_folder_without_a_config_says_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text("{}")
    assert "the folder has no config.json. params.json is Meta's format" in refusal(tmp_path)
    (tmp_path / "train.yml").write_text("")
    assert f"A recipe in it is named by its file: hf:{tmp_path / 'train.yml'}" in refusal(tmp_path)


def test_a_file_that_is_no_config_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert 'expected the config.json of a model, which has a "model_type"; found a' in refusal(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "not valid JSON" in refusal(tmp_path)


def test_an_unknown_type_is_refused_with_the_nearest(tmp_path: Path) -> None:
    assert 'the model_type is "lama", which transformers' in (message := refusal(write(tmp_path, model_type="lama")))
    assert 'did you mean "llama"?' in message


def test_weights_quantized_by_another_library_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, quantization_config={"quant_method": "gptq"})
    assert "the weights are quantized (gptq), which is not supported: memscope simulates those of bits" in refusal(
        folder
    )


CODE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

class OwnConfig(PretrainedConfig):
    model_type = "own"

class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, labels=None):
        logits = self.table(input_ids)
        return CausalLMOutput(loss=torch.nn.functional.cross_entropy(logits[0], labels[0]), logits=logits)
"""


def test_code_that_comes_with_a_model_runs_only_if_it_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    maps = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    folder = write(tmp_path / "model", model_type="own", architectures=["OwnModel"], auto_map=maps)
    (tmp_path / "model" / "own.py").write_text(CODE)
    message = refusal(folder)
    assert "its Python code comes with the model (auto_map), and memscope does not run it unasked" in message
    assert "--trust-remote-code" in message
    workload = build(HfConfig(model=folder, trust_remote_code=True, seq_len=4))
    assert workload.parameter_counts() == (64 * 64, 64 * 64)
    assert "Python code that comes with the model may have been run" in workload.notes[0]


def test_more_tokens_than_learned_positions_are_refused() -> None:
    assert "seq_len=1025: gpt2 has 1024 learned positions: choose at most 1024" in refusal("gpt2", seq_len=1025)
    assert "opt-125m has 2048 learned positions" in refusal("opt-125m", seq_len=2049)  # its table has 2 rows more


def test_positions_of_roberta_begin_after_the_padding_token(tmp_path: Path) -> None:
    folder = write(tmp_path, model_type="roberta", architectures=["RobertaForMaskedLM"], pad_token_id=1)
    assert "has 62 learned positions: choose at most 62" in refusal(folder, seq_len=63)  # of 64 rows


def test_more_tokens_than_a_rotary_model_was_trained_for_are_noted(tmp_path: Path) -> None:
    with torch.device("meta"):
        notes = build(HfConfig(model=write(tmp_path), seq_len=65)).notes
        assert not build(HfConfig(model=write(tmp_path), seq_len=64)).notes
    assert notes == (f"seq_len=65 is beyond the 64 positions in the configuration of {tmp_path}",)


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(libraries.importlib, "import_module", missing)
    with pytest.raises(
        UsageError, match=r"needs pyyaml, which is not installed: pip install transformers peft huggingface_hub pyyaml"
    ):
        libraries.needed("yaml")


def test_an_unknown_setting_is_refused_in_python_too() -> None:
    with pytest.raises(TypeError, match='no setting "seqlen": did you mean "seq_len"'):
        hf("gpt2", seqlen=8)
