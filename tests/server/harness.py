"""A real server process, its log and its HTTP interface, for tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


@dataclass
class Running:
    """A server process, its log and a way to talk to it."""

    process: subprocess.Popen[bytes]
    scheme: str
    trigger: Path
    lines: list[dict[str, Any]] = field(default_factory=list)
    raw: list[str] = field(default_factory=list)
    port: int = 0

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    def get(self, path: str, **kwargs: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=30, verify=False, **kwargs)

    def post(self, path: str, body: object, **kwargs: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60, verify=False, **kwargs)

    def chat(self, text: str = "hello", **fields: Any) -> httpx.Response:
        headers = fields.pop("headers", None)
        return self.post("/v1/chat/completions", chat_body(text, **fields), headers=headers)

    def wait_ready(self, wanted: bool = True, seconds: float = 60) -> dict[str, Any]:
        """What /ready says once it says `wanted`."""
        end = time.monotonic() + seconds
        while True:
            try:
                response = self.get("/ready")
                if (response.status_code == 200) == wanted:
                    return dict(response.json())
            except httpx.TransportError:
                pass
            if time.monotonic() > end or self.process.poll() is not None:
                raise AssertionError(f"not {'ready' if wanted else 'unready'} in time:\n" + "\n".join(self.raw[-20:]))
            time.sleep(0.02)

    def wait_for(self, event: str, seconds: float = 30, **fields: Any) -> dict[str, Any]:
        """The first log line of this event (with these fields)."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for line in list(self.lines):
                if line["event"] == event and all(line.get(k) == v for k, v in fields.items()):
                    return line
            if self.process.poll() is not None and end > time.monotonic() + 1:
                end = time.monotonic() + 1  # what it still has to say
            time.sleep(0.02)
        raise AssertionError(f"no {event!r} in the log:\n" + "\n".join(self.raw[-20:]))

    def metric(self, name: str, **labels: str) -> float:
        """The value of one series, 0 where there is none yet."""
        for line in self.get("/metrics").text.splitlines():
            if line.startswith(name + "{") and all(f'{k}="{v}"' in line for k, v in labels.items()):
                return float(line.rsplit(" ", 1)[1])
        return 0.0

    def prover_pids(self) -> list[int]:
        """Children of the server, but for those that have ended."""
        task = Path(f"/proc/{self.process.pid}/task")
        children = [int(p) for t in task.iterdir() for p in (t / "children").read_text().split()]
        return [p for p in children if "faulty_prover" in Path(f"/proc/{p}/cmdline").read_text(errors="replace")]

    def order(self, order: str) -> None:
        """Tell the prover what to do (see faulty_prover.py); a file appears whole. "" for honesty."""
        if not order:
            self.trigger.unlink(missing_ok=True)
            return
        new = self.trigger.with_suffix(".new")
        new.write_text(order)
        new.replace(self.trigger)

    def wait_metric(self, name: str, value: float, seconds: float = 60) -> None:
        """Until a metric has reached this value."""
        end = time.monotonic() + seconds
        while self.metric(name) < value:
            assert time.monotonic() < end, f"{name} stayed below {value}"
            time.sleep(0.005)

    def stop(self, seconds: float = 30) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def read_log(self) -> None:
        assert self.process.stderr is not None
        for raw in self.process.stderr:
            text = raw.decode(errors="replace").rstrip()
            self.raw.append(text)
            if text.startswith("{"):
                self.lines.append(json.loads(text))


def chat_body(text: str = "hello", **fields: Any) -> dict[str, Any]:
    return {
        "model": "tiny",
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 8,
        "temperature": 0,
    } | fields


Start = Callable[..., Running]


def start_server(
    model: Path,
    folder: Path,
    toml: str = "",
    *arguments: str,
    wait: bool = True,
    name: str = "tiny",
    faulty: bool = True,
) -> Running:
    """Start `veriattn serve` on a free port. With `faulty`, its prover is honest until the trigger tells otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    trigger = folder / "trigger"
    command = [sys.executable, str(HERE / "faulty_prover.py"), str(trigger)]
    prover = f"prover_command = {json.dumps(command)}\n" if faulty else ""
    # The [engine] table of a test, if it has one, comes last.
    top, _, engine = toml.partition("[engine]")
    (folder / "serve.toml").write_text(f"port = 0\nserved_name = '{name}'\n{top}\n[engine]\n{prover}{engine}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    serve = [sys.executable, "-m", "veriattn", "serve", "-m", str(model), "--config", str(folder / "serve.toml")]
    process = subprocess.Popen([*serve, "--threads", "1", *arguments], stderr=subprocess.PIPE, env=environment)
    running = Running(process, "https" if "[tls]" in toml else "http", trigger)
    threading.Thread(target=running.read_log, daemon=True).start()
    running.port = running.wait_for("listening")["address"][1]
    if wait:
        running.wait_ready()
    return running
