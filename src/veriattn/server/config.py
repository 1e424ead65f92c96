"""Settings of the server: a TOML file, checked strictly, and the digest of what is in force."""

from __future__ import annotations

import dataclasses
import ipaddress
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from veriattn.engine.strategies import STRATEGIES
from veriattn.errors import ConfigError

_SERVED_STRATEGIES = tuple(s for s in STRATEGIES if s != "dangerous-unverified")


@dataclass(frozen=True)
class TlsConfig:
    """PEM files, or `ephemeral`: a self-signed certificate whose key is drawn at start and never leaves memory or tmpfs."""

    certificate: str = ""
    key: str = ""
    ephemeral: bool = False
    server_name: str = "localhost"

    @property
    def enabled(self) -> bool:
        return self.ephemeral or bool(self.certificate)


@dataclass(frozen=True)
class EngineSettings:
    """What the engine and its prover may use. Lengths in tokens, times in seconds.

    device: where the built-in prover runs, `cpu` or `cuda`.
    prover_command: started here, as a child; default: the built-in one. prover_address: of one that listens, outside of the
    guest or on another machine (tcp://HOST:PORT, vsock://CID:PORT, unix:///PATH). prover_kv_tokens: cache entries that it
    holds for a sequence, 0 for all.
    """

    strategy: str = "run-ahead"
    prefill_chunk: int = 512
    max_sequences: int = 32
    kv_tokens: int = 1 << 16
    device: str = "cpu"
    prover_command: tuple[str, ...] = ()
    prover_address: str = ""
    prover_kv_tokens: int = 0
    prover_threads: int = 0
    start_timeout_s: float = 600.0
    step_timeout_s: float = 60.0
    expected_digest: str = ""


@dataclass(frozen=True)
class LimitSettings:
    """What a client may ask for, and when the server says no."""

    queue_length: int = 128
    tokens_in_flight: int = 1 << 18
    body_bytes: int = 4 << 20
    max_choices: int = 8
    default_max_tokens: int = 1024
    request_timeout_s: float = 600.0
    queue_timeout_s: float = 120.0
    drain_timeout_s: float = 30.0


@dataclass(frozen=True)
class ProverSettings:
    """What happens when a prover lies, dies or falls silent.

    request_retries: how often a request that was in the step of a faulty prover is computed again. One that the prover was
    caught lying about ends with an error. max_restarts: faults in a row before the server
    calls itself not ready; it goes on trying, every max_backoff_s at the latest.
    """

    request_retries: int = 2
    max_restarts: int = 5
    first_backoff_s: float = 0.1
    max_backoff_s: float = 15.0
    healthy_steps: int = 32


@dataclass(frozen=True)
class ReceiptSettings:
    """Receipts and attestation. provider: `auto`, `tdx`, `sev-snp` or `test`. directory: "" keeps receipts in memory."""

    enabled: bool = True
    provider: str = "auto"
    directory: str = ""
    retention_s: int = 86400
    max_receipts: int = 20_000
    key_lifetime_s: int = 7 * 86400
    rotate_before_s: int = 86400
    quotes_per_minute: int = 60


