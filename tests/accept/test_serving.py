"""Acceptance of the server on SmolLM2: clients, load, batching, faults, fuzzing of the API. `make accept`."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.server.harness import Running, start_server

pytestmark = pytest.mark.accept

WORDS = (
    "river",
    "stone",
    "light",
    "engine",
    "garden",
    "letter",
    "window",
    "winter",
    "music",
    "number",
    "paper",
    "silver",
)
LOAD_REQUESTS, LOAD_CLIENTS, LOAD_SAMPLE = 300, 32, 30
FAULTS = 20


@pytest.fixture(scope="module")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    running = start_server(smollm2, tmp_path_factory.mktemp("serve"), name="smollm2", faulty=False)
    yield running
    assert running.stop() == 0


SCRIPT = """
import json, sys, openai
client = openai.OpenAI(base_url=sys.argv[1], api_key="unused", max_retries=0)
options = dict(model="smollm2", messages=[{"role": "user", "content": "Name a river."}], max_tokens=24, temperature=0)
whole = client.chat.completions.create(**options)
chunks = list(client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **options))
text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
assert text == whole.choices[0].message.content and text
assert chunks[-1].usage == whole.usage and whole._request_id
try:
    client.chat.completions.create(**(options | {"model": "another"}))
except openai.NotFoundError as e:
    assert e.code == "model_not_found"
else:
    raise SystemExit("no error")
print(json.dumps([openai.__version__, text]))
"""


@pytest.fixture(scope="module")
def sdks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both generations of OpenAI's library, each in a directory."""
    folders = {}
    for major in ("2", "3"):
        folders[major] = tmp_path_factory.mktemp("openai") / major
        install = [sys.executable, "-m", "pip", "install", "-q", "--target", str(folders[major]), f"openai=={major}.*"]
        subprocess.run(install, check=True, capture_output=True)
    return folders


def test_openai_clients_of_both_generations_and_curl(server: Running, sdks: dict[str, Path]) -> None:
    texts = []
    for major, target in sdks.items():
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, server.url + "/v1"],
            env={**os.environ, "PYTHONPATH": str(target)}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        version, text = json.loads(done.stdout)
        assert version.startswith(major + ".")
        texts.append(text)
    body = {"model": "smollm2", "messages": [{"role": "user", "content": "Name a river."}]}
    body |= {"max_tokens": 24, "temperature": 0}
    curl = ["curl", "-sN", server.url + "/v1/chat/completions", "-H", "Content-Type: application/json", "-d"]
    whole = subprocess.run([*curl, json.dumps(body)], capture_output=True, check=True).stdout
    texts.append(json.loads(whole)["choices"][0]["message"]["content"])
    streamed = subprocess.run([*curl, json.dumps(body | {"stream": True})], capture_output=True, check=True).stdout
    events = streamed.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    deltas = [json.loads(e[6:])["choices"][0]["delta"] for e in events[:-2]]
    texts.append("".join(d.get("content") or "" for d in deltas))
    assert len(set(texts)) == 1


RECEIPTS = """
import sys
from veriattn.client import VerifiedOpenAI
url, folder, digest = sys.argv[1:]
with VerifiedOpenAI(url, "unused", model_digests=[digest]) as client:
    for i, options in enumerate([{"temperature": 0}, {"temperature": 0.9, "top_p": 0.95}, {"stream": True, "seed": 7}]):
        answer = client.openai.chat.completions.create(
            model="smollm2", messages=[{"role": "user", "content": "Tell me about rivers."}], max_tokens=64, **options
        )
        if options.get("stream"):
            list(answer)
        found = client.verify()
        # Without a TEE there is no quote; all the rest holds.
        assert found.verdict == "NOT VERIFIED" and not found.failed(), found.failed()
        assert all(step.startswith("quote.") for step in found.skipped()), found.skipped()
        client.bundle().save(f"{folder}/{i}.json")
"""


def test_receipts_and_replay(server: Running, smollm2: Path, sdks: dict[str, Path], tmp_path: Path) -> None:
    digest = server.get("/v1/models").json()["data"][0]["veriattn"]["model_digest"]
    source = str(Path(__file__).parents[2] / "src")
    for major, target in sdks.items():
        folder = tmp_path / major
        folder.mkdir()
        environment = {**os.environ, "PYTHONPATH": f"{target}{os.pathsep}{source}"}
        command = [sys.executable, "-c", RECEIPTS, server.url + "/v1", str(folder), digest]
        subprocess.run(command, env=environment, check=True)
        costs = []
        for bundle in sorted(folder.iterdir()):
            replay = ["receipt", "replay", str(bundle), "-m", str(smollm2), "--json"]
            done = subprocess.run(
                [sys.executable, "-m", "veriattn", *replay], env=environment, capture_output=True, text=True, check=True
            )
            found = json.loads(done.stdout.splitlines()[-1])
            assert found["verdict"] == "MATCH"
            costs.append(found["timing"]["ms_per_output_token"])
        assert len(costs) == 3
        print(f"\nreplay (receipts through SDK {major}): {', '.join(f'{c:.1f}' for c in costs)} ms per output token")


