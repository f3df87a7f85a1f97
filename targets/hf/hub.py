"""Fetch one small file of a model from the hub, through huggingface_hub and its cache."""

from __future__ import annotations

from pathlib import Path

from memscope.errors import UsageError, nearest
from memscope.targets.hf.catalogue import load_catalogue
from memscope.targets.hf.libraries import needed

__all__ = ["fetch"]

_PATIENCE_SECONDS = 10.0


def fetch(repository: str, file: str) -> Path:
    """The file's path in the cache of huggingface_hub; it is downloaded only if it is not there or has changed.

    `HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE` have the effect that they have for transformers.

    Raises:
        UsageError: the hub has no such model or file, does not let this user read it, or cannot be reached.
    """
    hub = needed("huggingface_hub")
    errors = needed("huggingface_hub.errors")
    try:
        if not isinstance(hub.try_to_load_from_cache(repository, file), str):
            # Asked once: the download would ask five times more, for 23 seconds, before it gives up.
            hub.get_hf_file_metadata(hub.hf_hub_url(repository, file), timeout=_PATIENCE_SECONDS)
        return Path(hub.hf_hub_download(repository, file))
    except errors.GatedRepoError as error:
        raise UsageError(
            f'the hub lets only users who were granted access read "{repository}": ask for access on its page, then '
            f"log in with `hf auth login`. {_instead(repository, file)}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UsageError(
            f'the hub has no model "{repository}", or it is private and HF_TOKEN has no access to it. '
            f"{_near(repository)}"
        ) from error
    except errors.EntryNotFoundError as error:
        if not isinstance(error, errors.LocalEntryNotFoundError):
            raise UsageError(f'"{repository}" has no {file} on the hub: it is not a model of transformers') from error
        raise _unreachable(repository, file) from error
    except Exception as error:  # of requests, httpx or httpx2: the libraries that releases of huggingface_hub use
        raise _unreachable(repository, file, f" ({_first_line(error)})") from error


def _unreachable(repository: str, file: str, why: str = "") -> UsageError:
    return UsageError(
        f'the hub cannot be reached{why}, and {file} of "{repository}" is not in the cache of huggingface_hub. '
        f"{_instead(repository, file)}"
    )


def _instead(repository: str, file: str) -> str:
    """How to do without the hub."""
    folder = repository.partition("/")[2]
    shipped = [name for name, model in load_catalogue().items() if model.source.lower() == repository.lower()]
    own = f"memscope ships its sizes: hf:{shipped[0]} (with a recipe: --set recipe=FILE). " if shipped else ""
    return (
        f"{own}Otherwise save https://huggingface.co/{repository}/resolve/main/{file} as {folder}/{file}, "
        f"and name that folder: hf:./{folder}"
    )


def _near(repository: str) -> str:
    names = {model.source: name for name, model in load_catalogue().items()}
    hint, _, _ = nearest(repository, names).partition("? Valid")
    return f"{hint}?" if hint.startswith("did you") else "Check its name on https://huggingface.co/models"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
