"""`veriattn serve`: put the parts together, listen, and end in good order."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn

from veriattn.attest.keys import TlsKey
from veriattn.attest.providers import QuoteCache, open_provider
from veriattn.attest.service import ReceiptService
from veriattn.attest.store import ReceiptStore
from veriattn.engine.engine import Engine, EngineConfig
from veriattn.engine.strategies import Strategy
from veriattn.errors import EXIT_INTERNAL, EXIT_OK, EXIT_PROVER
from veriattn.server import logs
from veriattn.server.app import create_app
from veriattn.server.auth import KeyStore
from veriattn.server.config import ServerConfig
from veriattn.server.driver import EngineDriver
from veriattn.server.metrics import Metrics
from veriattn.server.service import Service
from veriattn.server.tamper import TamperSwitch
from veriattn.server.tls import open_tls
from veriattn.verifier.launch import ChildProver, Launcher, Prover, RemoteProver, builtin_prover
from veriattn.verifier.model import VerifierModel

log = logging.getLogger("veriattn.server")


def engine_config(config: ServerConfig) -> EngineConfig:
    """The engine's settings; it retries nothing itself, since the driver decides who pays for a fault."""
    e = config.engine
    strategy: Strategy = e.strategy  # type: ignore[assignment]
    return EngineConfig(
        strategy=strategy,
        prefill_chunk=e.prefill_chunk,
        max_sequences=e.max_sequences,
        kv_tokens=e.kv_tokens,
        device=e.device,
        prover_command=e.prover_command or None,
        prover_address=e.prover_address or None,
        prover_kv_tokens=e.prover_kv_tokens or None,
        prover_threads=e.prover_threads or None,
        start_timeout_s=e.start_timeout_s,
        step_timeout_s=e.step_timeout_s,
        retries=0,
        expected_digest=e.expected_digest or None,
    )


def launcher(config: ServerConfig) -> Launcher:
    """How provers are started: as child processes, or by connecting to one that listens."""
    e = config.engine

    def launch(model: VerifierModel) -> Prover:
        if e.prover_address:
            return RemoteProver(e.prover_address, e.step_timeout_s)
        command = e.prover_command or builtin_prover(e.device)
        return ChildProver(model, command, e.prover_threads or None, e.step_timeout_s)

    return launch


def receipt_service(config: ServerConfig, name: str, tls_key: TlsKey | None) -> ReceiptService | None:
    """Keys, quotes and the store. Raises: ConfigError."""
    r = config.receipts
    if not r.enabled:
        return None
    provider = open_provider(r.provider)
    directory = Path(r.directory) if r.directory else None
    return ReceiptService(
        provider,
        subject=name,
        tls_keys=() if tls_key is None else (tls_key,),
        store=ReceiptStore(directory, retention_s=r.retention_s, max_receipts=r.max_receipts),
        key_lifetime_s=r.key_lifetime_s,
        rotate_before_s=r.rotate_before_s,
        quotes=QuoteCache(provider, per_minute=r.quotes_per_minute),
    )


class _Server(uvicorn.Server):
    """uvicorn with a drain: SIGTERM and SIGINT refuse new work, let the rest finish, and then end what is left properly."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._loop: asyncio.AbstractEventLoop | None = None
        self.died = False

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        self._loop = asyncio.get_running_loop()
        self._loop.add_signal_handler(signal.SIGHUP, self._reload_keys)
        await super().startup()
        if self.started:
            for server in self.servers:
                for sock in server.sockets:
                    log.info("listening", extra={"address": list(sock.getsockname()[:2])})

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, a second one gives up what is left."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        service = self._service
        if service.draining or self._loop is None:
            return
        service.draining = True
        log.info("draining")
        self._loop.call_later(service.config.limits.drain_timeout_s, service.refuse_all)

    def _reload_keys(self) -> None:
        problem = self._service.reload_keys()
        log.log(logging.INFO if problem is None else logging.ERROR, problem or "API keys read again")

    def end_by_fault(self) -> None:
        """From the engine's thread: it has died, and so shall we."""
        self.died = True
        self.should_exit = True


def serve(
    model: Path, config: ServerConfig, *, launch: Launcher | None = None, on_bytes: Callable[[int], None] | None = None
) -> int:
    """Serve until a signal comes. Returns the exit code.

    launch: how provers are started; default: as child processes. Raises: ConfigError, ModelError, UsageError.
    """
    logs.configure(config.log_level)
    keys = KeyStore(Path(config.keys_file) if config.keys_file else None)
    name = config.served_name or model.resolve().name
    tls = open_tls(config.tls)
    receipts = receipt_service(config, name, None if tls is None else tls[1])
    switch = TamperSwitch()
    log.info("reading the model", extra={"path": str(model)})
    with Engine(
        model, engine_config(config), launch=switch.wrap(launch or launcher(config)), on_bytes=on_bytes
    ) as engine:
        metrics = Metrics(name)
        server: list[_Server] = []

        def on_death() -> None:
            for s in server:
                s.end_by_fault()

        driver = EngineDriver(engine, config.prover, metrics, switch, on_death)
        service = Service(config, engine, driver, metrics, keys, receipts)
        uvicorn_config = uvicorn.Config(
            create_app(service),
            host=config.host,
            port=config.port,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=75,
            # A little longer than the drain, after which every request has been answered with an error.
            timeout_graceful_shutdown=int(config.limits.drain_timeout_s) + 3,
            h11_max_incomplete_event_size=64 << 10,
            ssl_context_factory=None if tls is None else lambda *_: tls[0],
        )
        if config.receipts.enabled and receipts is not None and receipts.provider_name == "test":
            log.warning("no TEE: receipts are signed, and attested by nothing")
        server.append(_Server(uvicorn_config, service))
        driver.start()
        try:
            server[0].run()
        finally:
            driver.stop()
        if server[0].died:
            return EXIT_PROVER if driver.condition.canary == "missed" else EXIT_INTERNAL
        return EXIT_OK if server[0].started else EXIT_INTERNAL
