"""A complete TDX platform made up for tests: certificate authority, PCK, quoting enclave, collateral, quotes.

The real verifier accepts these quotes under this root and no other. Nothing in `src` can be told to use it.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import struct
from dataclasses import dataclass

import dcap_qvl
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID, ObjectIdentifier

from veriattn.attest.policy import TdxImage

NOW = 1795219200  # 2026-11-21
_BEGIN, _END = dt.datetime(2026, 1, 1, tzinfo=dt.UTC), dt.datetime(2036, 1, 1, tzinfo=dt.UTC)
_SGX = "1.2.840.113741.1.13.1"
_CPU_SVN = bytes([2, 2, 2, 2, 3, 1, 0, 5, *bytes(8)])
_PCE_SVN = 11
_FMSPC = bytes.fromhex("00ff6f000000")
_QE_SIGNER = hashlib.sha256(b"test qe signer").digest()


def _name(common_name: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, common_name),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "TEST ONLY - not Intel"),
        ]
    )


def _key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def _raw_signature(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    r, s = decode_dss_signature(key.sign(message, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def _raw_public(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)[1:]


def _tlv(tag: int, body: bytes) -> bytes:
    if len(body) < 128:
        return bytes([tag, len(body)]) + body
    length = len(body).to_bytes((len(body).bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + body


def _oid(text: str) -> bytes:
    first, second, *rest = (int(x) for x in text.split("."))
    out = bytes([first * 40 + second])
    for x in rest:
        digits = [x & 127]
        while x := x >> 7:
            digits.append(128 | x & 127)
        out += bytes(reversed(digits))
    return _tlv(6, out)


def _seq(*parts: bytes) -> bytes:
    return _tlv(0x30, b"".join(parts))


def _int(n: int) -> bytes:
    return _tlv(2, n.to_bytes((n.bit_length() + 8) // 8, "big"))


def _sgx_extension() -> bytes:
    tcb = [_seq(_oid(f"{_SGX}.2.{i + 1}"), _int(svn)) for i, svn in enumerate(_CPU_SVN)]
    tcb += [_seq(_oid(f"{_SGX}.2.17"), _int(_PCE_SVN)), _seq(_oid(f"{_SGX}.2.18"), _tlv(4, _CPU_SVN))]
    return _seq(
        _seq(_oid(f"{_SGX}.1"), _tlv(4, bytes(16))),
        _seq(_oid(f"{_SGX}.2"), _seq(*tcb)),
        _seq(_oid(f"{_SGX}.3"), _tlv(4, bytes(2))),
        _seq(_oid(f"{_SGX}.4"), _tlv(4, _FMSPC)),
        _seq(_oid(f"{_SGX}.5"), _tlv(10, bytes(1))),
    )


@dataclass(frozen=True)
class _Authority:
    name: str
    key: ec.EllipticCurvePrivateKey

    def certify(
        self, name: str, key: ec.EllipticCurvePrivateKey, *, ca: bool = False, extension: bytes | None = None
    ) -> x509.Certificate:
        names = ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
        usage = {**dict.fromkeys(names, False), "encipher_only": False, "decipher_only": False}
        usage |= {"digital_signature": not ca, "content_commitment": not ca, "key_cert_sign": ca, "crl_sign": ca}
        path_length = (1 if name.endswith("Root CA") else 0) if ca else None
        builder = (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(_name(self.name))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(_BEGIN)
            .not_valid_after(_END)
            .add_extension(x509.BasicConstraints(ca, path_length), critical=True)
            .add_extension(x509.KeyUsage(**usage), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
        )
        if extension is not None:
            builder = builder.add_extension(x509.UnrecognizedExtension(ObjectIdentifier(_SGX), extension), False)
        return builder.sign(self.key, hashes.SHA256())

    def revocations(self) -> bytes:
        return (
            x509.CertificateRevocationListBuilder()
            .issuer_name(_name(self.name))
            .last_update(_BEGIN)
            .next_update(_END)
            .add_extension(x509.CRLNumber(1), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
            .sign(self.key, hashes.SHA256())
            .public_bytes(Encoding.DER)
        )


def _pem(*certificates: x509.Certificate) -> str:
    return "".join(c.public_bytes(Encoding.PEM).decode() for c in certificates)


def _register(name: str) -> bytes:
    return hashlib.sha384(name.encode()).digest()


class SyntheticTdx:
    """One made-up platform. `quote` makes a quote over any 64 bytes; `root_der` and `collateral` go with all of them.

    tcb_status: what the platform's TCB info says of it.
    """

    def __init__(self, tcb_status: str = "UpToDate") -> None:
        self._root = _Authority("TEST SGX Root CA", _key())
        self._platform = _Authority("TEST SGX PCK Platform CA", _key())
        self._pck, self._attestation_key, signer = _key(), _key(), _key()
        root = self._root.certify(self._root.name, self._root.key, ca=True)
        platform = self._root.certify(self._platform.name, self._platform.key, ca=True)
        leaf = self._platform.certify("TEST SGX PCK Certificate", self._pck, extension=_sgx_extension())
        signing = self._root.certify("TEST SGX TCB Signing", signer)
        self.root_der = root.public_bytes(Encoding.DER)
        self._chain = _pem(leaf, platform, root).encode()
        tcb, qe = self._tcb_info(tcb_status), self._qe_identity()
        self.collateral: str = dcap_qvl.QuoteCollateralV3(
            _pem(platform, root),
            self._root.revocations(),
            self._platform.revocations(),
            _pem(signing, root),
            tcb,
            _raw_signature(signer, tcb.encode()),
            _pem(signing, root),
            qe,
            _raw_signature(signer, qe.encode()),
        ).to_json()

    @staticmethod
    def _dates() -> dict[str, str]:
        return {"issueDate": f"{_BEGIN:%Y-%m-%dT%H:%M:%SZ}", "nextUpdate": f"{_END:%Y-%m-%dT%H:%M:%SZ}"}

    def _tcb_info(self, status: str) -> str:
        date = f"{_BEGIN:%Y-%m-%dT%H:%M:%SZ}"
        module = {"mrsigner": "00" * 48, "attributes": "00" * 8, "attributesMask": "FF" * 8}
        tdx = [{"svn": 5}, {"svn": 1}, {"svn": 2}, *({"svn": 0} for _ in range(13))]
        tcb = {"sgxtcbcomponents": [{"svn": b} for b in _CPU_SVN], "pcesvn": _PCE_SVN, "tdxtcbcomponents": tdx}
        identity = {"id": "TDX_01", **module}
        identity["tcbLevels"] = [{"tcb": {"isvsvn": 5}, "tcbDate": date, "tcbStatus": "UpToDate"}]  # type: ignore[assignment]
        return json.dumps(
            {
                "id": "TDX", "version": 3, **self._dates(), "fmspc": _FMSPC.hex().upper(), "pceId": "0000", "tcbType": 0,
                "tcbEvaluationDataNumber": 1, "tdxModule": module, "tdxModuleIdentities": [identity],
                "tcbLevels": [{"tcb": tcb, "tcbDate": date, "tcbStatus": status}],
            },
            separators=(",", ":"),
        )  # fmt: skip

    def _qe_identity(self) -> str:
        date = f"{_BEGIN:%Y-%m-%dT%H:%M:%SZ}"
        return json.dumps(
            {
                "id": "TD_QE", "version": 2, **self._dates(), "tcbEvaluationDataNumber": 1, "miscselect": "00" * 4,
                "miscselectMask": "FF" * 4, "attributes": "11" + "00" * 15, "attributesMask": "FB" + "FF" * 7 + "00" * 8,
                "mrsigner": _QE_SIGNER.hex().upper(), "isvprodid": 2,
                "tcbLevels": [{"tcb": {"isvsvn": 4}, "tcbDate": date, "tcbStatus": "UpToDate"}],
            },
            separators=(",", ":"),
        )  # fmt: skip

    def quote(self, report_data: bytes, *, image: str = "image", debug: bool = False) -> bytes:
        """A quote of a guest running `image` (whose name its registers are hashes of)."""
        header = (
            struct.pack("<HHI", 4, 2, 0x81) + bytes(4) + bytes.fromhex("939a7233f79c4ca9940a0db3957f0607") + bytes(20)
        )
        attributes = bytes([1 if debug else 0, 0, 0, 0x10, 0, 0, 0, 0])
        registers = [bytes.fromhex(v) for v in synthetic_image(image).required().values()]
        body = (
            bytes([5, 1, 2, *bytes(13)]) + bytes(48) + bytes(48) + bytes(8) + attributes
            + bytes.fromhex("e702060000000000") + registers[0] + bytes(3 * 48) + b"".join(registers[1:]) + report_data
        )  # fmt: skip
        if len(body) != 584:
            raise AssertionError(f"a TD report has 584 bytes, not {len(body)}")
        auth = bytes(range(32))
        qe = bytearray(384)
        qe[48], qe[64:96], qe[128:160] = 0x11, hashlib.sha256(b"test qe").digest(), _QE_SIGNER
        struct.pack_into("<HH", qe, 256, 2, 6)
        qe[320:352] = hashlib.sha256(_raw_public(self._attestation_key) + auth).digest()
        inner = bytes(qe) + _raw_signature(self._pck, bytes(qe)) + struct.pack("<H", len(auth)) + auth
        inner += struct.pack("<HI", 5, len(self._chain)) + self._chain
        signed = _raw_signature(self._attestation_key, header + body) + _raw_public(self._attestation_key)
        signed += struct.pack("<HI", 6, len(inner)) + inner
        return header + body + struct.pack("<I", len(signed)) + signed


def synthetic_image(name: str = "image") -> TdxImage:
    """The measurements of a made-up image."""
    registers = ("mr_td", "rt_mr0", "rt_mr1", "rt_mr2", "rt_mr3")
    return TdxImage(name, **{r: _register(f"{name}/{r}").hex() for r in registers})


class SyntheticTdxProvider:
    """A provider that quotes with a made-up platform. It calls itself `tdx`, which is what a liar would do."""

    name = "tdx"

    def __init__(self, platform: SyntheticTdx, image: str = "image", debug: bool = False) -> None:
        self._platform, self._image, self._debug = platform, image, debug
        self.asked = 0

    def evidence(self, report_data: bytes) -> dict[str, str]:
        self.asked += 1
        quote = self._platform.quote(report_data, image=self._image, debug=self._debug)
        return {"quote": quote.hex(), "collateral": self._platform.collateral}
