"""A `python` for tests that starts a stage at once: as a fork of a process that has the libraries loaded.

A stage imports torch, timm and others for 4 s before its work, and the tests start hundreds. `folder` is put in front
of PATH; the `python` in it hands a script of pipeline/ or benchmarks/ over to a server, with its arguments,
environment, folder and open files, and becomes everything else by exec. What the server has loaded is none of the
project's code, which each fork imports from where PYTHONPATH says. Signals reach the stage, and it dies with its
`python`, be that killed.

Stages that are to die with DVC are started by the ordinary `python`: those that the environment variable COLD_STAGES
names, with commas between. So is everything where OMP_NUM_THREADS, which counts when torch is loaded, is another.

python tests/warm_python.py SOCKET    is the server
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

LIBRARIES = (
    "torch",
    "timm",
    "torchvision",
    "safetensors.torch",
    "pandas",
    "pydantic",
    "yaml",
    "scipy.stats",
    "sklearn.linear_model",
    "matplotlib.figure",
    "altair",
    "jinja2",
    "tqdm",
)
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}  # that libraries read when they are loaded
HEARD: dict[int, Any] = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
    signal.SIGHUP: signal.SIG_DFL,
}  # by a process that Python has started
CLIENT = """#!{python} -IS
import os, sys
script = sys.argv[1] if len(sys.argv) > 1 else ""
place, _, name = script.rpartition("/")
cold = place.split("/")[-1] not in ("pipeline", "benchmarks")
named = name.removesuffix(".py") in os.environ.get("COLD_STAGES", "").split(",")
if cold or named or any(os.environ.get(name) != value for name, value in {settings}.items()):
    os.execv("{python}", ["{python}", *sys.argv[1:]])
import json, signal, socket
server = socket.socket(socket.AF_UNIX)
server.connect("{socket}")
heard = [number for number in {heard} if signal.getsignal(number) != signal.SIG_IGN]
request = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ), heard]).encode()
socket.send_fds(server, [len(request).to_bytes(4)], [0, 1, 2])
server.sendall(request)
def told():
    found = server.recv(4, socket.MSG_WAITALL)
    return int.from_bytes(found) if len(found) == 4 else sys.exit("the server of warm stages has ended")
pid = told()
for number in heard:
    signal.signal(number, lambda number, frame: os.kill(pid, number))
status = os.waitstatus_to_exitcode(told())
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
    os.kill(os.getpid(), -status)
os._exit(status)
"""


@contextlib.contextmanager
def folder(place: Path) -> Iterator[Path]:
    """One whose `python` is warm while the block lasts; elsewhere than on Linux it is empty.

    Args:
        place: an empty folder, with a short path: that of a socket has 107 characters at most.
    """
    if sys.platform != "linux":
        yield place
        return
    path, python = place / "socket", Path(sys.executable).parent / "python"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    server = subprocess.Popen([python, __file__, path], env=environment | SETTINGS, start_new_session=True)
    try:
        while not path.exists():
            assert server.poll() is None, "the server of warm stages has ended"
            time.sleep(0.05)
        client = place / "python"
        client.write_text(
            CLIENT.format(python=python, socket=path, settings=SETTINGS, heard=[*map(int, HEARD)])
        )
        client.chmod(0o755)
        yield place
    finally:
        server.terminate()
        server.wait()


@dataclass(frozen=True)
class Request:
    """What `python SCRIPT ..` was asked to be.

    Attributes:
        heard: numbers of the signals that it does not ignore.
        files: its input, output and errors.
    """

    arguments: list[str]
    folder: str
    environment: dict[str, str]
    heard: list[int]
    files: list[int]

    @classmethod
    def read(cls, connection: socket.socket) -> Request:
        size, files, _, _ = socket.recv_fds(connection, 4, 3)
        told = connection.recv(int.from_bytes(size), socket.MSG_WAITALL)
        arguments, folder, environment, heard = json.loads(told)
        return cls(arguments, folder, environment, heard, files)


def serve(path: str) -> list[str]:
    """Answers clients for ever; returns in each fork, with the arguments of its stage."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"{path}.new")
    listening.listen(16)
    Path(f"{path}.new").rename(path)  # it is seen once it can be connected to
    waiting = selectors.DefaultSelector()
    waiting.register(listening, selectors.EVENT_READ)
    stages: dict[Any, tuple[int, int, socket.socket]] = {}  # by connection and by file of the process
    while True:
        for key, _ in waiting.select():
            if key.fileobj is listening:
                connection, _ = listening.accept()
                request = Request.read(connection)
                if (pid := os.fork()) == 0:
                    listening.close()
                    connection.close()
                    waiting.close()
                    for _, process, other in set(stages.values()):
                        os.close(process)
                        other.close()
                    become(request)
                    return request.arguments
                for file in request.files:
                    os.close(file)
                connection.sendall(pid.to_bytes(4))
                process = os.pidfd_open(pid)
                for waited in (process, connection):
                    waiting.register(waited, selectors.EVENT_READ)
                    stages[waited] = (pid, process, connection)
            elif key.fileobj in stages:
                pid, process, connection = stages[key.fileobj]
                if key.fileobj is connection:  # its client is gone
                    os.kill(pid, signal.SIGKILL)
                _, status = os.waitpid(pid, 0)
                with contextlib.suppress(OSError):
                    connection.sendall(status.to_bytes(4))
                for waited in (process, connection):
                    waiting.unregister(waited)
                    del stages[waited]
                os.close(process)
                connection.close()


def become(request: Request) -> None:
    """Makes this process what was asked for."""
    for number, file in enumerate(request.files):
        os.dup2(file, number)
        os.close(file)
    # A shell that puts work into the background has it ignore Ctrl-C.
    for signalled, usual in HEARD.items():
        signal.signal(signalled, usual if signalled in request.heard else signal.SIG_IGN)
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    sys.argv = request.arguments
    own = [folder for folder in request.environment.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:1] = [str(Path(request.arguments[0]).absolute().parent), *own]


def main(path: str) -> NoReturn:
    for module in LIBRARIES:
        __import__(module)
    script = Path(serve(path)[0]).absolute()
    sys.modules["__main__"] = stage = types.ModuleType("__main__")  # runpy would change sys.argv
    stage.__file__ = str(script)
    try:
        exec(compile(script.read_bytes(), script, "exec"), vars(stage))
    except SystemExit as ended:
        end(ended.code)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        end(-signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1)
    end(0)


def end(code: object) -> NoReturn:
    """As the interpreter ends, but for taking down all that is loaded, which takes seconds.

    Args:
        code: as `sys.exit` takes it; or the negative number of a signal.
    """
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
    number = code if isinstance(code, int) else int(code is not None)
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if number < 0:
        signal.signal(-number, signal.SIG_DFL)
        os.kill(os.getpid(), -number)
    os._exit(number)


if __name__ == "__main__":
    main(sys.argv[1])
