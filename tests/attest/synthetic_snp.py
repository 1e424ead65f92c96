"""A made-up SEV-SNP platform: root, chip key and signed reports, under a root of its own."""

from __future__ import annotations

import datetime as dt
import hashlib

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from tests.attest.synthetic_tdx import NOW

#: Bits of a guest's policy. The second is reserved and always set.
SMT, ALWAYS, MIGRATE_MA, DEBUG, SINGLE_SOCKET = (1 << bit for bit in (16, 17, 18, 19, 20))
HONEST_POLICY = SMT | ALWAYS
MEASUREMENT = bytes.fromhex("11" * 48)

_AMD = "1.3.6.1.4.1.3704.1"
_TCB = {f"{_AMD}.3.1": 4, f"{_AMD}.3.2": 0, f"{_AMD}.3.3": 24, f"{_AMD}.3.8": 219}  # boot_loader, tee, snp, microcode
_CHIP = bytes(range(64))
_PSS = padding.PSS(mgf=padding.MGF1(hashes.SHA384()), salt_length=48)


class SyntheticSnp:
    """`evidence` as a guest's host would hand it out; `ark_sha256` is what a policy pins."""

    def __init__(self) -> None:
        ark, ask = (rsa.generate_private_key(public_exponent=65537, key_size=2048) for _ in range(2))
        self._vcek = ec.generate_private_key(ec.SECP384R1())
        chip = {f"{_AMD}.4": _CHIP} | {
            oid: bytes((2, 1, n)) if n < 128 else bytes((2, 2, 0, n)) for oid, n in _TCB.items()
        }
        certificates = {
            "ark": _certificate("ARK", ark.public_key(), ark, {}),
            "ask": _certificate("ASK", ask.public_key(), ark, {}),
            "vcek": _certificate("VCEK", self._vcek.public_key(), ask, chip),
        }
        self._certificates = {name: der.hex() for name, der in certificates.items()}
        self.ark_sha256 = hashlib.sha256(certificates["ark"]).hexdigest()

    def evidence(self, report_data: bytes, *, policy: int = HONEST_POLICY, vmpl: int = 0) -> dict[str, str]:
        raw = bytearray(0x4A0)
        tcb = bytes((4, 0, 0, 0, 0, 0, 24, 219))
        for at, value in {
            0x00: (2).to_bytes(4, "little"), 0x08: policy.to_bytes(8, "little"), 0x30: vmpl.to_bytes(4, "little"),
            0x34: (1).to_bytes(4, "little"), 0x50: report_data, 0x90: MEASUREMENT, 0x180: tcb, 0x1A0: _CHIP,
        }.items():  # fmt: skip
            raw[at : at + len(value)] = value
        for at, part in zip(
            (0x2A0, 0x2E8),
            decode_dss_signature(self._vcek.sign(bytes(raw[:0x2A0]), ec.ECDSA(hashes.SHA384()))),
            strict=True,
        ):
            raw[at : at + 72] = part.to_bytes(72, "little")
        return {"report": raw.hex(), **self._certificates}


def _certificate(
    name: str,
    public: rsa.RSAPublicKey | ec.EllipticCurvePublicKey,
    issuer: rsa.RSAPrivateKey,
    extensions: dict[str, bytes],
) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = dt.datetime.fromtimestamp(NOW, dt.UTC)
    builder = (
        x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1)).not_valid_after(now + dt.timedelta(days=1))
    )  # fmt: skip
    for oid, value in extensions.items():
        builder = builder.add_extension(x509.UnrecognizedExtension(x509.ObjectIdentifier(oid), value), critical=False)
    return builder.sign(issuer, hashes.SHA384(), rsa_padding=_PSS).public_bytes(Encoding.DER)