def request_of(i: int) -> dict[str, Any]:
    """Request i of the load: lengths from 4 to 200 words of prompt and 4 to 48 tokens of answer."""
    rng = random.Random(i)
    prompt = " ".join(rng.choices(WORDS, k=rng.choice([4, 8, 16, 40, 200])))
    return {
        "model": "smollm2", "prompt": prompt, "max_tokens": rng.randint(4, 48), "seed": i, "ignore_eos": True,
        "temperature": rng.choice([0, 0.8]), "stream": rng.random() < 0.5,
    }  # fmt: skip


async def answer(client: httpx.AsyncClient, url: str, body: dict[str, Any], cancel_after: int | None = None) -> Any:
    """The text, an error's code as ("error", code, text so far), or None where it was cancelled."""
    text, seen = "", 0
    async with client.stream("POST", url + "/v1/completions", json=body) as response:
        if not body["stream"] or response.status_code != 200:
            data = json.loads(await response.aread())
            return data["choices"][0]["text"] if "choices" in data else ("error", data["error"]["code"], "")
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return text
            if line.startswith("data: "):
                event = json.loads(line[6:])
                if "error" in event:
                    return ("error", event["error"]["code"], text)
                text += event["choices"][0]["text"]
                seen += 1
                if cancel_after is not None and seen >= cancel_after:
                    return None
    return ("cut", "", text)


