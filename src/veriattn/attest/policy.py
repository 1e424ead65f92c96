"""What a client accepts: pinned measurements of guest images, state of platforms, model digests, soundness.

A policy is the client's own file. There are no defaults for measurements, and no policy without them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from veriattn.attest.canonical import Json, parse_object
from veriattn.errors import AttestationError, ConfigError

FORMAT = "veriattn-policy/1"

#: AMD's root for Milan, by SHA-256 of its certificate (DER). Other processors have other roots: pin theirs.
MILAN_ARK_SHA256 = "69d063b45344d26a2e94e1f4210de49ef555308287d4c174445c95639a540bcd"

#: States of a platform that a policy may accept beside UpToDate; a revoked or outdated one cannot be accepted.
ACCEPTABLE_STATUSES = ("SWHardeningNeeded", "ConfigurationNeeded", "ConfigurationAndSWHardeningNeeded")


def _hex(value: object, digits: int, what: str) -> str:
    if not isinstance(value, str) or not re.fullmatch(rf"[0-9a-f]{{{digits}}}", value):
        raise ConfigError(f"policy: {what} is not {digits} lowercase hexadecimal digits")
    return value


def _object(value: object, names: set[str], required: set[str], what: str) -> Json:
    if not isinstance(value, dict):
        raise ConfigError(f"policy: {what} is not an object")
    if not required <= set(value) <= names:
        odd = sorted((required - set(value)) | (set(value) - names))
        raise ConfigError(f"policy: {what}: missing or unknown members: {', '.join(odd)}")
    return value


def _strings(value: object, what: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise ConfigError(f"policy: {what} is not a list of strings")
    return tuple(value)


def _natural(value: object, what: str) -> int:
    if type(value) is not int or value < 0:
        raise ConfigError(f"policy: {what} is not a natural number")
    return value


@dataclass(frozen=True)
class TdxImage:
    """All measurements of one guest image: firmware (mr_td), its configuration (rt_mr0), kernel and command line (rt_mr1,
    rt_mr2), workload (rt_mr3); 96 hex digits each. The owner's registers must be zero unless they are pinned too."""

    name: str
    mr_td: str
    rt_mr0: str
    rt_mr1: str
    rt_mr2: str
    rt_mr3: str
    mr_config_id: str | None = None
    mr_owner: str | None = None
    mr_owner_config: str | None = None

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name != "name" and value is not None:
                _hex(value, 96, f"{f.name} of image {self.name!r}")

    def required(self) -> dict[str, str]:
        return {n: getattr(self, n) for n in ("mr_td", "rt_mr0", "rt_mr1", "rt_mr2", "rt_mr3")}

    def optional(self, default: str) -> dict[str, str]:
        return {n: getattr(self, n) or default for n in ("mr_config_id", "mr_owner", "mr_owner_config")}


@dataclass(frozen=True)
class TdxPolicy:
    """Which TDX guests are accepted."""

    images: tuple[TdxImage, ...]
    accepted_statuses: tuple[str, ...] = ()
    rejected_advisories: tuple[str, ...] = ()
    min_tcb_evaluation_data_number: int = 0
    allow_smt: bool = True

    def __post_init__(self) -> None:
        if not self.images:
            raise ConfigError("policy: tdx pins no image", hint="measurements must be pinned")
        for status in self.accepted_statuses:
            if status not in ACCEPTABLE_STATUSES:
                raise ConfigError(
                    f"policy: status {status!r} cannot be accepted", hint=f"one of {', '.join(ACCEPTABLE_STATUSES)}"
                )


@dataclass(frozen=True)
class SevSnpImage:
    """Launch measurement (96 hex digits) and host data (64, zero unless pinned) of one guest image."""

    name: str
    measurement: str
    host_data: str = "00" * 32

    def __post_init__(self) -> None:
        _hex(self.measurement, 96, f"measurement of image {self.name!r}")
        _hex(self.host_data, 64, f"host_data of image {self.name!r}")


