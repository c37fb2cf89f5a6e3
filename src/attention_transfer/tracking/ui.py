"""The MLflow UI on the study's own store."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import NoReturn

from attention_transfer.errors import StudyError
from attention_transfer.tracking.database import (
    ENVIRONMENT,
    address,
    artifact_uri,
    connect,
    is_server,
    redacted,
)


def command(root: Path, *, port: int, host: str) -> list[str]:
    """The server's command line. One worker: four take four times the memory and longer to start."""
    return [
        *(sys.executable, "-m", "mlflow", "server"),
        *("--backend-store-uri", address(root)),
        *("--default-artifact-root", artifact_uri(root), "--artifacts-destination", artifact_uri(root)),
        *("--host", host, "--port", str(port), "--workers", "1"),
    ]


def check_free(root: Path, *, port: int, host: str = "127.0.0.1") -> None:
    """Whether a server can be started here.

    Raises:
        StudyError: the store is a server already, or the port is taken.
    """
    uri = address(root)
    if is_server(uri):
        raise StudyError(
            f"{redacted(uri)} is a server already",
            where="MLFLOW_TRACKING_URI",
            remedy=f"open {redacted(uri)} in a browser, or unset MLFLOW_TRACKING_URI to see the local store",
        )
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise StudyError(
                f"cannot be listened on: {error.strerror}",
                where=f"{host}:{port}",
                remedy=f"choose another port: make ui PORT={port + 1}; or open the server that is running there",
            ) from error


def serve(root: Path, *, port: int, host: str = "127.0.0.1") -> NoReturn:
    """Replaces this process by `mlflow server`; it answers after up to half a minute.

    Raises:
        StudyError: the store is a server already or cannot be opened, or the port is taken.
    """
    check_free(root, port=port, host=host)
    uri = address(root)
    try:
        connect(root)  # the server must not make the database while a stage does
    except Exception as error:  # whatever mlflow, the database or its driver raises
        raise StudyError(
            f"cannot be opened: {redacted(f'{type(error).__name__}: {error}')[:300]}",
            where=redacted(uri),
            remedy="start that database, or unset MLFLOW_TRACKING_URI to see the local one",
        ) from error
    os.execve(sys.executable, command(root, port=port, host=host), {**ENVIRONMENT, **os.environ})
