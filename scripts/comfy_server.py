"""Start a real ComfyUI with the pack in it, and drive it over HTTP as an API client does."""

from __future__ import annotations

import json
import mimetypes
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from environment import PACK_FOLDER

if TYPE_CHECKING:
    from typing import Self

START_SECONDS = 600  # on a busy machine; one that has ended is seen at once
STOP_SECONDS = 10
POLL_SECONDS = 0.1
LOG_TAIL_LINES = 40
COLOUR_CODE = re.compile(r"\x1b\[[0-9;]*m")
NOT_PART_OF_A_PACK = shutil.ignore_patterns(".git", "__pycache__", "output", ".venv", ".*_cache")

Workflow = Mapping[str, Mapping[str, Any]]
"""A workflow in API format: node id to class_type and inputs."""


class ComfyError(RuntimeError):
    """What ComfyUI answered instead of a result."""


class ServerFailed(ComfyError):
    """ComfyUI did not start, or ended while it was being used."""


class WorkflowRefused(ComfyError):
    """ComfyUI's validation did not accept a workflow."""


class ExecutionFailed(ComfyError):
    """A node raised while a workflow was executed."""


class ExecutionInterrupted(ComfyError):
    """A workflow was cancelled while it was executed."""


class ComfyClient:
    """The HTTP API of a ComfyUI that is already running."""

    def __init__(self, address: str) -> None:
        self.address = address

    def object_info(self, node: str | None = None) -> dict[str, Any]:
        """The description of all nodes by id, or of one node."""
        if node is None:
            return self.get("/object_info")
        found = self.get(f"/object_info/{quote(node)}")
        if node not in found:
            raise KeyError(f"ComfyUI knows no node {node!r}: look for the pack's import error in the log.")
        return found[node]

    def upload_image(self, path: Path) -> str:
        """Put a picture into the input folder; returns the name that a LoadImage node takes."""
        boundary = uuid.uuid4().hex
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        head = f'Content-Disposition: form-data; name="image"; filename="{path.name}"\r\nContent-Type: {kind}\r\n\r\n'
        tail = '\r\nContent-Disposition: form-data; name="overwrite"\r\n\r\ntrue\r\n'
        edge = f"--{boundary}"
        body = f"{edge}\r\n{head}".encode() + path.read_bytes() + f"\r\n{edge}{tail}{edge}--\r\n".encode()
        answer = self._request("/upload/image", body, f"multipart/form-data; boundary={boundary}")
        stored = json.loads(answer)
        return f"{stored['subfolder']}/{stored['name']}" if stored["subfolder"] else stored["name"]

    def post(self, workflow: Workflow, client_id: str | None = None) -> str:
        """Queue a workflow and return its prompt id."""
        request: dict[str, Any] = {"prompt": workflow}
        if client_id is not None:
            request["client_id"] = client_id
        try:
            answer = self._post("/prompt", request)
        except urllib.error.HTTPError as error:
            raise WorkflowRefused(_refusal(json.loads(error.read()))) from error
        if answer["node_errors"]:
            # Some outputs were valid and are being made; a caller wants to know of the others all the same.
            raise WorkflowRefused(_refusal(answer))
        return answer["prompt_id"]

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """The record of a workflow that has ended, None while it waits or runs."""
        return self.get(f"/history/{prompt_id}").get(prompt_id)

    def is_running(self, prompt_id: str) -> bool:
        """Whether the workflow is being executed now."""
        return any(item[1] == prompt_id for item in self.get("/queue")["queue_running"])

    def wait(self, prompt_id: str, timeout: float = 600) -> dict[str, Any]:
        """Wait until a workflow has ended; returns its history record, raises when it failed."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            entry = self.history(prompt_id)
            if entry is not None:
                _raise_failure(entry)
                return entry
            time.sleep(POLL_SECONDS)
        raise TimeoutError(f"The workflow {prompt_id} did not end within {timeout:g} s.")

    def run(self, workflow: Workflow, timeout: float = 600) -> dict[str, Any]:
        """Queue a workflow, wait for it, return its history record."""
        return self.wait(self.post(workflow), timeout)

    def interrupt(self) -> None:
        """Cancel what is being executed."""
        self._post("/interrupt", {})

    def delete(self, prompt_id: str) -> None:
        """Take a workflow that waits out of the queue."""
        self._post("/queue", {"delete": [prompt_id]})

    def free(self) -> None:
        """Ask for models to be unloaded and cached results dropped, as the "free memory" button does."""
        self._post("/free", {"unload_models": True, "free_memory": True})

    def view(self, filename: str, subfolder: str = "", type: str = "output") -> bytes:
        """The content of a file in the output, input or temp folder."""
        return self._request("/view?" + urlencode({"filename": filename, "subfolder": subfolder, "type": type}))

    @staticmethod
    def events(entry: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        """What happened during an execution, in order: name and data of each message of a history record."""
        return [(name, data) for name, data in entry["status"]["messages"]]

    @classmethod
    def cached_nodes(cls, entry: Mapping[str, Any]) -> set[str]:
        """The ids of the nodes that were not executed because an earlier result could be used."""
        return {node for name, data in cls.events(entry) if name == "execution_cached" for node in data["nodes"]}

    def get(self, path: str) -> Any:
        """The JSON that ComfyUI answers with at a path."""
        return json.loads(self._request(path))

    def _post(self, path: str, content: Mapping[str, Any]) -> Any:
        answer = self._request(path, json.dumps(content).encode(), "application/json")
        return json.loads(answer) if answer else None

    def _request(self, path: str, body: bytes | None = None, kind: str | None = None) -> bytes:
        headers = {"Content-Type": kind} if kind else {}
        request = urllib.request.Request(self.address + path, data=body, headers=headers)
        with _opener.open(request, timeout=60) as response:
            return response.read()


class ComfyServer(ComfyClient):
    """A ComfyUI process with the pack installed, as a context manager.

    Args:
        comfyui: the folder with ComfyUI's ``main.py``.
        python: an interpreter that has ComfyUI's packages.
        base: ComfyUI's base directory, created when missing: models, input, output and custom nodes.
        pack: the checkout, linked (or copied) into the custom nodes; None leaves them as they are.
        port: 0 takes a free one.
        extra_args: more command line arguments for ``main.py``.
        cpu: compute on the CPU.
        insightface_root: a folder to link as ``models/insightface``.
    """

    def __init__(
        self,
        comfyui: Path,
        python: Path,
        base: Path,
        pack: Path | None,
        port: int = 0,
        extra_args: Sequence[str] = (),
        cpu: bool = True,
        insightface_root: Path | None = None,
    ) -> None:
        self.port = port or _free_port()
        super().__init__(f"http://127.0.0.1:{self.port}")
        self.comfyui = comfyui
        self.python = python
        self.base = base
        self.pack = pack
        self.extra_args = ("--cpu",) * cpu + tuple(extra_args)
        self.insightface_root = insightface_root
        self.log_file = base / "comfyui.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._lay_out_base()
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                self._command(), cwd=self.comfyui, env=_environment(), stdout=log, stderr=subprocess.STDOUT
            )
        try:
            self._wait_until_served()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    @property
    def pid(self) -> int:
        """The number of the running process."""
        if self._process is None:
            raise ServerFailed("ComfyUI is not running.")
        return self._process.pid

    def log_text(self) -> str:
        """What ComfyUI has printed so far, without colour codes."""
        return COLOUR_CODE.sub("", self.log_file.read_text(encoding="utf-8", errors="replace"))

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """As ComfyClient.history, with the log's end when ComfyUI itself has ended."""
        self._require_alive()
        return super().history(prompt_id)

    def _lay_out_base(self) -> None:
        for folder in ("models", "input", "output", "custom_nodes"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        if self.pack is not None:
            _link(self.pack, self.base / "custom_nodes" / PACK_FOLDER)
        if self.insightface_root is not None:
            _link(self.insightface_root, self.base / "models" / "insightface")

    def _command(self) -> list[str]:
        address = ("--listen", "127.0.0.1", "--port", str(self.port), "--disable-auto-launch")
        storage = ("--base-directory", str(self.base), "--database-url", "sqlite:///:memory:")
        return [str(self.python), "main.py", *address, *storage, *self.extra_args]

    def _wait_until_served(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            self._require_alive()
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(POLL_SECONDS)
        raise ServerFailed(f"ComfyUI did not answer on port {self.port} in {START_SECONDS} s.{self._log_tail()}")

    def _require_alive(self) -> None:
        code = None if self._process is None else self._process.poll()
        if code is not None:
            raise ServerFailed(f"ComfyUI ended with exit code {code}.{self._log_tail()}")

    def _log_tail(self) -> str:
        lines = self.log_text().splitlines()[-LOG_TAIL_LINES:]
        return f" The end of {self.log_file}:\n" + "\n".join(lines)

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


# A proxy set for the outside world must not see requests to this machine.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _environment() -> dict[str, str]:
    """The server's environment: no accelerator, output at once, and no look at a model hub behind a test's back."""
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}


# Of a range that is this process's own, below those that the system gives to whoever asks: a server takes seconds until
# it listens, and another process must not take its port meanwhile.
_first_port = 10_000 + 200 * (os.getpid() % 100)
_ports = iter(range(_first_port, _first_port + 200))


def _free_port() -> int:
    for port in _ports:
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise ServerFailed("There is no free port left: a process starts at most 200 servers.")


def _link(source: Path, link: Path) -> None:
    """Make ``link`` show ``source``: a symbolic link, or a copy where the system allows none."""
    if link.is_symlink():
        link.unlink()
    elif link.exists():
        shutil.rmtree(link)
    try:
        link.symlink_to(source.resolve(), target_is_directory=True)
    except OSError:
        shutil.copytree(source, link, ignore=NOT_PART_OF_A_PACK)


def _refusal(answer: Mapping[str, Any]) -> str:
    """ComfyUI's reasons for refusing a workflow, one line each."""
    lines = [f"{answer['error']['message']} {answer['error'].get('details', '')}".strip()] if "error" in answer else []
    for node, problem in answer["node_errors"].items():
        reasons = "; ".join(f"{error['message']}: {error['details']}" for error in problem["errors"])
        lines.append(f"node {node} ({problem['class_type']}): {reasons}")
    return "\n".join(lines)


def _raise_failure(entry: Mapping[str, Any]) -> None:
    for name, data in ComfyClient.events(entry):
        if name == "execution_interrupted":
            raise ExecutionInterrupted(f"The workflow was interrupted in node {data['node_id']} ({data['node_type']}).")
        if name == "execution_error":
            where = f"node {data['node_id']} ({data['node_type']})"
            raise ExecutionFailed(f"{where}: {data['exception_type']}: {data['exception_message'].strip()}")
