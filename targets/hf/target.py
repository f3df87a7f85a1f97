"""Models of Hugging Face's libraries, trained as these train them: the workload of `memscope profile hf:WHAT`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memscope.errors import UsageError, nearest
from memscope.targets.hf.adapters import adapted, read_adapter
from memscope.targets.hf.config import ARGUMENT, PRESETS
from memscope.targets.hf.config import HfConfig as Config
from memscope.targets.hf.inputs import inputs_for
from memscope.targets.hf.model import DTYPES, build_model, read_config
from memscope.targets.hf.optimizers import optimizer_factory, optimizer_notes
from memscope.targets.hf.program import Program, completed
from memscope.targets.hf.quantization import is_quantized_model, parse_quantization, prepared
from memscope.targets.hf.recipe_peft import plain
from memscope.targets.hf.recipes import read_recipe, recipe_file
from memscope.targets.hf.sources import ModelSource, find_model
from memscope.targets.hf.tasks import class_and_task
from memscope.workload.description import StepPlan, Workload

__all__ = ["ARGUMENT", "PRESETS", "Config", "build", "hf", "resolve"]


def hf(what: str | Path, **settings: Any) -> Callable[[], Workload]:
    """A function that builds the workload of a Hugging Face model, for `simulate` and `record`.

    Args:
        what: a folder with config.json, a name on the hub (`org/name`), a name that `memscope targets` lists, or a
            recipe: an axolotl YAML or a PEFT adapter folder.
        settings: those of `memscope targets`, such as `seq_len=2048`.

    Raises:
        UsageError: a setting is unknown. What is wrong with its value is reported when the workload is built.

    Examples:
        >>> import memscope
        >>> trace = memscope.simulate(memscope.hf("gpt2", seq_len=128, dtype="bf16"), device="cpu")
        >>> trace.by("category", at="peak")["parameter"]  # 124,439,808 parameters of two bytes
        248879616
    """
    names = [field.name for field in dataclasses.fields(Config)]
    for name in settings:
        if name not in names or name == ARGUMENT:
            raise TypeError(f'memscope.hf has no setting "{name}": {nearest(name, names)}')
    return partial(build, Config(model=str(what), **settings))


def build(config: Config) -> Workload:
    """Build the workload: the model, random inputs of its kind, and the optimizer.

    Raises:
        UsageError: the model, a recipe, a setting or a combination cannot be used.
    """
    program, source = resolve(config)
    hf_config = read_config(source, program)
    trained = class_and_task(hf_config, program.task, source)
    model = build_model(trained.model_class, hf_config, program, source)
    inputs = inputs_for(model, hf_config, program, trained.task)
    if program.adapter is not None:
        if is_quantized_model(model) and program.kbit_training:
            prepared(model)
        model = adapted(model, program.adapter, program.adapter_dtype)
    samples, length = program.micro_batch * program.accumulation, inputs.length
    return Workload(
        model=model,
        batches=[list(range(samples))],
        loss=_Loss(program),
        optimizer_factory=partial(_optimizer, optimizer_factory(program.optimizer), program),
        plan=_plan(program),
        name=source.name,
        split=inputs.split,
        packed=inputs.split_packed if trained.task == "causal-lm" and not program.packing else None,
        settings=_plain(program) | {"seq_len": length.tokens if length else None},
        notes=_notes(program, source, length.notes if length else ()),
        positions=length.positions if length else None,
    )


def resolve(config: Config) -> tuple[Program, ModelSource]:
    """The training program, and the model that it or its recipe names.

    Raises:
        UsageError: the model or a recipe cannot be found or used.
    """
    recipes = []
    named = recipe_file(config.model)
    if named is not None:
        recipes.append(read_recipe(str(named)))
    if config.recipe is not None:
        recipes.append(read_recipe(config.recipe))
    model = config.model
    if named is not None:
        bases = [recipe.settings["model"] for recipe in recipes if "model" in recipe.settings]
        if not bases:
            raise UsageError(
                f"{named}: names no model: give the model, and this file as its recipe: "
                f"hf:MODEL --set recipe={config.model}"
            )
        model = bases[0]
    said: dict[str, Any] = {"model": model}
    if config.adapter is not None:
        said["adapter"] = read_adapter(config.adapter)
    if config.quantization is not None:
        said["quantization"] = parse_quantization(config.quantization)
    if config.overrides is not None:
        said["overrides"] = _overrides(config.overrides)
    return completed(config, recipes, said), find_model(model)


def _overrides(text: str) -> dict[str, Any]:
    pairs = [word.partition("=") for word in text.split(",")]
    if not all(key and equal for key, equal, _ in pairs):
        raise UsageError(f'hf: overrides="{text}": expected KEY=VALUE joined by commas, such as num_hidden_layers=2')
    return {key: plain(value) for key, _, value in pairs}


def _plan(program: Program) -> StepPlan:
    return StepPlan(
        micro_batches=program.accumulation,
        autocast=None if program.autocast == "off" else DTYPES[program.autocast],
        grad_scaler=program.autocast == "fp16",
        clip_grad_norm=program.clip_grad_norm or None,
        keep_batch=program.keep_batch,
    )


def _notes(program: Program, source: ModelSource, of_length: Iterable[str]) -> tuple[str, ...]:
    return (*program.notes, *of_length, *_trusted(source, program), *optimizer_notes(program.optimizer))


def _optimizer(
    factory: Callable[[Iterable[nn.Parameter], nn.Module], torch.optim.Optimizer],
    program: Program,
    parameters: Iterable[nn.Parameter],
    model: nn.Module,
) -> torch.optim.Optimizer:
    optimizer = factory(parameters, model)
    steps = itertools.count()

    def stepped(*_: Any) -> None:
        if _empties_cache(program, "step", next(steps)):
            torch.cuda.empty_cache()

    optimizer.register_step_post_hook(stepped)
    return optimizer


def _empties_cache(program: Program, after: str, step: int) -> bool:
    """Whether the program empties the allocator's cache in this step, the first of which is 0: the effect is traced."""
    every = program.empty_cache_every
    return every is not None and program.empty_cache_after == after and step % every == 0


def _plain(program: Program) -> dict[str, Any]:
    """The program as JSON values, without its notes."""
    values = dataclasses.asdict(program)
    del values["notes"]
    return values


def _trusted(source: ModelSource, program: Program) -> list[str]:
    if source.values.get("auto_map") and program.trust_remote_code:
        return [f"{source.place}: Python code that comes with the model may have been run (trust_remote_code)"]
    return []


class _Loss:
    """The loss that the model computes itself, and what the Trainer does around it."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._steps = -1

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor | tuple[Tensor, Any]:
        self._steps += all(parameter.grad is None for parameter in model.parameters())
        loss, outputs = self._run(model, batch)
        if _empties_cache(self._program, "loss", self._steps):
            # `training_step` in transformers/trainer.py empties the cache between forward and backward.
            torch.cuda.empty_cache()
        return loss if outputs is None else (loss, outputs)

    def _run(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
        outputs = model(**batch)
        return outputs.loss, outputs if self._program.keep_outputs else None
