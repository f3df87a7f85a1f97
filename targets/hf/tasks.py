"""What a model is trained for, and the class of transformers for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from memscope.errors import UsageError, nearest
from memscope.targets.hf.libraries import needed
from memscope.targets.hf.sources import ModelSource

__all__ = ["AUTO", "Trained", "class_and_task"]

AUTO = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "image-classification": "AutoModelForImageClassification",
    "image-text": "AutoModelForImageTextToText",
    "speech-seq2seq": "AutoModelForSpeechSeq2Seq",
    "ctc": "AutoModelForCTC",
}
"""Task → class of transformers that chooses the model's own."""

_ENDINGS = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForMaskedLM": "masked-lm",
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
    "ForCTC": "ctc",
}
"""End of the name of a class that computes its loss → task."""


@dataclass(frozen=True)
class Trained:
    """What a model is trained as."""

    model_class: Any
    """A class of transformers, or an Auto class for code that comes with the model."""
    task: str


def _task_of(made: type, config: Any) -> str:
    """The task of a class that computes its loss.

    Raises:
        UsageError: memscope does not know what such a class is trained on.
    """
    name = made.__name__
    for ending, task in _ENDINGS.items():
        if name.endswith(ending):
            return task
    if name.endswith(("ForConditionalGeneration", "ForSpeechSeq2Seq", "WithLMHeadModel")):
        if getattr(made, "main_input_name", "") in ("input_features", "input_values"):
            return "speech-seq2seq"
        return "image-text" if hasattr(config, "vision_config") else "seq2seq"
    raise UsageError(
        f"{name} is trained on inputs that memscope does not know: set task=TASK ({', '.join(AUTO)}), or write "
        "a target of your own (docs/profile-your-own-model.md)"
    )


def class_and_task(config: Any, task: str | None, source: ModelSource) -> Trained:
    """The class of a configuration: that of `task`, or its own first architecture, or the one with a language model.

    Raises:
        UsageError: the configuration has no class for the task.
    """
    transformers = needed("transformers")
    if type(config).__module__.startswith("transformers_modules."):
        own = task or _remote_task(source)
        return Trained(getattr(transformers, AUTO[own]), own)
    named = (source.values.get("architectures") or [""])[0]
    if task is None and _has_loss(named):
        found = getattr(transformers, named, None)
        if found is None:
            version = transformers.__version__
            raise UsageError(f'{source.place}: transformers {version} has no class "{named}": choose --set task=TASK')
        return Trained(found, _task_of(found, config))
    chosen = [task] if task else list(AUTO) if named else ["causal-lm"]
    for one in chosen:
        mapping = getattr(transformers, AUTO[one])._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            return Trained(found[0] if isinstance(found, (list, tuple)) else found, one)
    possible = [name for name in AUTO if type(config) in getattr(transformers, AUTO[name])._model_mapping]
    raise UsageError(
        f"{source.place}: a {config.model_type} model has no class for {task or 'causal-lm'}: "
        f"{nearest(task or '', possible)}"
    )


def _has_loss(name: str) -> bool:
    return name.endswith((*_ENDINGS, "ForConditionalGeneration", "ForSpeechSeq2Seq", "WithLMHeadModel"))


def _remote_task(source: ModelSource) -> str:
    """The task of code that comes with a model, by the classes that its auto_map replaces."""
    replaced = source.values.get("auto_map", {})
    return next((task for task, name in AUTO.items() if name in replaced), "causal-lm")
