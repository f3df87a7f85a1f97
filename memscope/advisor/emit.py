"""A plan as settings of other training tools.

Names of settings: transformers 5.23 (`TrainingArguments`), PEFT 0.21 (`LoraConfig`), axolotl 0.18 (its YAML), and
torchtune's recipe configurations (`llama3_2/1B_lora_single_device`). A comment names what a tool cannot express.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from memscope.advisor.advice import Advice
from memscope.advisor.emit_axolotl import axolotl_lines
from memscope.advisor.layer_words import in_words
from memscope.analysis.chosen import chosen_settings
from memscope.strategies import Plan, Strategy
from memscope.workload.settings import fill

__all__ = ["TOOLS", "emit"]


def emit(advice: Advice, tool: str) -> list[str]:
    """Lines to paste into a training tool, one of `TOOLS`."""
    chosen = chosen_settings(advice.trace) if advice.trace else {}
    strategies = {}
    for strategy in Plan.parse(",".join(advice.strategies)).strategies:
        config = fill(strategy.config, chosen.get(strategy.name, {}), of=f'strategy "{strategy.name}"')
        strategies[strategy.name] = type(strategy)(config)
    return list(_TOOLS[tool](advice, strategies))


Strategies = Mapping[str, Strategy]
_KNOWN = {"lora", "amp", "bf16", "ga", "optim"}
_ELSEWHERE = {
    "wq": "q_proj",
    "wk": "k_proj",
    "wv": "v_proj",
    "wo": "o_proj",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
}
"""Linear layers of Meta's LLaMA, as transformers calls them (models/llama/convert_llama_weights_to_hf.py)."""


_NEAREST = {
    "fp8": "convert the model with torchao.float8 before training",
    "loss": "the nearest is use_liger_kernel=True of TrainingArguments, liger_fused_linear_cross_entropy of axolotl",
    "pack": "packing=True of TRL's SFTConfig, or sample_packing with flash_attention of axolotl, pack other lengths",
}
"""What comes nearest to a strategy in these tools."""
_MLP = {"gate_proj", "up_proj", "down_proj"}


def _hf(advice: Advice, strategies: Strategies) -> Iterator[str]:
    yield "# transformers.TrainingArguments(...)"
    if "ga" in strategies:
        yield f"gradient_accumulation_steps={strategies['ga'].config.steps},"
    if "amp" in strategies:
        yield f"{strategies['amp'].config.dtype}=True,"
    optimizer = _trainers_optimizer(strategies)
    if optimizer:
        yield f'optim="{optimizer}",'
    if _whole(advice):
        yield 'gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},'
    if "bf16" in strategies:
        yield "# and load the model with from_pretrained(..., dtype=torch.bfloat16)"
    reasons = {"lora": "a LoRA adapter: see --emit peft", **_other_optimizer(strategies, optimizer)}
    yield from _unsaid(advice, strategies, reasons, whole_only=True)
    yield from _one_by_one(strategies)


def _peft(advice: Advice, strategies: Strategies) -> Iterator[str]:
    yield "# peft.LoraConfig(...)"
    if "lora" in strategies:
        config = strategies["lora"].config
        names = ", ".join(f'"{_ELSEWHERE.get(name, name)}"' for name in config.targets)
        targets = '"all-linear"' if config.targets == ("all-linear",) else f"[{names}]"
        yield f'r={config.r}, lora_alpha={config.alpha:g}, lora_dropout={config.dropout:g}, bias="{config.bias}",'
        yield f"target_modules={targets},"
        if config.dora or config.rslora:
            yield f"use_dora={config.dora}, use_rslora={config.rslora},"
        if config.start != "gaussian":
            yield f'init_lora_weights="{config.start}",'
    else:
        yield "# no adapter in this plan"
    others = {name: "belongs to the trainer: see --emit hf" for name in strategies if name != "lora"}
    yield from _unsaid(advice, strategies, others, whole_only=False)


