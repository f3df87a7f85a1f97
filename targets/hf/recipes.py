"""Read a recipe: an axolotl YAML, a TrainingArguments JSON, or a PEFT adapter."""

from __future__ import annotations

from pathlib import Path

from memscope.errors import UsageError
from memscope.targets.hf import recipe_axolotl, recipe_peft, recipe_trainer
from memscope.targets.hf.files import read_json, read_yaml
from memscope.targets.hf.hub import fetch
from memscope.targets.hf.program import HfRecipe
from memscope.targets.hf.sources import ADAPTER, CONFIG, is_on_hub

__all__ = ["read_recipe", "recipe_file"]


def recipe_file(text: str) -> Path | None:
    """The file of the recipe that `hf:WHAT` names; None if WHAT is a model."""
    path = Path(text).expanduser()
    if path.is_dir():
        return path / ADAPTER if (path / ADAPTER).is_file() and not (path / CONFIG).is_file() else None
    if not path.is_file() or path.name == CONFIG:
        return None
    if path.suffix in (".yml", ".yaml"):
        return path
    return path if path.suffix == ".json" and "model_type" not in read_json(path) else None


def read_recipe(text: str) -> HfRecipe:
    """The recipe in a file, or the adapter in a folder or on the hub.

    Raises:
        UsageError: the recipe cannot be read or used; the message names the key.
    """
    path = Path(text).expanduser()
    if is_on_hub(text):
        return recipe_peft.read(read_json(fetch(text, ADAPTER)), text)
    if path.is_dir():
        if not (path / ADAPTER).is_file():
            raise UsageError(f"{path}: the folder has no {ADAPTER}, so it is not a PEFT adapter")
        path = path / ADAPTER
    if not path.exists():
        raise UsageError(
            f"{path}: no such recipe: expected an axolotl YAML, a TrainingArguments JSON or an adapter folder"
        )
    if path.suffix in (".yml", ".yaml"):
        return recipe_axolotl.read(read_yaml(path), str(path))
    if path.suffix == ".bin":
        raise UsageError(
            f"{path}: a pickle, which memscope does not open because it may run code: write the arguments as JSON, "
            'open("training_args.json", "w").write(args.to_json_string())'
        )
    values = read_json(path)
    if "peft_type" in values:
        return recipe_peft.read(values, str(path))
    if recipe_trainer.is_one(values):
        return recipe_trainer.read(values, str(path))
    raise UsageError(
        f"{path}: not a recipe: expected TrainingArguments (args.to_json_string()), an {ADAPTER}, or an axolotl YAML"
    )
