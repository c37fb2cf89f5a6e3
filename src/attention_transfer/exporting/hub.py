"""Uploads an exported folder to the Hugging Face hub, or to whatever HF_ENDPOINT names."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is that of the library beneath
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from attention_transfer.errors import StudyError


def require(repository: str) -> None:
    """StudyError unless the name is one of a repository and there is a token: said before any work is done."""
    try:
        validate_repo_id(repository)
        if "/" not in repository:
            raise HFValidationError("it has no owner")
    except HFValidationError as error:
        raise StudyError(
            f"{repository!r} is no name of a repository: {error}",
            where="--push",
            remedy="give OWNER/NAME, such as someone/flowers-distill",
        ) from error
    if get_token() is None:
        raise StudyError(
            "there is no token of the Hugging Face hub on this machine",
            where=f"--push {repository}",
            remedy="make one that may write, on the hub's page of access tokens, then: hf auth login; or set HF_TOKEN",
        )


def upload(folder: Path, repository: str, *, public: bool) -> str:
    """One commit with all files of the folder; the repository is made if there is none. Its address.

    Args:
        public: whether anyone may read it. A repository that is there keeps what it is.

    Raises:
        StudyError: it is there, and public although that was not asked for; or the hub refuses, or cannot be reached.
    """
    api = HfApi()
    try:
        if not public and _is_public(api, repository):
            raise StudyError(
                "is there already, and anyone may read it",
                where=f"--push {repository}",
                remedy="say that this is meant: --public; or name another repository",
            )
        address = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Export {folder.name}")
    except (HTTPError, OSError, ValueError) as error:  # of the connection, of the hub, of its checks
        reason = [*str(error).strip().splitlines(), type(error).__name__][0]
        raise StudyError(
            f"could not be uploaded: {reason}",
            where=f"--push {repository}",
            remedy=f"look at connection and token (hf auth whoami); {folder} is whole, and can be uploaded later: "
            f"the same command again, or hf upload {repository} {folder}",
        ) from error
    return str(address)


def _is_public(api: HfApi, repository: str) -> bool:
    try:
        return not api.model_info(repository).private
    except RepositoryNotFoundError:
        return False
