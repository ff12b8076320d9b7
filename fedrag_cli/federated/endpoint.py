"""Addresses, and what protects a connection to or from them."""

from __future__ import annotations

import ipaddress
import ssl
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from fedrag_cli.config.schema import FederatedConfig
from fedrag_cli.errors import ConfigError, ConnectionFailedError

DEFAULT_ADDRESS = "127.0.0.1:8080"


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
        """Return what the handshake needs of them.

        Raises:
            ConnectionFailedError: They are missing, or do not fit each other.
        """
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
    """Where a server is and how to trust it.

    Args:
        address: `HOST:PORT`.
        tls: Whether to speak TLS.
        ca_certificate: The authority to trust, as PEM; the system's authorities where it is None.
    """

    address: str
    tls: bool
    ca_certificate: bytes | None = None

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

    def context(self) -> ssl.SSLContext:
        """Return whom to trust; raises ssl.SSLError or ValueError where the authority is none."""
        if self.ca_certificate is None:
            return ssl.create_default_context()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=self.ca_certificate.decode("ascii"))
        return context


def parse_address(text: str) -> Address:
    """Read `HOST:PORT`, with an IPv6 host in brackets.

    Raises:
        ConfigError: It is no address.
    """
    host, colon, port = text.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not colon or not host or "/" in host or not port.isdigit() or not 0 <= int(port) <= 65535:
        raise ConfigError(f"'{text}' is no address.", f"Write HOST:PORT, such as {DEFAULT_ADDRESS} or [::1]:8080.")
    return Address(host, int(port))


def check_server_settings(settings: FederatedConfig, address: Address, *, insecure: bool) -> tuple[bool, bool]:
    """Decide how a server is protected.

    Args:
        settings: The federation's settings.
        address: Where it will listen.
        insecure: Whether the user said that protection is not wanted.

    Returns:
        Whether to use TLS, and whether only allowed keys may join.

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
    """Decide how a client protects its connection.

    Returns:
        Whether to use TLS, and the authority to trust as PEM (the system's where it is None).

    Raises:
        ConfigError: The authority's file is missing or holds no certificate.
    """
    if insecure or (address.is_loopback and settings.ca_certificate is None):
        return False, None
    if settings.ca_certificate is None:
        return True, None
    try:
        content = Path(settings.ca_certificate).read_bytes()
        ssl.create_default_context(cadata=content.decode("ascii"))
    except (OSError, ValueError, ssl.SSLError) as error:
        raise ConfigError(
            f"federated.ca_certificate: '{settings.ca_certificate}' cannot be read as PEM certificates: {error}",
            "Ask the server's owner for the authority's certificate (ca.crt).",
        ) from error
    return True, content


def _check_certificate(certificate: str, key: str) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
    except (OSError, ValueError, ssl.SSLError) as error:
        raise ConfigError(
            f"The TLS certificate '{certificate}' with the key '{key}' cannot be used: {error}",
            "Make both with: fedrag keys server HOST",
        ) from error