def _axolotl(advice: Advice, strategies: Strategies) -> Iterator[str]:
    yield "# axolotl YAML"
    optimizer = _trainers_optimizer(strategies)
    yield from axolotl_lines(advice.made_for.get("settings", {}), strategies, optimizer)
    if "lora" in strategies:
        config = strategies["lora"].config
        yield from ("adapter: lora", f"lora_r: {config.r}", f"lora_alpha: {config.alpha:g}")
        yield f"lora_dropout: {config.dropout:g}"
        if config.dora or config.rslora:
            yield from (f"peft_use_dora: {config.dora}".lower(), f"peft_use_rslora: {config.rslora}".lower())
        if config.start != "gaussian":
            yield f"peft_init_lora_weights: {config.start}"
        if config.bias != "none":
            yield f"# not expressible: biases that are trained beside the adapter ({config.bias})"
        if config.targets == ("all-linear",):
            yield "lora_target_linear: true"
        else:
            yield f"lora_target_modules: [{', '.join(_ELSEWHERE.get(name, name) for name in config.targets)}]"
    if _whole(advice):
        yield from ("gradient_checkpointing: true", "gradient_checkpointing_kwargs: {use_reentrant: false}")
    yield from _unsaid(advice, strategies, _other_optimizer(strategies, optimizer), whole_only=True)
    yield from _one_by_one(strategies)


def _torchtune(advice: Advice, strategies: Strategies) -> Iterator[str]:
    yield "# torchtune YAML"
    if "lora" in strategies:
        config = strategies["lora"].config
        names = [_ELSEWHERE.get(name, name) for name in config.targets]
        attention = [name.replace("o_proj", "output_proj") for name in names if name not in _MLP]
        yield "model:"
        yield f"  lora_attn_modules: [{', '.join(attention)}]"
        yield f"  apply_lora_to_mlp: {bool(_MLP & {*names})}"
        yield from (
            f"  lora_rank: {config.r}",
            f"  lora_alpha: {config.alpha:g}",
            f"  lora_dropout: {config.dropout:g}",
        )
        if config.dora:
            yield "  use_dora: True"
        if config.rslora or config.start != "gaussian" or config.bias != "none":
            yield "# not expressible: rslora, pissa and olora, and biases that are trained beside the adapter"
    if "ga" in strategies:
        yield f"gradient_accumulation_steps: {strategies['ga'].config.steps}"
    if "bf16" in strategies:
        yield "dtype: bf16"
    component = _class_of_optimizer(strategies)
    if component:
        fused = f", fused: {str(strategies['optim'].config.fused).lower()}" if component == "torch.optim.AdamW" else ""
        yield f"optimizer: {{_component_: {component}{fused}}}"
    if _whole(advice):
        yield "enable_activation_checkpointing: True"
    reasons = {"amp": "mixed precision by autocast: torchtune trains in one dtype"}
    reasons |= _other_optimizer(strategies, component)
    yield from _unsaid(advice, strategies, reasons, whole_only=True)


_TOOLS: dict[str, Callable[[Advice, Strategies], Iterator[str]]] = {
    "peft": _peft, "axolotl": _axolotl, "hf": _hf, "torchtune": _torchtune
}  # fmt: skip
TOOLS = tuple(_TOOLS)


def _trainers_optimizer(strategies: Strategies) -> str | None:
    """The name of the plan's optimizer in transformers' Trainer; None: there is none, or no such strategy."""
    from memscope.strategies.optim import trainer_name  # imports torch

    if "optim" not in strategies:
        return None
    config = strategies["optim"].config
    return trainer_name(config.name, fused=config.fused)


def _class_of_optimizer(strategies: Strategies) -> str | None:
    """The class of the plan's optimizer; None: it needs more than parameters, or there is no such strategy."""
    from memscope.strategies.optim import KINDS  # imports torch

    return KINDS[strategies["optim"].config.name or "adamw"].component if "optim" in strategies else None


def _other_optimizer(strategies: Strategies, told: str | None) -> dict[str, str]:
    return {"optim": "an optimizer that this tool has no name for"} if "optim" in strategies and not told else {}


def _one_by_one(strategies: Strategies) -> Iterator[str]:
    if "optim" in strategies and not strategies["optim"].config.fused and not strategies["optim"].config.foreach:
        yield "# not expressible: the optimizer's step one parameter at a time (foreach=False)"


def _whole(advice: Advice) -> bool:
    return bool(advice.layers) and set(advice.layers.values()) == {"full"}


def _unsaid(advice: Advice, strategies: Strategies, reasons: Mapping[str, str], *, whole_only: bool) -> Iterator[str]:
    for name, strategy in strategies.items():
        if name in reasons or name not in _KNOWN:
            reason = reasons.get(name) or _NEAREST.get(name, "a strategy of another package")
            yield f"# not expressible here: {strategy.spec}: {reason}"
    if advice.layers and not (whole_only and _whole(advice)):
        yield f"# not expressible: checkpointing of {in_words(advice.layers)}"
        yield f"#   these tools checkpoint every layer or none; memscope applies it: ckpt:plan={advice.file or 'FILE'}"
