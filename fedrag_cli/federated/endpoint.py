"""Addresses, and what protects a connection to or from them."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

from cryptography import x509

from fedrag_cli.config.schema import FederatedConfig
from fedrag_cli.errors import ConfigError, ConnectionFailedError
from fedrag_cli.federated.keys import read_small_file
from fedrag_cli.text import printable

DEFAULT_ADDRESS = "127.0.0.1:8080"
LOOK_SECONDS = 10.0
SOON = timedelta(days=14)
# OpenSSL's numbers: not valid yet or no longer; another host name or address.
_OF_TIME, _OF_HOST = (9, 10), (62, 64)


@dataclass(frozen=True)
class Address:
    """A host and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether nobody outside this machine is reached or can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


@dataclass(frozen=True)
class ServerCertificate:
    """Files of the server's TLS certificate and its private key."""

    certificate: Path
    key: Path

    def context(self) -> ssl.SSLContext:
        """Return what the handshake needs of them; raises ConnectionFailedError where they do not fit."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        try:
            context.load_cert_chain(self.certificate, self.key)
        except (OSError, ValueError) as error:
            raise ConnectionFailedError(
                f"The TLS certificate '{self.certificate}' with the key '{self.key}' cannot be used: {error}",
                "Check federated.certificate and federated.certificate_key.",
            ) from error
        return context


@dataclass(frozen=True)
class ServerAddress:
    """Where a server is and how to trust it."""

    address: str
    tls: bool
    ca_certificate: bytes | None = None
    """The authority to trust, as PEM; the system's authorities where it is None."""

    @property
    def proxy(self) -> str | None:
        """The proxy that the environment names for the server; none for this machine itself."""
        address = parse_address(self.address)
        if address.is_loopback or urllib.request.proxy_bypass(address.host):
            return None
        proxies = urllib.request.getproxies()
        return proxies.get("https" if self.tls else "http") or proxies.get("all")

    @property
    def in_words(self) -> str:
        """The address, and that of the proxy without its password."""
        if not self.proxy:
            return self.address
        parts = urlsplit(self.proxy)
        return f"{self.address} (through the proxy {parts.scheme}://{parts.netloc.rpartition('@')[2]})"


def parse_address(text: str) -> Address:
    """Read `HOST:PORT`, with an IPv6 host in brackets; raises ConfigError where it is none."""
    host, colon, port = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not host or "/" in host or not port.isdigit() or not 0 <= int(port) <= 65535:
        raise ConfigError(f"'{text}' is no address.", f"Write HOST:PORT, such as {DEFAULT_ADDRESS} or [::1]:8080.")
    return Address(host, int(port))


def check_server_settings(settings: FederatedConfig, address: Address, *, insecure: bool) -> tuple[bool, bool]:
    """Return whether a server uses TLS, and whether only allowed keys may join it.

    Raises:
        ConfigError: The address can be reached from outside, and TLS or the list of keys is missing; or files are.
    """
    files = (settings.certificate, settings.certificate_key)
    if (files[0] is None) != (files[1] is None):
        raise ConfigError(
            "TLS needs both federated.certificate and federated.certificate_key.",
            "'fedrag keys server HOST' makes both.",
        )
    tls, keys = files[0] is not None and not insecure, settings.allowed_keys is not None
    if tls:
        _check_certificate(str(files[0]), str(files[1]))
    if not insecure and not address.is_loopback:
        missing = [] if tls else ["a TLS certificate (federated.certificate and federated.certificate_key)"]
        missing += [] if keys else ["the public keys that may join (federated.allowed_keys)"]
        if missing:
            raise ConfigError(
                f"{address} can be reached from other machines, but the config lacks {' and '.join(missing)}.",
                "Make them with 'fedrag keys', listen on 127.0.0.1, or say --insecure where the network is trusted.",
            )
    return tls, keys


