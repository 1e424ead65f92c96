"""Reports from the kernel's configfs-tsm interface: one directory per request, 64 bytes in, evidence out.

Trust: the kernel of this guest. What comes out is checked by whoever verifies the quote, not here; here it is only made
sure that the answer belongs to the question (`generation`) and comes from the device that was asked for (`provider`).
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from veriattn.errors import AttestationUnavailable

TSM_ROOT = Path("/sys/kernel/config/tsm/report")
REPORT_DATA_BYTES = 64
_MAX_BLOB_BYTES = 1 << 20
_RETRIES = 5


@dataclass(frozen=True)
class TsmReport:
    """What the kernel gave: a quote or report, and what comes with it (the certificate table on SEV-SNP)."""

    provider: str
    outblob: bytes
    auxblob: bytes = b""


def _read(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts, size = [], 0
        while chunk := os.read(fd, 65536):
            parts.append(chunk)
            size += len(chunk)
            if size > _MAX_BLOB_BYTES:
                raise AttestationUnavailable(f"{path.name} of configfs-tsm is larger than {_MAX_BLOB_BYTES} bytes")
        return b"".join(parts)
    finally:
        os.close(fd)


def _write(path: Path, data: bytes) -> None:
    # One write: the kernel takes each write as a whole value.
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        if os.write(fd, data) != len(data):
            raise AttestationUnavailable(f"a short write to {path.name} of configfs-tsm")
    finally:
        os.close(fd)


class TsmInterface:
    """Requests reports under `root`. The two directory operations are parameters because in configfs they create and
    remove files as well, which a test's directory needs help with."""

    def __init__(
        self,
        root: Path = TSM_ROOT,
        *,
        make_directory: Callable[[Path], None] = os.mkdir,
        remove_directory: Callable[[Path], None] = os.rmdir,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self.root = root
        self._make, self._remove, self._pause = make_directory, remove_directory, pause

    def available(self) -> bool:
        """Whether the kernel offers it, and it is mounted."""
        return self.root.is_dir()

    def provider(self) -> str | None:
        """The name of this guest's report device, or None where there is none."""
        if not self.available():
            return None
        try:
            directory = self._open()
        except AttestationUnavailable:
            return None
        try:
            return _read(directory / "provider").decode("ascii", "replace").strip()
        except OSError:
            return None
        finally:
            self._close(directory)

    def _open(self) -> Path:
        directory = self.root / f"veriattn-{os.getpid()}-{secrets.token_hex(8)}"
        try:
            self._make(directory)
        except OSError as e:
            raise AttestationUnavailable(
                f"cannot open a configfs-tsm report under {self.root}: {e.strerror}",
                hint="run inside a TDX or SEV-SNP guest with CONFIG_TSM_REPORTS, configfs mounted, as root",
            ) from None
        return directory

    def report(self, data: bytes, expected_provider: str, *, privlevel: int | None = None) -> TsmReport:
        """Ask for a report over 64 bytes. Raises: AttestationUnavailable."""
        if len(data) != REPORT_DATA_BYTES:
            raise AttestationUnavailable(f"report data is {REPORT_DATA_BYTES} bytes, not {len(data)}")
        directory = self._open()
        try:
            return self._request(directory, data, expected_provider, privlevel)
        except OSError as e:
            reason = errno.errorcode.get(e.errno or 0, str(e.errno))
            raise AttestationUnavailable(
                f"configfs-tsm failed with {reason} at {Path(str(e.filename or directory)).name}",
                hint="the kernel gives up on the quoting service after 30 s: see that it runs on the host",
            ) from None
        except ValueError:
            raise AttestationUnavailable("configfs-tsm gives a generation that is no number") from None
        finally:
            self._close(directory)

    def _close(self, directory: Path) -> None:
        """Remove a report; one that stays behind costs the kernel a little memory and hides no result."""
        with contextlib.suppress(OSError):
            self._remove(directory)

    def _request(self, directory: Path, data: bytes, expected_provider: str, privlevel: int | None) -> TsmReport:
        provider = _read(directory / "provider").decode("ascii", "replace").strip()
        if provider != expected_provider:
            raise AttestationUnavailable(f"this guest's report device is {provider!r}, not {expected_provider!r}")
        generation = int(_read(directory / "generation"))
        if privlevel is not None:
            _write(directory / "privlevel", str(privlevel).encode())
            generation += 1
        _write(directory / "inblob", data)
        generation += 1
        outblob = self._patiently(directory / "outblob")
        auxblob = _read(directory / "auxblob") if expected_provider == "sev_guest" else b""
        if int(_read(directory / "generation")) != generation:
            raise AttestationUnavailable("another writer interfered with the report request")
        if not outblob:
            raise AttestationUnavailable("configfs-tsm gave an empty report")
        return TsmReport(provider, outblob, auxblob)

    def _patiently(self, path: Path) -> bytes:
        """Quotes are serialised by the kernel: busy means wait, a few times."""
        for attempt in range(_RETRIES):
            try:
                return _read(path)
            except OSError as e:
                if e.errno not in (errno.EBUSY, errno.EINTR, errno.ETIMEDOUT) or attempt == _RETRIES - 1:
                    raise
                self._pause(0.2 * 2**attempt)
        raise AttestationUnavailable("configfs-tsm stays busy")
