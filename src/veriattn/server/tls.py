"""TLS inside the TEE: certificate files, or a self-signed certificate whose key never touches a disk."""

from __future__ import annotations

import hashlib
import os
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from veriattn.attest.keys import TlsKey
from veriattn.errors import ConfigError
from veriattn.server.config import TlsConfig

_LIFETIME = timedelta(days=90)


def open_tls(config: TlsConfig) -> tuple[ssl.SSLContext, TlsKey] | None:
    """A context and the public key to bind to attestation; None where TLS is off. Raises: ConfigError."""
    if not config.enabled:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    if config.ephemeral:
        certificate, key = _self_signed(config.server_name)
        _load(context, certificate, key)
    else:
        try:
            certificate = Path(config.certificate).read_bytes()
            context.load_cert_chain(config.certificate, config.key)
        except (OSError, ssl.SSLError) as e:
            raise ConfigError(f"cannot load the TLS certificate and key: {e}") from None
    try:
        public = x509.load_pem_x509_certificate(certificate).public_key()
    except ValueError as e:
        raise ConfigError(f"cannot read the TLS certificate: {e}") from None
    spki = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return context, TlsKey(hashlib.sha256(spki).hexdigest(), config.server_name)


def _load(context: ssl.SSLContext, certificate: bytes, key: bytes) -> None:
    # The ssl module reads files only; a memfd is one that exists in this process's memory alone.
    fd = os.memfd_create("veriattn-tls", os.MFD_CLOEXEC)
    try:
        os.write(fd, key + certificate)
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def _self_signed(name: str) -> tuple[bytes, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + _LIFETIME)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return certificate.public_bytes(serialization.Encoding.PEM), private