def rss_bytes(server: Running) -> int:
    text = Path(f"/proc/{server.process.pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("VmRSS"))


def test_load(server: Running) -> None:
    cancelled = set(random.Random(1).sample(range(LOAD_REQUESTS), LOAD_REQUESTS // 100))
    memory: list[int] = []

    async def run() -> dict[int, Any]:
        pending, results = list(range(LOAD_REQUESTS)), {}

        async def worker(client: httpx.AsyncClient) -> None:
            while pending:
                i = pending.pop(0)
                body = request_of(i) | ({"stream": True, "max_tokens": 48} if i in cancelled else {})
                results[i] = await answer(client, server.url, body, 2 if i in cancelled else None)
                if len(results) % 50 == 0:
                    memory.append(rss_bytes(server))

        limits = httpx.Limits(max_connections=LOAD_CLIENTS)
        async with httpx.AsyncClient(timeout=600, limits=limits) as client:
            await asyncio.gather(*(worker(client) for _ in range(LOAD_CLIENTS)))
        return results

    started = time.monotonic()
    results = asyncio.run(run())
    wall_s = time.monotonic() - started
    assert sorted(results) == list(range(LOAD_REQUESTS))
    assert all(results[i] is None for i in cancelled)
    assert all(isinstance(r, str) for i, r in results.items() if i not in cancelled), "a request was lost"

    async def alone() -> list[tuple[int, Any]]:
        sample = random.Random(2).sample(sorted(set(range(LOAD_REQUESTS)) - cancelled), LOAD_SAMPLE)
        async with httpx.AsyncClient(timeout=600) as client:
            return [(i, await answer(client, server.url, request_of(i))) for i in sample]

    for i, text in asyncio.run(alone()):
        assert text == results[i]
    tokens = sum(request_of(i)["max_tokens"] for i in results)
    growth = memory[-1] / memory[1]
    print(f"\nload: {LOAD_REQUESTS} requests, {tokens} tokens in {wall_s:.0f} s; RSS {[m >> 20 for m in memory]} MiB")
    assert growth < 1.1
    assert server.metric("vllm:num_requests_running") == 0


def test_batching_pays(server: Running) -> None:
    """Aggregate decode throughput of 8 concurrent requests against 1, medians of runs that alternate."""

    async def rate(client: httpx.AsyncClient, concurrent: int, tokens: int) -> float:
        async def one(i: int) -> tuple[float, float]:
            body = {"model": "smollm2", "prompt": f"Story {i}:", "max_tokens": tokens, "temperature": 0}
            body |= {"ignore_eos": True, "stream": True, "veriattn": {"events": True}}
            first = 0.0
            async with client.stream("POST", server.url + "/v1/completions", json=body) as response:
                async for _ in response.aiter_raw():
                    first = first or time.monotonic()
            return first, time.monotonic()

        times = await asyncio.gather(*(one(i) for i in range(concurrent)))
        # From the last first token on, every request decodes.
        return concurrent * (tokens - 1) / (max(t[1] for t in times) - min(t[0] for t in times))

    async def run() -> tuple[list[float], list[float]]:
        async with httpx.AsyncClient(timeout=600) as client:
            await rate(client, 8, 16)
            pairs = [(await rate(client, 1, 64), await rate(client, 8, 64)) for _ in range(7)]
        return [a for a, _ in pairs], [b for _, b in pairs]

    ones, eights = asyncio.run(run())
    one, eight = statistics.median(ones), statistics.median(eights)
    print(f"\nbatching: {one:.1f} tokens/s alone, {eight:.1f} for 8 together, ratio {eight / one:.2f}")
    assert eight / one >= 3


def test_faults_at_random_moments_under_load(smollm2: Path, tmp_path: Path) -> None:
    toml = "[prover]\nrequest_retries = 40\nmax_restarts = 40\nmax_backoff_s = 0.5\n[engine]\nmax_sequences = 6\n"
    server = start_server(smollm2, tmp_path, toml, name="smollm2")
    rng = random.Random(5)
    bodies = [request_of(i) | {"stream": True, "max_tokens": 24 + i % 16} for i in range(12)]
    stop, recoveries, answers = threading.Event(), list[float](), list[tuple[int, Any]]()

    async def truths() -> list[Any]:
        async with httpx.AsyncClient(timeout=600) as client:
            return [await answer(client, server.url, b) for b in bodies]

    truth = asyncio.run(truths())

    async def load() -> None:
        async def worker(client: httpx.AsyncClient, k: int) -> None:
            while not stop.is_set():
                i = (k * 5 + len(answers)) % len(bodies)
                answers.append((i, await answer(client, server.url, bodies[i])))

        async with httpx.AsyncClient(timeout=600) as client:
            await asyncio.gather(*(worker(client, k) for k in range(10)))

    thread = threading.Thread(target=lambda: asyncio.run(load()))
    thread.start()
    for n in range(FAULTS):
        time.sleep(rng.uniform(0.3, 1.5))
        before = server.metric("veriattn:sessions_total")
        if n % 2:
            for pid in server.prover_pids():
                os.kill(pid, signal.SIGKILL)
        else:
            server.trigger.write_text("lie")
        began = time.monotonic()
        while server.metric("veriattn:sessions_total") == before:
            assert time.monotonic() - began < 10
            time.sleep(0.02)
        server.wait_ready(seconds=10)
        recoveries.append(time.monotonic() - began)
    stop.set()
    thread.join(120)
    assert not thread.is_alive()
    ended = [a for _, a in answers if isinstance(a, str)]
    for i, got in answers:
        if isinstance(got, str):
            assert got == truth[i]
        else:
            kind, code, text = got
            assert kind == "error"
            assert code in ("freivalds_mismatch", "attention_mismatch")
            assert truth[i].startswith(text), "an unverified byte was sent"
    print(
        f"\nfaults: {FAULTS}; {len(ended)} answers complete, {len(answers) - len(ended)} ended with an error; "
        f"ready again after {statistics.median(recoveries):.1f} s (median), {max(recoveries):.1f} s (most)"
    )
    # A lie is about one request of the step; the others are computed again and finish.
    assert len(answers) - len(ended) <= FAULTS // 2
    assert server.stop() == 0


def test_fuzzing_the_api_finds_no_server_error(tmp_path: Path) -> None:
    from tests.helpers import make_model

    make_model(tmp_path / "tiny", vocab_size=260)
    server = start_server(tmp_path / "tiny", tmp_path / "run", faulty=False)
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", server.url + "/openapi.json",
        "--checks", "not_a_server_error", "--max-examples", "200", "--seed", "1",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    print("\n" + "\n".join(done.stdout.splitlines()[-6:]))
    assert done.returncode == 0, done.stdout[-4000:]
    statuses = [line["status"] for line in server.lines if line["event"] == "request"]
    assert len(statuses) > 1000
    ready = [line for line in server.lines if line.get("path") == "/ready"]
    assert sum(s >= 500 for s in statuses) == sum(line["status"] == 503 for line in ready)  # before it was ready
    assert server.stop() == 0
