"""Where quotes come from: a TDX guest, a SEV-SNP guest, or `test`, which attests nothing and says so."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

from veriattn.attest.tsm import TsmInterface
from veriattn.errors import AttestationBusy, ConfigError

TEST_WARNING = "no TEE: this report proves nothing about the machine or the keys"

Evidence = dict[str, str]


class QuoteProvider(Protocol):
    """`name` is the report's `tee_type`. `evidence` gives a quote over 64 bytes. Raises: AttestationUnavailable."""

    @property
    def name(self) -> str: ...

    def evidence(self, report_data: bytes) -> Evidence: ...


class TdxProvider:
    """Quotes of an Intel TDX guest. `collateral` fetches Intel's signed collateral, so that clients need not."""

    name = "tdx"

    def __init__(self, tsm: TsmInterface | None = None, collateral: Callable[[bytes], str] | None = None) -> None:
        self._tsm, self._collateral = tsm or TsmInterface(), collateral

    def evidence(self, report_data: bytes) -> Evidence:
        quote = self._tsm.report(report_data, "tdx_guest").outblob
        out = {"quote": quote.hex()}
        if self._collateral is not None:
            out["collateral"] = self._collateral(quote)
        return out


class SevSnpProvider:
    """Reports of an AMD SEV-SNP guest, with the host's certificate table. `privlevel` is the VMPL, 0 the strongest."""

    name = "sev-snp"

    def __init__(self, tsm: TsmInterface | None = None, privlevel: int = 0) -> None:
        self._tsm, self._privlevel = tsm or TsmInterface(), privlevel

    def evidence(self, report_data: bytes) -> Evidence:
        report = self._tsm.report(report_data, "sev_guest", privlevel=self._privlevel)
        return {"report": report.outblob.hex(), "certificates": report.auxblob.hex()}


class TestProvider:
    """For machines without a TEE. There is nothing in its evidence that a verifier could mistake for a quote."""

    __test__ = False
    name = "test"

    def evidence(self, report_data: bytes) -> Evidence:
        return {"warning": TEST_WARNING}


def open_provider(name: str, tsm: TsmInterface | None = None) -> QuoteProvider:
    """The provider of that name; `auto` takes what this guest has and `test` where it has nothing.

    Raises: ConfigError for an unknown name.
    """
    tsm = tsm or TsmInterface()
    if name == "auto":
        name = {"tdx_guest": "tdx", "sev_guest": "sev-snp"}.get(tsm.provider() or "", "test")
    if name == "tdx":
        return TdxProvider(tsm)
    if name == "sev-snp":
        return SevSnpProvider(tsm)
    if name == "test":
        return TestProvider()
    raise ConfigError(f"unknown attestation provider {name!r}", hint="one of auto, tdx, sev-snp, test")


class QuoteCache:
    """One quote per key set and nonce, made one at a time and not faster than `per_minute` (after a burst of `burst`).

    Raises: AttestationBusy beyond the rate; whatever the provider raises, which is not cached.
    """

    def __init__(
        self,
        provider: QuoteProvider,
        *,
        max_entries: int = 256,
        per_minute: int = 60,
        burst: int = 16,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if min(max_entries, per_minute, burst) < 1:
            raise ConfigError("the quote cache needs positive limits")
        self.provider = provider
        self._max_entries, self._per_s, self._burst, self._clock = max_entries, per_minute / 60, burst, clock
        self._entries: OrderedDict[bytes, Evidence] = OrderedDict()
        self._tokens, self._at = float(burst), clock()
        self._lock = threading.Lock()

    def evidence(self, report_data: bytes) -> Evidence:
        """Evidence over this report data, which itself names the key set and the nonce."""
        with self._lock:
            cached = self._entries.get(report_data)
            if cached is None:
                self._take_token()
                cached = self.provider.evidence(report_data)
                self._entries[report_data] = cached
                if len(self._entries) > self._max_entries:
                    self._entries.popitem(last=False)
            else:
                self._entries.move_to_end(report_data)
            return dict(cached)

    def _take_token(self) -> None:
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._per_s)
        self._at = now
        if self._tokens < 1:
            wait = int((1 - self._tokens) / self._per_s) + 1
            raise AttestationBusy("too many attestation requests", wait, hint=f"try again in {wait} s")
        self._tokens -= 1
