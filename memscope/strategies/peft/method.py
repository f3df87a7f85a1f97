"""Any method of Hugging Face's PEFT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from memscope.errors import UsageError
from memscope.strategies import Problem, Stage, Strategy
from memscope.strategies.lora.linear import matches, shortest_names
from memscope.strategies.lora.targets import ALL_LINEAR, AUTO, auto_targets, chosen_linear, require_one_word
from memscope.strategies.peft.library import adapted_model, config_class, default_targets, has_peft_modules, values_of
from memscope.workload.description import Workload
from memscope.workload.settings import choice, other_settings

__all__ = ["PeftMethod"]

_NEEDS = {
    "xlora": "mixes LoRA adapters that have been trained before",
    "poly": "needs the number of a task with every sample",
    "multitask_prompt_tuning": "needs the number of a task with every sample",
    "cpt": "needs the kind of every token of a batch",
    "shadow": "returns an output that the loss must know",
}
"""Methods that a plan has no words for, and what they need.

Sources: config.py and model.py in peft/tuners/xlora, poly, multitask_prompt_tuning, cpt and shadow, 0.21."""
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
"""PEFT's task types by the end of the name of a transformers class."""


class PeftMethod(Strategy):
    """Train with any method of PEFT but LoRA: the library puts its own modules on the model.

    METHOD is a name of peft.PeftType in small letters: ia3, vera, oft, boft, loha, lokr, adalora, fourierft, shira,
    ln_tuning, prompt_tuning, prefix_tuning, p_tuning and others. LoRA is the strategy lora.
    """

    name = "peft"
    stage = Stage.ADAPT
    exact = False
    changes = "what is trained"
    provides = frozenset({"adapters"})
    conflicts = frozenset({"adapters"})
    textbook: ClassVar[Mapping[str, str]] = {
        "parameter": "–",
        "activation": "–",
        "gradient": "↓",
        "optimizer_state": "↓",
    }

    @dataclass(frozen=True)
    class Config:
        """The method and its settings."""

        method: str = choice("ia3")
        """The method, directly after the colon: peft:vera,r=256."""
        targets: tuple[str, ...] = (AUTO,)
        """Modules to change: full names or their last parts, joined by +; auto: those of PEFT for this type of model,
        or those of lora; all-linear: all linear layers but the output head."""
        fields: tuple[tuple[str, str], ...] = other_settings()
        """Any other field of the method's configuration in PEFT, such as r=256 or num_virtual_tokens=20; a list is
        joined by +."""

        def __post_init__(self) -> None:
            require_one_word(self.targets)
            if self.method.lower() == "lora":
                raise ValueError("LoRA is a strategy of its own: write lora: in place of peft:lora")
            if not all(len(field) == 2 and field[0].isidentifier() and field[1] for field in self.fields):
                raise ValueError(f"fields={self.fields} are not pairs of a name and a text")

    @classmethod
    def candidates(cls, workload: Workload) -> Sequence[Config]:
        """Two methods that fit linear layers of any size, with the settings of PEFT."""
        return [cls.Config(method) for method in ("ia3", "vera")] if auto_targets(workload.model) else []

    def check(self, workload: Workload) -> list[Problem]:
        """Report a missing PEFT, an unknown method or setting, and a model that the method cannot change."""
        method, model = self.config.method.lower(), workload.model
        if has_peft_modules(model):
            return [Problem("the model has modules of PEFT already", "remove this strategy")]
        if method in _NEEDS:
            return [Problem(f"{method} {_NEEDS[method]}", "call PEFT in a program of your own: memscope profile -- …")]
        try:
            kind = config_class(method)
            if _is_prompt(kind) and not _is_transformers_model(model):
                what = f"{method} makes inputs for a transformers model, and {type(model).__name__} is none"
                return [Problem(what, "use a target hf:…, or a method that changes modules, such as ia3")]
            self._library_config(model)
        except UsageError as error:
            what, _, fix = str(error).partition(": ")
            return [Problem(what, fix or "remove this strategy")]
        return _unmatched(model, self.config.targets, workload.name)

    def apply(self, workload: Workload) -> None:
        """Let PEFT change the model."""
        config = self._library_config(workload.model)
        try:
            workload.model = adapted_model(workload.model, config)
        except UsageError as error:
            raise UsageError(f"{self.spec}: {error}") from error
        found = getattr(config, "target_modules", None)
        if self.config.targets == (AUTO,) and found and not isinstance(found, str):
            self.chosen = {"targets": "+".join(sorted(found))}

    def _library_config(self, model: nn.Module) -> Any:
        """PEFT's configuration.

        Raises:
            UsageError: a setting is unknown or rejected.
        """
        kind = config_class(self.config.method)
        values = self._targets(kind, model) | values_of(kind, self.config.fields)
        if _is_prompt(kind):
            if "num_virtual_tokens" not in values:
                raise UsageError(f"{self.config.method} has no length: write num_virtual_tokens=20, or another number")
            values = {"task_type": _task_of(model)} | values
        try:
            return kind(**values)
        except (ValueError, TypeError) as error:
            raise UsageError(f"{kind.__name__} rejects its settings: {' '.join(str(error).split())[:300]}") from error

    def _targets(self, kind: Any, model: nn.Module) -> dict[str, Any]:
        method, targets = self.config.method.lower(), self.config.targets
        if "target_modules" not in kind.__dataclass_fields__:
            if targets != (AUTO,):
                raise UsageError(f"{method} changes no module inside the model: leave targets out")
            return {}
        no_others: dict[str, Any] = {"feedforward_modules": []} if method == "ia3" else {}
        if targets != (AUTO,):
            return {"target_modules": ALL_LINEAR if targets == (ALL_LINEAR,) else list(targets), **no_others}
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if method in ("adaption_prompt", "trainable_tokens") or default_targets(method, model_type):
            return {}
        if method == "ln_tuning":
            return {"target_modules": list(_norms(model))}
        linear = chosen_linear(model, (AUTO,))  # PEFT looks for the names among all modules
        return {"target_modules": [*shortest_names(linear, _names(model))], **no_others}


def _norms(model: nn.Module) -> tuple[str, ...]:
    chosen = [name for name, module in model.named_modules() if "norm" in type(module).__name__.lower() and name]
    return shortest_names(chosen, _names(model))


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules()]


def _unmatched(model: nn.Module, targets: tuple[str, ...], of: str) -> list[Problem]:
    if targets in ((AUTO,), (ALL_LINEAR,)):
        return []
    names = _names(model)
    return [
        Problem(f'targets={target} matches no module of "{of}"', "memscope profile shows the modules of a model")
        for target in targets
        if not any(matches(name, target) for name in names)
    ]


def _is_prompt(kind: Any) -> bool:
    return any(base.__name__ == "PromptLearningConfig" for base in kind.__mro__)


def _is_transformers_model(model: nn.Module) -> bool:
    return any(kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__)


def _task_of(model: nn.Module) -> str:
    name = type(model).__name__
    return next((task for end, task in _TASKS.items() if name.endswith(end)), "FEATURE_EXTRACTION")