@dataclass(frozen=True)
class SevSnpPolicy:
    """Which SEV-SNP guests are accepted. `tcb_floor` has boot_loader, tee, snp and microcode."""

    images: tuple[SevSnpImage, ...]
    tcb_floor: dict[str, int]
    ark_sha256: str = MILAN_ARK_SHA256
    max_vmpl: int = 0

    def __post_init__(self) -> None:
        if not self.images:
            raise ConfigError("policy: sev-snp pins no image", hint="measurements must be pinned")
        _hex(self.ark_sha256, 64, "ark_sha256")


@dataclass(frozen=True)
class Policy:
    """A client's whole policy. Without `tdx` or `sev_snp` no attestation can pass."""

    tdx: TdxPolicy | None = None
    sev_snp: SevSnpPolicy | None = None
    model_digests: tuple[str, ...] = ()
    min_soundness_bits: int = 98

    @classmethod
    def from_json(cls, data: Json) -> Policy:
        """Parse a policy file's contents. Raises: ConfigError naming the member."""
        names = {"format", "tdx", "sev-snp", "model_digests", "min_soundness_bits"}
        data = _object(data, names, {"format"}, "the file")
        if data["format"] != FORMAT:
            raise ConfigError(f"policy: format is not {FORMAT}")
        return cls(
            _tdx(data["tdx"]) if "tdx" in data else None,
            _sev_snp(data["sev-snp"]) if "sev-snp" in data else None,
            tuple(_hex(d, 64, "a model digest") for d in _strings(data.get("model_digests", []), "model_digests")),
            _natural(data.get("min_soundness_bits", 98), "min_soundness_bits"),
        )

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """Read a policy file. Raises: ConfigError."""
        try:
            raw = Path(path).read_bytes()
        except OSError as e:
            raise ConfigError(f"cannot read the policy {path}: {e.strerror}") from None
        try:
            return cls.from_json(parse_object(raw, f"policy {path}"))
        except AttestationError as e:
            raise ConfigError(e.message) from None


def _images(value: object, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise ConfigError(f"policy: {what} is not a list")
    return value


def _tdx(value: object) -> TdxPolicy:
    names = {"images", "accepted_statuses", "rejected_advisories", "min_tcb_evaluation_data_number", "allow_smt"}
    data = _object(value, names, {"images"}, "tdx")
    known = {f.name for f in fields(TdxImage)}
    required = known - {"mr_config_id", "mr_owner", "mr_owner_config"}
    images = [TdxImage(**_object(i, known, required, "a tdx image")) for i in _images(data["images"], "tdx images")]
    allow_smt = data.get("allow_smt", True)
    if type(allow_smt) is not bool:
        raise ConfigError("policy: allow_smt is not true or false")
    return TdxPolicy(
        tuple(images),
        _strings(data.get("accepted_statuses", []), "accepted_statuses"),
        _strings(data.get("rejected_advisories", []), "rejected_advisories"),
        _natural(data.get("min_tcb_evaluation_data_number", 0), "min_tcb_evaluation_data_number"),
        allow_smt,
    )


def _sev_snp(value: object) -> SevSnpPolicy:
    data = _object(value, {"images", "tcb_floor", "ark_sha256", "max_vmpl"}, {"images", "tcb_floor"}, "sev-snp")
    parts = {"boot_loader", "tee", "snp", "microcode"}
    floor = _object(data["tcb_floor"], parts, parts, "tcb_floor")
    known, required = {"name", "measurement", "host_data"}, {"name", "measurement"}
    images = [SevSnpImage(**_object(i, known, required, "a sev-snp image")) for i in _images(data["images"], "images")]
    return SevSnpPolicy(
        tuple(images),
        {n: _natural(floor[n], n) for n in sorted(parts)},
        _hex(data.get("ark_sha256", MILAN_ARK_SHA256), 64, "ark_sha256"),
        _natural(data.get("max_vmpl", 0), "max_vmpl"),
    )
