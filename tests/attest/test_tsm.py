"""The configfs-tsm path against a process that behaves like the kernel's files. No real TEE takes part.

A report's directory appears with its attributes, `inblob` and `outblob` are pipes that the other process reads and
writes, `generation` counts writes, a busy device answers late, and removing the directory removes the attributes, as
in configfs. What this cannot show: the kernel's own behaviour and a quoting enclave's.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from tests.attest.synthetic_tdx import NOW, SyntheticTdx, synthetic_image

from veriattn.attest.policy import TdxPolicy
from veriattn.attest.providers import SevSnpProvider, TdxProvider, open_provider
from veriattn.attest.quotes import TdxVerifier
from veriattn.attest.tsm import TsmInterface
from veriattn.errors import AttestationUnavailable


def _kernel(link: Connection, provider: str, extra_writes: int) -> None:
    """The fake kernel: serves one directory at a time until the link closes."""
    while True:
        try:
            command, path = link.recv()
        except EOFError:
            return
        directory = Path(path)
        if command == "make":
            os.mkdir(directory)
            (directory / "provider").write_text(provider + "\n")
            (directory / "generation").write_text("0\n")
            for name in ("inblob", "outblob", *(("privlevel", "auxblob") if provider == "sev_guest" else ())):
                os.mkfifo(directory / name)
            link.send(None)
            threading.Thread(target=_serve, args=(directory, provider, extra_writes), daemon=True).start()
        else:
            for file in directory.iterdir():
                file.unlink()
            os.rmdir(directory)
            link.send(None)


def _serve(directory: Path, provider: str, extra_writes: int) -> None:
    generation, privlevel = extra_writes, ""
    if provider == "sev_guest":
        privlevel = (directory / "privlevel").read_text()
        generation += 1
    data = (directory / "inblob").read_bytes()
    generation += 1
    (directory / "generation").write_text(f"{generation}\n")
    (directory / "outblob").write_bytes(b"quote:" + privlevel.encode() + data)
    if provider == "sev_guest":
        (directory / "auxblob").write_bytes(b"certificates")


class FakeKernel:
    def __init__(self, root: Path, provider: str = "tdx_guest", extra_writes: int = 0) -> None:
        self.root = root
        self._link, theirs = multiprocessing.get_context("spawn").Pipe()
        self._process = multiprocessing.get_context("spawn").Process(
            target=_kernel, args=(theirs, provider, extra_writes), daemon=True
        )
        self._process.start()
        theirs.close()

    def _ask(self, command: str, path: Path) -> None:
        self._link.send((command, str(path)))
        self._link.recv()

    def interface(self, **options: Any) -> TsmInterface:
        return TsmInterface(
            self.root,
            make_directory=lambda p: self._ask("make", p),
            remove_directory=lambda p: self._ask("remove", p),
            **options,
        )

    def stop(self) -> None:
        self._link.close()
        self._process.join(5)


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Callable[..., FakeKernel]]:
    started: list[FakeKernel] = []

    def start(provider: str = "tdx_guest", extra_writes: int = 0) -> FakeKernel:
        started.append(FakeKernel(tmp_path, provider, extra_writes))
        return started[-1]

    yield start
    for k in started:
        k.stop()


def test_a_tdx_report(kernel: Callable[..., FakeKernel], tmp_path: Path) -> None:
    tsm = kernel().interface()
    report = tsm.report(bytes(range(64)), "tdx_guest")
    assert (report.provider, report.outblob, report.auxblob) == ("tdx_guest", b"quote:" + bytes(range(64)), b"")
    assert list(tmp_path.iterdir()) == []
    assert tsm.provider() == "tdx_guest"
    assert open_provider("auto", tsm).name == "tdx"
    assert TdxProvider(tsm).evidence(bytes(64)) == {"quote": (b"quote:" + bytes(64)).hex()}
    assert list(tmp_path.iterdir()) == []


def test_a_sev_snp_report_has_a_privilege_level_and_certificates(kernel: Callable[..., FakeKernel]) -> None:
    tsm = kernel("sev_guest").interface()
    evidence = SevSnpProvider(tsm, privlevel=2).evidence(bytes(64))
    assert bytes.fromhex(evidence["report"]) == b"quote:2" + bytes(64)
    assert bytes.fromhex(evidence["certificates"]) == b"certificates"


def test_collateral_comes_along_where_it_is_fetched(kernel: Callable[..., FakeKernel]) -> None:
    provider = TdxProvider(kernel().interface(), collateral=lambda quote: f"for {len(quote)} bytes")
    assert provider.evidence(bytes(64))["collateral"] == "for 70 bytes"


def test_another_writer_is_noticed(kernel: Callable[..., FakeKernel], tmp_path: Path) -> None:
    with pytest.raises(AttestationUnavailable, match="another writer"):
        kernel(extra_writes=1).interface().report(bytes(64), "tdx_guest")
    assert list(tmp_path.iterdir()) == []


def test_another_device_is_refused(tmp_path: Path) -> None:
    for device in ("sev_guest", "arm_cca_guest", ""):

        def make(path: Path, device: str = device) -> None:
            os.mkdir(path)
            (path / "provider").write_text(device)

        tsm = TsmInterface(tmp_path, make_directory=make, remove_directory=_remove)
        with pytest.raises(AttestationUnavailable, match="not 'tdx_guest'"):
            tsm.report(bytes(64), "tdx_guest")
        assert list(tmp_path.iterdir()) == []


def _remove(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()
    os.rmdir(path)


def plain_files(tmp_path: Path, generation: str = "1") -> TsmInterface:
    """Ordinary files: enough where the answer does not depend on the question."""

    def make(path: Path) -> None:
        os.mkdir(path)
        (path / "provider").write_text("tdx_guest")
        (path / "generation").write_text("0")
        (path / "inblob").write_bytes(b"")
        (path / "outblob").write_bytes(b"quote")

    return TsmInterface(tmp_path, make_directory=make, remove_directory=_remove, pause=pauses.append)


pauses: list[float] = []


def test_a_busy_kernel_is_asked_again_and_then_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    busy = {"left": 2}
    real_read = os.read

    def read(fd: int, size: int) -> bytes:
        name = os.readlink(f"/proc/self/fd/{fd}")
        if name.endswith("/outblob") and busy["left"]:
            busy["left"] -= 1
            raise OSError(errno.EBUSY, "busy")
        data = real_read(fd, size)
        return b"1" if name.endswith("/generation") and data and busy["left"] == 0 else data

    tsm = plain_files(tmp_path)
    monkeypatch.setattr("veriattn.attest.tsm.os.read", read)
    pauses.clear()
    busy["left"] = 100
    with pytest.raises(AttestationUnavailable, match="EBUSY") as caught:
        tsm.report(bytes(64), "tdx_guest")
    assert "30 s" in (caught.value.hint or "")
    assert len(pauses) == 4
    assert list(tmp_path.iterdir()) == []


def test_a_generation_that_is_no_number(tmp_path: Path) -> None:
    def make(path: Path) -> None:
        os.mkdir(path)
        (path / "provider").write_text("tdx_guest")
        (path / "generation").write_text("many")

    tsm = TsmInterface(tmp_path, make_directory=make, remove_directory=_remove)
    with pytest.raises(AttestationUnavailable, match="no number"):
        tsm.report(bytes(64), "tdx_guest")


def test_failures_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(AttestationUnavailable, match="64 bytes"):
        plain_files(tmp_path).report(bytes(63), "tdx_guest")
    with pytest.raises(AttestationUnavailable, match="another writer"):
        plain_files(tmp_path).report(bytes(64), "tdx_guest")
    missing = TsmInterface(tmp_path / "none")
    assert not missing.available()
    assert missing.provider() is None
    with pytest.raises(AttestationUnavailable, match="cannot open") as caught:
        missing.report(bytes(64), "tdx_guest")
    assert "guest" in (caught.value.hint or "")
    assert list(tmp_path.iterdir()) == []


def test_a_quote_through_the_whole_path_verifies(tmp_path: Path, platform: SyntheticTdx) -> None:
    """inblob -> quote -> verifier, with the made-up platform in the place of the quoting enclave."""
    data = bytes(range(64))

    def make(path: Path) -> None:
        os.mkdir(path)
        (path / "provider").write_text("tdx_guest\n")
        (path / "generation").write_text("0\n")
        for name in ("inblob", "outblob"):
            os.mkfifo(path / name)
        threading.Thread(target=serve, args=(path,), daemon=True).start()

    def serve(path: Path) -> None:
        asked = (path / "inblob").read_bytes()
        (path / "generation").write_text("1\n")
        (path / "outblob").write_bytes(platform.quote(asked))

    tsm = TsmInterface(tmp_path, make_directory=make, remove_directory=_remove)
    evidence = TdxProvider(tsm).evidence(data)
    verifier = TdxVerifier(TdxPolicy((synthetic_image(),)), platform.root_der)
    assert verifier.verify(dict(evidence), platform.collateral, NOW).report_data == data