@dataclass(frozen=True)
class ServerConfig:
    """Everything that `veriattn serve` can be told. `keys_file` and `anonymous` say who may use it."""

    host: str = "127.0.0.1"
    port: int = 8000
    served_name: str = ""
    keys_file: str = ""
    anonymous: bool = False
    cors_origins: tuple[str, ...] = ()
    metrics_need_key: bool = False
    page: bool = True
    demo: bool = False
    log_level: str = "info"
    tls: TlsConfig = field(default_factory=TlsConfig)
    engine: EngineSettings = field(default_factory=EngineSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    prover: ProverSettings = field(default_factory=ProverSettings)
    receipts: ReceiptSettings = field(default_factory=ReceiptSettings)

    def __post_init__(self) -> None:
        _need(0 <= self.port < 65536, "port must be from 0 to 65535")
        _need(self.log_level in ("debug", "info", "warning", "error"), "log_level: debug, info, warning or error")
        _need(bool(self.tls.certificate) == bool(self.tls.key), "tls.certificate and tls.key belong together")
        _need(not (self.tls.certificate and self.tls.ephemeral), "tls.ephemeral and tls.certificate exclude each other")
        _need("*" not in self.cors_origins, "cors_origins must name origins; '*' would open the API to every page")
        _need(self.engine.device in ("cpu", "cuda"), "engine.device must be cpu or cuda")
        strategies = ", ".join(_SERVED_STRATEGIES)
        _need(self.engine.strategy in _SERVED_STRATEGIES, f"engine.strategy must be one of {strategies}")
        _need(
            self.receipts.rotate_before_s < self.receipts.key_lifetime_s, "rotate_before_s must be below key_lifetime_s"
        )
        _need(
            self.receipts.provider in ("auto", "tdx", "sev-snp", "test"),
            "receipts.provider must be auto, tdx, sev-snp or test",
        )
        for part in (self.engine, self.limits, self.prover, self.receipts):
            for f in dataclasses.fields(part):
                value = getattr(part, f.name)
                may_be_zero = f.name in (
                    "prover_threads",
                    "prover_kv_tokens",
                    "queue_length",
                    "request_retries",
                    "max_restarts",
                    "first_backoff_s",
                )
                if type(value) in (int, float):
                    _need(value > 0 or (may_be_zero and value == 0), f"{f.name} must be positive")
        _need(
            not (self.engine.prover_command and self.engine.prover_address),
            "engine.prover_command and engine.prover_address exclude each other",
        )
        _need(
            self.engine.strategy != "full-tee"
            or not (self.engine.prover_command or self.engine.prover_address or self.engine.device != "cpu"),
            "engine.strategy full-tee has no prover: leave prover_command, prover_address and device out",
        )
        _need(
            self.anonymous or bool(self.keys_file) or is_loopback(self.host),
            f"listening on {self.host} without API keys",
            hint="set keys_file (`veriattn api-key` makes keys), or anonymous = true if everyone may use it",
        )

    def effective(self) -> dict[str, Any]:
        """What shapes answers and checks, for the digest in receipts. Names nobody and holds no path to a secret."""
        parts = {name: dataclasses.asdict(getattr(self, name)) for name in ("engine", "limits", "prover")}
        return parts | {"demo": self.demo, "served_name": self.served_name}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a socket bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _need(ok: bool, what: str, hint: str | None = None) -> None:
    if not ok:
        raise ConfigError(what, hint=hint)


def load_config(path: Path | None, overrides: dict[str, Any] | None = None) -> ServerConfig:
    """Read a TOML file (or none) and lay `overrides` over it (None values do not count).

    Raises: ConfigError for unknown names, wrong types and values out of range.
    """
    data: dict[str, Any] = {}
    if path is not None:
        try:
            data = tomllib.loads(path.read_text("utf-8"))
        except OSError as e:
            raise ConfigError(f"cannot read {path}: {e.strerror}") from None
        except (UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
            raise ConfigError(f"{path} is not TOML: {e}") from None
    for name, value in (overrides or {}).items():
        if value is None:
            continue
        section, _, key = name.rpartition(".")
        target = data.setdefault(section, {}) if section else data
        if not isinstance(target, dict):
            raise ConfigError(f"{section} must be a table")
        target[key] = value
    config: ServerConfig = _build(ServerConfig, data, "")
    return config


def _build(cls: type[Any], data: object, where: str) -> Any:
    if not isinstance(data, dict):
        raise ConfigError(f"{where.rstrip('.')} must be a table")
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(data) - set(hints))
    if unknown:
        raise ConfigError(f"unknown setting {where}{unknown[0]}", hint=f"known here: {', '.join(sorted(hints))}")
    return cls(**{name: _value(hints[name], value, where + name) for name, value in data.items()})


def _value(kind: Any, value: object, name: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _build(typing.cast("type[Any]", kind), value, f"{name}.")
    if isinstance(typing.get_origin(kind), type) and typing.get_origin(kind) is tuple:
        if isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
            return tuple(value)
        raise ConfigError(f"{name} must be a list of strings")
    if kind is float and type(value) in (int, float):
        return float(typing.cast("float", value))
    if type(value) is not kind or isinstance(kind, types.UnionType):
        raise ConfigError(f"{name} must be of type {kind.__name__}")
    return value
