"""Published weights by their name in timm: what timm says of them, and the file that it would load."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from timm.models import PretrainedCfg, get_pretrained_cfg, is_model, list_pretrained
from timm.models import load_model_config_from_hf as hub_config

from attention_transfer.config import HUB
from attention_transfer.errors import StudyError
from attention_transfer.models.releases import Normalisation

FILES = ("model.safetensors", "pytorch_model.bin")
"""On the Hub, the first that is there."""
OURS = frozenset({"img_size", "in_chans", "num_classes", "global_pool", "dynamic_img_size"})
"""Arguments that a model on the Hub may give beside its entry: those that a student has of its own."""


@dataclass(frozen=True)
class Tagged:
    """What timm says of published weights.

    Attributes:
        entry: of timm.
        image_size: in pixels.
        images: how they were normalised.
        license: as timm states it, if it does.
        source: the id on the Hub, or an address.
        files: of which the first that is there has the weights.
    """

    entry: str
    image_size: int
    images: Normalisation
    license: str | None
    source: str
    files: tuple[str, ...]


def tagged(name: str, *, where: str) -> Tagged:
    """What timm says of `<entry>.<tag>`, without network, or the Hub of `hf-hub:<owner>/<model>`.

    Args:
        where: file and key of the name, for error messages.

    Raises:
        StudyError: there is no such name, or it cannot be asked for.
    """
    if name.startswith(HUB):
        return _on_hub(name, where=where)
    entry = name.partition(".")[0]
    if not is_model(entry) or name not in list_pretrained(f"{entry}*"):
        names = list_pretrained(f"{entry}.*")[:8] or difflib.get_close_matches(name, list_pretrained(), n=5)
        known = ", ".join(names) or "timm.list_pretrained() has all"
        raise StudyError(
            f"{name} is no published model of timm", where=where, remedy=f"choose one that is: {known}"
        )
    return _of(entry, get_pretrained_cfg(name), where=where)


def file(found: Tagged, *, where: str) -> Path:
    """The file with the weights, in the cache where timm keeps it, downloaded if it is not there yet.

    Raises:
        StudyError: it is not there and cannot be downloaded: where it has to be put.
    """
    try:
        if "://" in found.source:
            return _by_address(found.source)
        return _from_hub(found)
    except (OSError, HfHubHTTPError) as error:
        raise _missing(found.source, found.files[0], error, where=where) from error


def _from_hub(found: Tagged) -> Path:
    model, _, revision = found.source.partition("@")
    for number, each in enumerate(found.files, start=1):
        try:
            return Path(hf_hub_download(model, each, revision=revision or None))
        except LocalEntryNotFoundError:  # no network: whether the Hub has it is not known
            if number == len(found.files):
                raise
        except EntryNotFoundError:
            if number == len(found.files):
                raise
    raise AssertionError("no file is named")


def _by_address(address: str) -> Path:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / address.rsplit("/", 1)[-1]
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(address, str(path), progress=False)
    return path


def _on_hub(name: str, *, where: str) -> Tagged:
    model = name.removeprefix(HUB)
    try:
        settings, entry, changed = hub_config(model)
    except (OSError, HfHubHTTPError) as error:
        raise _missing(model, "config.json", error, where=where) from error
    except (KeyError, ValueError) as error:
        raise StudyError(
            f"{name} is no model in timm's format: its config.json names no entry of timm",
            where=where,
            remedy="choose one that timm.create_model opens, or bring its weights with kind: file",
        ) from error
    if other := sorted(changed.keys() - OURS):
        raise StudyError(
            f"{name} changes {', '.join(other)} of {entry}, so that no student could be built like it",
            where=where,
            remedy="choose a model that is what its entry builds",
        )
    return _of(entry, PretrainedCfg(**settings), where=where)


def _of(entry: str, settings: PretrainedCfg, *, where: str) -> Tagged:
    values: Any = settings
    if values.hf_hub_id:
        files = (values.hf_hub_filename,) if values.hf_hub_filename else FILES
        source = values.hf_hub_id
    elif values.url and not values.custom_load:
        files, source = (values.url.rsplit("/", 1)[-1],), values.url
    else:
        raise StudyError(
            f"{entry} has no weights that timm loads as PyTorch's",
            where=where,
            remedy="choose another tag, or bring the weights with kind: file",
        )
    images = (tuple(values.mean), tuple(values.std))
    return Tagged(entry, values.input_size[-1], images, values.license, source, files)


def _missing(source: str, name: str, error: Exception, *, where: str) -> StudyError:
    """What to do without a network."""
    if "://" in source:
        place = f"{Path(torch.hub.get_dir()) / 'checkpoints'} (TORCH_HOME says where that is)"
        how = f"download {source} elsewhere, and put it there: {place}"
    else:
        model = source.partition("@")[0]
        folder = Path(constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}"
        how = (
            f"where there is a network, `hf download {model} {name}` (and config.json); copy the folder that it makes, "
            f"models--{model.replace('/', '--')}, to {folder} (HF_HOME says where that is)"
        )
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return StudyError(
        f"{source} is not on this machine, and cannot be downloaded ({reason})",
        where=where,
        remedy=f"{how}; or bring the file with kind: file",
    )
