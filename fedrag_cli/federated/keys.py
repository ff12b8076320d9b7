"""Keys and certificates: node keys that sign a client's requests, a development authority, server certificates.

A node key is an elliptic-curve key (SECP384R1), as Flower's SuperNodes use. Private keys are PEM files that only their
owner may read; public keys are one line in OpenSSH's format.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import os
import stat
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedrag_cli.config.fields import check_client_name
from fedrag_cli.errors import ConfigError
from fedrag_cli.runs.files import os_errors

PrivateKey = ec.EllipticCurvePrivateKey
CURVE = ec.SECP384R1
AUTHORITY_DAYS = 3650
SERVER_DAYS = 365
PUBLIC_SUFFIX = ".pub"
MOST_FILE_BYTES = 2**20
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
PUBLIC_STARTS = (b"ecdsa-", b"ssh-", b"-----BEGIN PUBLIC KEY")


def write_node_key(directory: Path, name: str) -> tuple[Path, Path]:
    """Make a node key, NAME.key (mode 0600) and NAME.pub; raises ConfigError where one is there already."""
    key = ec.generate_private_key(CURVE())
    private, public = directory / f"{name}.key", directory / f"{name}{PUBLIC_SUFFIX}"
    _require_absent(private, public)
    line = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    _write(private, _private_pem(key), secret=True)
    _write(public, line + b" " + name.encode() + b"\n")
    return private, public


def write_authority(directory: Path) -> tuple[Path, Path]:
    """Make a certificate authority for tests and small federations: ca.key (mode 0600) and ca.crt.

    Raises:
        ConfigError: One of the files is there already.
    """
    private, certificate = directory / "ca.key", directory / "ca.crt"
    _require_absent(private, certificate)
    _write_certificate(private, certificate, "fedrag authority", AUTHORITY_DAYS)
    return private, certificate


def write_server_certificate(directory: Path, hosts: Sequence[str]) -> tuple[Path, Path]:
    """Make server.key (mode 0600) and server.crt, a certificate for hosts by the authority in the same folder.

    The first host is its common name.

    Raises:
        ConfigError: The authority is missing, or one of the files is there already.
    """
    private, certificate = directory / "server.key", directory / "server.crt"
    _require_absent(private, certificate)
    try:
        authority = x509.load_pem_x509_certificate((directory / "ca.crt").read_bytes())
        authority_key = serialization.load_pem_private_key((directory / "ca.key").read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"'{directory}' has no authority (ca.key and ca.crt) that could sign: {error}",
            f"Make one first: fedrag keys ca --dir {directory}",
        ) from error
    assert isinstance(authority_key, PrivateKey)
    _write_certificate(private, certificate, hosts[0][:64], SERVER_DAYS, hosts, (authority.subject, authority_key))
    return private, certificate


def load_private_key(path: Path) -> PrivateKey:
    """Read a node's private key, in PEM or OpenSSH's format.

    Raises:
        ConfigError: The file is missing, is no such key, or others may read it.
    """
    hint = "Make one with: fedrag keys node NAME"
    try:
        content = read_small_file(path)
        if content.startswith(PUBLIC_STARTS):
            raise ConfigError(
                f"'{path}' is a public key, and the private one is needed here.",
                f"Set federated.key to the private key that was made with it, such as {path.with_suffix('.key')}.",
            )
        if os.name != "nt" and stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise ConfigError(f"Others may read the private key '{path}'.", f"Run: chmod 600 {path}")
        key = (
            serialization.load_ssh_private_key(content, None)
            if b"OPENSSH" in content
            else serialization.load_pem_private_key(content, None)
        )
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"The private key '{path}' cannot be read: {error}", hint) from error
    if not isinstance(key, PrivateKey) or not isinstance(key.curve, CURVE):
        raise ConfigError(f"'{path}' is no node key (an elliptic-curve key on SECP384R1).", hint)
    return key


def load_or_make_key(path: Path) -> PrivateKey:
    """Read a key that this program keeps for itself, or make it where it is not there yet."""
    if path.is_file() and not path.stat().st_size:
        # A kill has left it before anything was in it.
        path.unlink()
    if not path.exists():
        _write(path, _private_pem(ec.generate_private_key(CURVE())), secret=True)
    return load_private_key(path)


def load_allowed_keys(directory: Path) -> dict[str, bytes]:
    """Read the public keys that may join, a file NAME.pub each, by client name and in the form of requests.

    Raises:
        ConfigError: The folder is missing or empty, a file is no key, or two files hold the same key.
    """
    advice = f"the public key of each client (NAME{PUBLIC_SUFFIX}); 'fedrag keys node NAME' makes a pair."
    if not directory.exists():
        raise ConfigError(
            f"federated.allowed_keys: there is no folder '{directory}'.", f"Make it, and put into it {advice}"
        )
    if not directory.is_dir():
        raise ConfigError(
            f"federated.allowed_keys: '{directory}' is no folder.", f"Name a folder, and put into it {advice}"
        )
    try:
        files = sorted(file for file in directory.iterdir() if file.name.endswith(PUBLIC_SUFFIX))
    except OSError as error:
        raise ConfigError(
            f"federated.allowed_keys: '{directory}' cannot be read: {error.strerror}.", "Check who may read it."
        ) from error
    if not files:
        raise ConfigError(
            f"federated.allowed_keys: '{directory}' holds no public key (NAME{PUBLIC_SUFFIX}).",
            f"Put there {advice}",
        )
    for file in files:
        try:
            check_client_name(file.name.removesuffix(PUBLIC_SUFFIX))
        except ValueError as error:
            raise ConfigError(
                f"federated.allowed_keys: the name of {file.name!r} in '{directory}' {error}.",
                f"Name the file after its client, as NAME{PUBLIC_SUFFIX}, or remove it.",
            ) from error
    keys = {file.stem: load_public_key(file) for file in files}
    owners: dict[bytes, str] = {}
    for name, key in keys.items():
        if key in owners:
            raise ConfigError(f"'{owners[key]}' and '{name}' in '{directory}' are the same key.", "Remove one of them.")
        owners[key] = name
    return keys


def load_public_key(path: Path) -> bytes:
    """Read a node's public key, in OpenSSH's format or PEM, into the form in which requests carry it.

    Raises:
        ConfigError: The file is missing or is no such key.
    """
    try:
        content = read_small_file(path)
        key = (
            serialization.load_pem_public_key(content)
            if content.lstrip().startswith(b"-----BEGIN")
            else serialization.load_ssh_public_key(content.strip())
        )
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"'{path}' is no public key: {error}", "Put the NAME.pub of 'fedrag keys node' there."
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, CURVE):
        raise ConfigError(f"'{path}' is no node key (SECP384R1).", "Put the NAME.pub of 'fedrag keys node' there.")
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def read_small_file(path: Path) -> bytes:
    """Read a key or a certificate, without waiting for what a pipe or a device may never give.

    Raises:
        ValueError: It cannot be read, is no regular file, or an empty or a very large one.
    """
    try:
        kind = path.stat().st_mode
        if not stat.S_ISREG(kind):
            raise ValueError(f"it is {_KINDS.get(stat.S_IFMT(kind), 'no regular file')}")
        with os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            content = file.read(MOST_FILE_BYTES + 1)
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    if not content:
        raise ValueError("it is empty")
    if len(content) > MOST_FILE_BYTES:
        raise ValueError(f"it has more than {MOST_FILE_BYTES} bytes")
    return content


def fingerprint(public_key: bytes) -> str:
    """Return the fingerprint of a key in a request as `ssh-keygen -lf NAME.pub` prints it; raises ValueError."""
    try:
        key = serialization.load_pem_public_key(public_key)
        line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    except UnsupportedAlgorithm as error:
        raise ValueError(str(error)) from error
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def _write_certificate(
    private: Path,
    certificate: Path,
    name: str,
    days: int,
    hosts: Sequence[str] = (),
    authority: tuple[x509.Name, PrivateKey] | None = None,
) -> None:
    """Make a key and its certificate: an authority's, which it signs itself, or that of hosts."""
    key, now = ec.generate_private_key(CURVE()), datetime.now(UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issuer, signer = authority or (subject, key)
    is_authority = authority is None
    usage = x509.KeyUsage(
        digital_signature=not is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=not is_authority,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        encipher_only=False,
        decipher_only=False,
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=0 if is_authority else None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    if not is_authority:
        builder = (
            builder.add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        )
    _write(private, _private_pem(key), secret=True)
    _write(certificate, builder.sign(signer, hashes.SHA384()).public_bytes(serialization.Encoding.PEM))


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        return x509.DNSName(host)


def _private_pem(key: PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _require_absent(*paths: Path) -> None:
    present = [str(path) for path in paths if path.exists()]
    if present:
        raise ConfigError(
            f"There is something in the way: {', '.join(present)}.", "Choose another folder; nothing is overwritten."
        )


def _write(path: Path, content: bytes, *, secret: bool = False) -> None:
    """Write a new file; a secret one is never readable for others, not even for a moment."""
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if secret else 0o644)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
