"""The layers that `targets=auto` and `targets=all-linear` choose."""

from __future__ import annotations

from torch import nn

from memscope.errors import nearest
from memscope.strategies.ckpt.layers import repeated_layers
from memscope.strategies.lora.linear import adaptable_layers, linear_layers, matches, shortest_names, tied_layers
from memscope.strategies.strategy import Problem

__all__ = [
    "ALL_LINEAR",
    "AUTO",
    "PEFT_TARGETS",
    "all_linear",
    "auto_targets",
    "chosen_linear",
    "output_head",
    "require_one_word",
    "target_problems",
]

AUTO = "auto"
ALL_LINEAR = "all-linear"

_BY_TARGETS = {
    ("q_proj", "v_proj"): "bart gptj gpt_neo opt llama llama4 mistral mixtral stablelm gemma gemma2 gemma3_text qwen2 "
    "qwen3",
    ("query", "value"): "bert roberta xlm-roberta electra layoutlm",
    ("query_key_value",): "bloom gpt_neox chatglm RefinedWebModel RefinedWeb falcon",
    ("q", "v"): "t5 mt5",
    ("c_attn",): "gpt2 gpt_bigcode",
    ("q", "v", "q_proj", "v_proj"): "blip-2",
    ("query_proj", "value_proj"): "deberta-v2",
    ("in_proj",): "deberta",
    ("Wqkv",): "mpt",
    ("c_proj", "c_attn"): "btlm",
    ("qkv_proj",): "codegen",
    ("q_proj", "v_proj", "fc1", "fc2"): "phi",
    ("q_proj", "k_proj", "v_proj", "o_proj"): "nemotron_h",
    ("key", "value", "receptance", "output"): "rwkv",
    ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"): "rwkv7",
}
PEFT_TARGETS = {kind: targets for targets, kinds in _BY_TARGETS.items() for kind in kinds.split()}
"""The layers that PEFT adapts by default, by the `model_type` of a transformers configuration.

Source: `TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING` in peft/utils/constants.py of PEFT 0.21, without gemma4,
whose entry is a regular expression.
"""
_QUERY_AND_VALUE = (("wq", "wv"), ("q_proj", "v_proj"), ("query", "value"), ("q_lin", "v_lin"))
"""Names of the layers that Hu et al. adapt, in Meta's LLaMA, most of transformers, BERT, and DistilBERT."""


def require_one_word(targets: tuple[str, ...]) -> None:
    """Refuse `auto` and `all-linear` beside other targets, with a ValueError."""
    for word in (AUTO, ALL_LINEAR):
        if word in targets and len(targets) > 1:
            raise ValueError(f"targets={word} stands alone: leave {word} or the other targets out")


def chosen_linear(model: nn.Module, targets: tuple[str, ...]) -> list[str]:
    """Full names of the linear layers that targets choose."""
    if targets == (ALL_LINEAR,):
        return all_linear(model)
    if targets == (AUTO,):
        targets = auto_targets(model)
    return [name for name in linear_layers(model) if any(matches(name, target) for target in targets)]


def target_problems(model: nn.Module, targets: tuple[str, ...], of: str) -> list[Problem]:
    """Why targets cannot be adapted; `of` names the workload."""
    if targets in ((AUTO,), (ALL_LINEAR,)):
        if chosen_linear(model, targets):
            return []
        return [Problem(f'targets={targets[0]} finds no linear layer to adapt in "{of}"', "remove this strategy")]
    problems = []
    linear, tied = linear_layers(model), tied_layers(model)
    fits = {name.rpartition(".")[2] for name in adaptable_layers(model)}
    for target in targets:
        matched = [name for name in linear if matches(name, target)]
        if not matched:
            problems.append(Problem(f'targets={target} matches no linear layer of "{of}"', nearest(target, fits)))
        for name in tied.keys() & matched:
            what = f'targets={target} matches "{name}", which shares its weight with "{tied[name]}"'
            problems.append(Problem(what, f"remove it. {nearest(target, fits)}"))
    return problems


def auto_targets(model: nn.Module) -> tuple[str, ...]:
    """The layers that are adapted by default; empty if the model has none.

    These are the layers that PEFT chooses for this type of model, or else the query and value projections under their
    usual names, or else every linear layer of the repeated layers, or of a model without such layers.
    """
    fitting, linear = adaptable_layers(model), linear_layers(model)
    offered = [PEFT_TARGETS[kind] for kind in _model_types(model) if kind in PEFT_TARGETS]
    ends = {name.rpartition(".")[2] for name in fitting}
    offered += [names for names in _QUERY_AND_VALUE if ends >= {*names}]
    for targets in offered:
        chosen = [name for target in targets for name in fitting if matches(name, target)]
        if chosen:
            return shortest_names(chosen, linear)
    inside = _in_repeated_layers(model)
    return shortest_names([name for name in fitting if name in inside] or fitting, linear)


def all_linear(model: nn.Module) -> list[str]:
    """Every linear layer that can be adapted, except the output head.

    PEFT means the same by `target_modules="all-linear"` (peft/tuners/tuners_utils.py of 0.21), but takes a
    classifier for the head only with the task type `SEQ_CLS`.
    """
    head = output_head(model)
    return [name for name in adaptable_layers(model) if model.get_submodule(name) is not head]


def output_head(model: nn.Module) -> nn.Module | None:
    """What transformers' `get_output_embeddings` returns, or else the last linear layer behind the repeated layers."""
    for module in model.modules():
        ask = getattr(module, "get_output_embeddings", None)
        if callable(ask) and isinstance(found := ask(), nn.Module):
            return found
    linear, inside = linear_layers(model), _in_repeated_layers(model)
    if not linear or not inside or linear[-1] in inside:
        return None
    return model.get_submodule(linear[-1])


def _in_repeated_layers(model: nn.Module) -> set[str]:
    return {
        f"{layer}.{name}" if name else layer
        for layer, module in repeated_layers(model).items()
        for name, _ in module.named_modules()
    }


def _model_types(model: nn.Module) -> list[str]:
    """The types of the transformers models inside a model, the outermost first."""
    types = (getattr(getattr(module, "config", None), "model_type", None) for module in model.modules())
    return list(dict.fromkeys(kind for kind in types if isinstance(kind, str)))