def client_authority(settings: FederatedConfig, address: Address, *, insecure: bool) -> tuple[bool, bytes | None]:
    """Return whether a client uses TLS, and the authority to trust as PEM (the system's where it is None).

    Raises:
        ConfigError: The authority's file is missing or holds no certificate.
    """
    if insecure or (address.is_loopback and settings.ca_certificate is None):
        return False, None
    if settings.ca_certificate is None:
        return True, None
    hint = "Ask the server's owner for the authority's certificate (ca.crt)."
    try:
        content = read_small_file(Path(settings.ca_certificate))
        known = _certificates(content)
        trusting(content)
    except (ValueError, ssl.SSLError) as error:
        raise ConfigError(
            f"federated.ca_certificate: '{settings.ca_certificate}' cannot be read as PEM certificates: {error}", hint
        ) from error
    problems = [problem for certificate in known if (problem := _validity_problem(certificate))]
    if len(problems) == len(known):
        raise ConfigError(
            f"federated.ca_certificate: the authority in '{settings.ca_certificate}' {problems[0]}.", hint
        )
    return True, content


def trusting(authority: bytes | None) -> ssl.SSLContext:
    """Return what a client checks a server's certificate with, by an authority as PEM or those of the system."""
    return ssl.create_default_context(cadata=authority.decode("ascii") if authority is not None else None)


def distrust(address: Address, error: ssl.SSLCertVerificationError) -> str:
    """Say in words why a server's certificate is not trusted; it is asked for that once more, and sent nothing."""
    try:
        certificate = _shown_by(address)
    except (OSError, ValueError):
        return error.verify_message
    if error.verify_code in _OF_TIME:
        problem = _validity_problem(certificate)
        return (
            f"the server's certificate {problem}" if problem else f"{error.verify_message} (an authority of its chain)"
        )
    if error.verify_code in _OF_HOST:
        hosts = printable(", ".join(_hosts_of(certificate))) or "no host"
        return f"the server's certificate is made for {hosts}, and not for {address.host}"
    issuer = printable(certificate.issuer.rfc4514_string())
    return f"the server's certificate is signed by '{issuer}', which is trusted here in no way ({error.verify_message})"


def _shown_by(address: Address) -> x509.Certificate:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection((address.host, address.port), LOOK_SECONDS) as plain,
        context.wrap_socket(plain, server_hostname=address.host) as connection,
    ):
        return x509.load_der_x509_certificate(connection.getpeercert(binary_form=True) or b"")


def _hosts_of(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]


def _certificates(content: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(content)
    except ValueError as error:
        raise ValueError("it holds no certificate in PEM format") from error


def _validity_problem(certificate: x509.Certificate) -> str:
    """Say how a certificate is not valid now; empty where it is."""
    now, start, end = datetime.now(UTC), certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > end:
        return f"expired on {end:%Y-%m-%d %H:%M} UTC"
    return f"is valid only from {start:%Y-%m-%d %H:%M} UTC on (is this machine's clock right?)" if now < start else ""


def _check_certificate(certificate: str, key: str) -> None:
    hint = "Make both with: fedrag keys server HOST"
    try:
        first = _certificates(read_small_file(Path(certificate)))[0]
    except ValueError as error:
        raise ConfigError(f"federated.certificate: '{certificate}' cannot be used: {error}.", hint) from error
    try:
        read_small_file(Path(key))
        # An empty password: OpenSSL would ask for one on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None)
        if reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(
                f"federated.certificate_key: '{key}' is not the key of the certificate '{certificate}'.", hint
            ) from error
        raise ConfigError(
            f"The TLS certificate '{certificate}' with the key '{key}' cannot be used: {error}", hint
        ) from error
    if problem := _validity_problem(first):
        raise ConfigError(f"federated.certificate: the certificate '{certificate}' {problem}.", hint)


def expiry_note(certificate: Path) -> str:
    """Say that a server's certificate expires soon; empty where it does not."""
    end = _certificates(read_small_file(certificate))[0].not_valid_after_utc
    if end - datetime.now(UTC) > SOON:
        return ""
    return f"The certificate '{certificate}' expires on {end:%Y-%m-%d %H:%M} UTC; clients refuse it from then on"
