"""Keys, addresses, sites, and the checks of a federation's config."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
import ssl
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives import serialization
from toy_federation import node, serving

from fedrag_cli.cli.main import main
from fedrag_cli.config import load_config
from fedrag_cli.config.problems import InvalidConfigError
from fedrag_cli.config.schema import FederatedConfig
from fedrag_cli.data.examples import Example
from fedrag_cli.data.nodes import KnowledgeNode
from fedrag_cli.data.partition import corpus_by_owner, split_at_random, split_by_dirichlet, split_by_owner
from fedrag_cli.errors import ConfigError, ConnectionFailedError, DataError
from fedrag_cli.federated.endpoint import (
    check_server_settings,
    client_authority,
    expiry_note,
    parse_address,
    trusting,
)
from fedrag_cli.federated.fleet.server import ServerCertificate
from fedrag_cli.federated.keys import (
    fingerprint,
    load_allowed_keys,
    load_or_make_key,
    load_private_key,
    load_public_key,
    write_authority,
    write_node_key,
    write_server_certificate,
)


@pytest.mark.parametrize(
    ("text", "host", "port", "loopback"),
    [
        ("127.0.0.1:8080", "127.0.0.1", 8080, True),
        ("localhost:1", "localhost", 1, True),
        ("[::1]:8080", "::1", 8080, True),
        ("0.0.0.0:8080", "0.0.0.0", 8080, False),
        ("fl.example.org:443", "fl.example.org", 443, False),
    ],
)
def test_addresses(text: str, host: str, port: int, loopback: bool) -> None:
    address = parse_address(text)
    assert (address.host, address.port, address.is_loopback) == (host, port, loopback)
    assert str(address) == text


@pytest.mark.parametrize("text", ["", "8080", "host", ":8080", "host:", "host:x", "host:70000", "http://host:80"])
def test_no_addresses(text: str) -> None:
    with pytest.raises(ConfigError, match="is no address"):
        parse_address(text)


def test_a_server_that_others_can_reach_needs_certificate_and_keys(tmp_path: Path) -> None:
    outside, inside = parse_address("0.0.0.0:1"), parse_address("127.0.0.1:1")
    assert check_server_settings(FederatedConfig(), inside, insecure=False) == (False, False)
    assert check_server_settings(FederatedConfig(), outside, insecure=True) == (False, False)
    with pytest.raises(ConfigError, match=r"lacks a TLS certificate .* and the public keys"):
        check_server_settings(FederatedConfig(), outside, insecure=False)
    write_authority(tmp_path)
    key, certificate = write_server_certificate(tmp_path, ["localhost"])
    protected = FederatedConfig(certificate=str(certificate), certificate_key=str(key), allowed_keys=str(tmp_path))
    assert check_server_settings(protected, outside, insecure=False) == (True, True)
    with pytest.raises(ConfigError, match="needs both"):
        check_server_settings(FederatedConfig(certificate=str(certificate)), inside, insecure=False)
    swapped = FederatedConfig(certificate=str(key), certificate_key=str(certificate))
    with pytest.raises(ConfigError, match="cannot be used"):
        check_server_settings(swapped, inside, insecure=False)


def made_days_ago(monkeypatch: pytest.MonkeyPatch, folder: Path, days: float) -> tuple[Path, Path]:
    """Return key and certificate of localhost as they would be if they had been made so many days ago."""
    then = SimpleNamespace(now=lambda zone: datetime.now(zone) - timedelta(days=days))
    with monkeypatch.context() as patched:
        patched.setattr("fedrag_cli.federated.keys.datetime", then)
        write_authority(folder)
        return write_server_certificate(folder, ["localhost"])


@pytest.mark.parametrize(
    ("days", "words"), [(370, r"server\.crt' expired on \d{4}-"), (-3, r"server\.crt' is valid only from \d{4}-.* on")]
)
def test_a_certificate_that_is_not_valid_now_is_told_at_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: float, words: str
) -> None:
    key, certificate = made_days_ago(monkeypatch, tmp_path, days)
    settings = FederatedConfig(certificate=str(certificate), certificate_key=str(key))
    with pytest.raises(ConfigError, match=words):
        check_server_settings(settings, parse_address("127.0.0.1:1"), insecure=False)
    end = datetime.now(UTC) - timedelta(days=days) + timedelta(days=365)
    assert f"expires on {end:%Y-%m-%d}" in expiry_note(certificate) or days < 0


def test_what_is_wrong_with_a_certificate_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, outside = parse_address("127.0.0.1:1"), parse_address("example.org:1")
    key, certificate = made_days_ago(monkeypatch, tmp_path / "a", 360)
    other, _ = made_days_ago(monkeypatch, tmp_path / "b", 0)
    assert "expires on" in expiry_note(certificate)
    assert expiry_note(tmp_path / "b" / "server.crt") == ""
    locked, empty, pipe = tmp_path / "locked.key", tmp_path / "empty.crt", tmp_path / "pipe"
    loaded = serialization.load_pem_private_key(key.read_bytes(), None)
    secret = serialization.BestAvailableEncryption(b"word")
    locked.write_bytes(
        loaded.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption_algorithm=secret)
    )
    empty.touch()
    os.mkfifo(pipe)

    def fault(chain: Path, private: Path) -> str:
        settings = FederatedConfig(certificate=str(chain), certificate_key=str(private))
        with pytest.raises(ConfigError) as error:
            check_server_settings(settings, inside, insecure=False)
        return error.value.message

    assert "is not the key of the certificate" in fault(certificate, other)
    assert "locked.key' cannot be used" in fault(certificate, locked)
    assert "empty.crt' cannot be used: it is empty" in fault(empty, key)
    assert "pipe' cannot be used: it is a pipe" in fault(pipe, key)
    assert "cannot be used: it is a pipe" in fault(certificate, pipe)
    for wrong in (empty, pipe, key, tmp_path):
        with pytest.raises(ConfigError, match=r"ca_certificate: .* cannot be read as PEM certificates: "):
            client_authority(FederatedConfig(ca_certificate=str(wrong)), outside, insecure=False)
    made_days_ago(monkeypatch, tmp_path / "old", 3700)
    with pytest.raises(ConfigError, match=r"the authority in '.*ca\.crt' expired on"):
        client_authority(FederatedConfig(ca_certificate=str(tmp_path / "old" / "ca.crt")), outside, insecure=False)


def test_without_an_authority_those_of_the_system_are_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, authority = write_authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    assert [dict(pair for (pair,) in known["subject"]) for known in trusting(None).get_ca_certs()] == [
        {"commonName": "fedrag authority"}
    ]
    assert trusting(None).verify_mode == ssl.CERT_REQUIRED
    assert trusting(None).check_hostname
    assert len(trusting(authority.read_bytes()).get_ca_certs()) == 1


@pytest.mark.fl
@pytest.mark.parametrize(
    ("days", "host", "words"),
    [
        (370, "localhost", r"is not trusted: the server's certificate expired on \d{4}-\d\d-\d\d"),
        (-3, "localhost", r"the server's certificate is valid only from \d{4}-\d\d-\d\d .* clock right"),
        (0, "127.0.0.1", r"the server's certificate is made for localhost, and not for 127\.0\.0\.1"),
        (0, "", r"the server's certificate is signed by .*fedrag authority.*, which is trusted here in no way"),
    ],
)
def test_a_client_says_why_it_does_not_trust_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: float, host: str, words: str
) -> None:
    key, certificate = made_days_ago(monkeypatch, tmp_path, days)
    _, other = write_authority(tmp_path / "other")
    ca = (tmp_path / "ca.crt" if host else other).read_bytes()
    with serving(certificate=ServerCertificate(certificate, key)) as server:
        address = f"{host or 'localhost'}:{server.address[1]}"
        with pytest.raises(ConnectionFailedError, match=words):
            node(server, address=address, tls=True, ca=ca).check()


def test_how_a_client_trusts(tmp_path: Path) -> None:
    _, authority = write_authority(tmp_path)
    outside, inside = parse_address("example.org:1"), parse_address("127.0.0.1:1")
    settings = FederatedConfig(ca_certificate=str(authority))
    assert client_authority(FederatedConfig(), inside, insecure=False) == (False, None)
    assert client_authority(FederatedConfig(), outside, insecure=False) == (True, None)
    assert client_authority(settings, inside, insecure=False) == (True, authority.read_bytes())
    assert client_authority(settings, outside, insecure=True) == (False, None)
    for broken in (tmp_path / "none.crt", tmp_path / "ca.key"):
        with pytest.raises(ConfigError, match="cannot be read as PEM"):
            client_authority(FederatedConfig(ca_certificate=str(broken)), outside, insecure=False)


def test_keys_are_private_and_nothing_is_overwritten(tmp_path: Path) -> None:
    assert main(["keys", "ca", "--dir", str(tmp_path), "--quiet"]) == 0
    assert main(["keys", "server", "localhost", "10.0.0.1", "--dir", str(tmp_path), "--quiet"]) == 0
    assert main(["keys", "node", "north", "--dir", str(tmp_path), "--quiet"]) == 0
    for name in ("ca.key", "server.key", "north.key"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    before = (tmp_path / "north.key").read_bytes()
    assert main(["keys", "node", "north", "--dir", str(tmp_path), "--quiet"]) == 2
    assert main(["keys", "ca", "--dir", str(tmp_path), "--quiet"]) == 2
    assert main(["keys", "node", "../up", "--dir", str(tmp_path), "--quiet"]) == 2
    assert main(["keys", "server", "localhost", "--dir", str(tmp_path / "empty"), "--quiet"]) == 2
    assert (tmp_path / "north.key").read_bytes() == before
    assert set(load_allowed_keys(tmp_path)) == {"north"}


def test_bad_keys_are_said_so(tmp_path: Path) -> None:
    private, public = write_node_key(tmp_path, "north")
    private.chmod(0o644)
    with pytest.raises(ConfigError, match="Others may read"):
        load_private_key(private)
    with pytest.raises(ConfigError, match=r"none\.key' cannot be read: .*No such file"):
        load_private_key(tmp_path / "none.key")
    with pytest.raises(ConfigError, match="is a public key") as error:
        load_private_key(public)
    assert str(private) in error.value.hint
    (tmp_path / "again.pub").write_bytes(public.read_bytes())
    with pytest.raises(ConfigError, match="are the same key"):
        load_allowed_keys(tmp_path)
    (tmp_path / "again.pub").write_text("ssh-rsa nonsense")
    with pytest.raises(ConfigError, match="is no public key"):
        load_allowed_keys(tmp_path)
    with pytest.raises(ConfigError, match=r"there is no folder '.*none'") as missing:
        load_allowed_keys(tmp_path / "none")
    assert missing.value.hint.startswith("Make it")
    with pytest.raises(ConfigError, match=r"north\.pub' is no folder"):
        load_allowed_keys(public)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no public key"):
        load_allowed_keys(tmp_path / "empty")
    made = load_or_make_key(tmp_path / "own.key")
    assert load_or_make_key(tmp_path / "own.key").private_numbers() == made.private_numbers()
    assert (tmp_path / "own.key").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("pipe.pub", os.mkfifo, r"pipe\.pub' is no public key: it is a pipe"),
        ("folder.pub", os.mkdir, r"folder\.pub' is no public key: it is a folder"),
        ("endless.pub", partial(os.symlink, "/dev/zero"), r"endless\.pub' is no public key: it is a device"),
        ("socket.pub", partial(os.mknod, mode=stat.S_IFSOCK), r"no public key: it is a socket"),
        ("empty.pub", Path.touch, r"empty\.pub' is no public key: it is empty"),
        ("gone.pub", partial(os.symlink, "nothing"), r"gone\.pub' is no public key: No such file"),
        ("large.pub", lambda path: path.write_bytes(b" " * (2**20 + 1)), r"it has more than 1048576 bytes"),
        ("a\nb.pub", Path.touch, r"the name of 'a\\nb\.pub' in '.*' is no client name"),
        ("..pub", Path.touch, r"the name of '\.\.pub' in"),
        ("\x1b[31mred.pub", Path.touch, r"the name of '\\x1b\[31mred\.pub' in"),
        ("\u202eb.pub", Path.touch, r"the name of '\\u202eb\.pub' in"),
    ],
)
def test_what_is_no_key_among_the_allowed_ones_is_named_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, make: Callable[[Path], object], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("c")
    write_node_key(folder, "north")
    make(folder / name)
    with pytest.raises(ConfigError, match=words) as error:
        load_allowed_keys(folder)
    assert error.value.message.isprintable()


def test_a_key_is_known_by_the_fingerprint_that_openssh_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", "node", "north", "--dir", str(tmp_path), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["fingerprint"]
    blob = base64.b64decode((tmp_path / "north.pub").read_bytes().split()[1])
    assert shown == "SHA256:" + base64.b64encode(hashlib.sha256(blob).digest()).decode().rstrip("=")
    assert main(["keys", "node", "south", "--dir", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert f"fingerprint {fingerprint(load_public_key(tmp_path / 'south.pub'))}" in printed.out + printed.err


def test_what_is_wrong_with_a_clients_key_is_a_matter_of_its_config(
    write_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(rag_system={"retriever": {"model": "org/none"}})
    join = ["join-fl", str(path), "--address", "127.0.0.1:9", "federated.rounds=1", "--quiet"]
    assert main([*join, f"federated.key={tmp_path}/none.key"]) == 2
    assert "none.key' cannot be read" in capsys.readouterr().err
    _, public = write_node_key(tmp_path, "north")
    assert main([*join, f"federated.key={public}"]) == 2
    assert "is a public key" in capsys.readouterr().err


@pytest.mark.fl
def test_a_taken_port_is_found_before_models_are_loaded(
    write_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(rag_system={"retriever": {"model": "org/none"}})
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert main(["serve-fl", str(path), "--address", address, "federated.rounds=1", "--quiet"]) == 4
    assert f"Cannot listen on {address}: Address already in use." in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.fl
def test_a_server_says_at_its_start_that_keys_are_missing(
    write_config: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(rag_system={"retriever": {"model": "org/none"}})
    write_node_key(tmp_path / "clients", "north")
    serve = ["serve-fl", str(path), "--address", "127.0.0.1:0", f"federated.allowed_keys={tmp_path}/clients"]
    line = "1 key in federated.allowed_keys, but federated.min_clients is 2: put the other clients' public keys there"
    assert main([*serve, "federated.rounds=1"]) == 3
    assert line in " ".join(capsys.readouterr().err.split())
    assert main([*serve, "federated.min_clients=1"]) == 3
    assert "federated.min_clients is" not in capsys.readouterr().err


EXAMPLES = [Example(str(n), f"q{n}", ("a",), (), {"site": n % 3, "topic": "ab"[n % 2]}) for n in range(30)]


def test_owners_get_what_is_theirs() -> None:
    found = split_by_owner(EXAMPLES, "site")
    assert {owner: len(rows) for owner, rows in found.items()} == {"0": 10, "1": 10, "2": 10}
    assert all(str(example.metadata["site"]) == owner for owner, rows in found.items() for example in rows)
    nodes = [KnowledgeNode(str(n), "text", {"site": n % 2}) for n in range(4)]
    corpus = corpus_by_owner(nodes, "site")
    assert corpus is not None
    assert [node.id for node in corpus["0"]] == ["0", "2"]
    assert corpus_by_owner(nodes, "owner") is None
    with pytest.raises(DataError, match="has no 'site'"):
        split_by_owner([*EXAMPLES, Example("x", "q", ("a",))], "site")
    with pytest.raises(DataError, match="The passage 'x' has no 'site'"):
        corpus_by_owner([*nodes, KnowledgeNode("x", "text", {})], "site")


def test_random_and_skewed_splits_lose_nothing_and_repeat() -> None:
    dealt = split_at_random(EXAMPLES, 4, seed=1)
    assert sorted(len(part) for part in dealt) == [7, 7, 8, 8]
    assert sorted(int(e.id) for part in dealt for e in part) == list(range(30))
    assert split_at_random(EXAMPLES, 4, seed=1) == dealt
    assert split_at_random(EXAMPLES, 4, seed=2) != dealt

    def skew(alpha: float) -> float:
        parts = split_by_dirichlet(EXAMPLES, "topic", 3, alpha, seed=0)
        assert sorted(int(e.id) for part in parts for e in part) == list(range(30))
        assert all(parts)
        shares = [sum(e.metadata["topic"] == "a" for e in part) / len(part) for part in parts]
        return max(shares) - min(shares)

    assert skew(0.1) > skew(1000.0)
    assert split_by_dirichlet(EXAMPLES, "topic", 3, 0.1, 5) == split_by_dirichlet(EXAMPLES, "topic", 3, 0.1, 5)
    with pytest.raises(DataError, match="cannot be split over 31 sites"):
        split_by_dirichlet(EXAMPLES, "topic", 31, 0.5, seed=0)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("federated.strategy.type=FedAvgg", "federated.strategy.type: there is no type 'FedAvgg' (did you mean"),
        ("federated.strategy={type: FedAvg, proximal_mu: 1}", "federated.strategy.proximal_mu: is no setting here"),
        ("federated.strategy={type: FedTrimmedAvg, beta: 0.5}", "beta: must be less than 0.5"),
        ("federated.strategy={type: FedAvgM, server_momentum: 1}", "server_momentum: must be less than 1"),
        ("federated.strategy.fraction=0", "federated.strategy.fraction: must be greater than 0"),
        (
            "federated.strategy={type: Krum, num_malicious_nodes: 1}",
            "min_clients: must be at least 5 for Krum",
        ),
        ("federated.strategy={type: Bulyan, num_malicious_nodes: 1}", "must be at least 7 for Bulyan"),
        (
            "federated.strategy={type: MultiKrum, num_nodes_to_select: 9}",
            "must be at least 3 for MultiKrum",
        ),
        ("federated={strategy: {type: QFedAvg}, metrics: [steps]}", "must have loss in it for QFedAvg"),
        ("federated.wait_for_clients=1", "federated.wait_for_clients: must not be below min_clients (2)"),
        ("federated.metrics=[loss,texts]", "federated.metrics[1]: 'texts' is nothing that a client reports"),
        ("federated.name=a b", "federated.name: 'a b' is no client name"),
        ("federated.round=3", "federated.round: is no setting here (did you mean 'rounds'?)"),
        ("federated.sites.by=owners", "federated.sites.by: 'owners' is not one of"),
    ],
)
def test_what_is_wrong_with_a_federation_is_said(write_config: Callable[..., Path], override: str, words: str) -> None:
    with pytest.raises(InvalidConfigError) as error:
        load_config(write_config(), [override])
    assert words in error.value.message


def test_a_server_needs_no_data_but_others_do(write_config: Callable[..., Path]) -> None:
    path = write_config()
    text = path.read_text(encoding="utf-8")
    bare = text[: text.index("dataset:")] + text[text.index("trainer:") :]
    path.write_text(bare, encoding="utf-8")
    with pytest.raises(InvalidConfigError, match="dataset: is required"):
        load_config(path)
    assert load_config(path, ["federated.rounds=1"]).dataset.corpus is None
    assert main(["train", str(path), "federated.rounds=1", "--quiet"]) == 2
    assert main(["join-fl", str(path), "federated.rounds=1", "--quiet"]) == 2
    assert main(["simulate", str(path), "federated.rounds=1", "--clients", "2", "--quiet"]) == 2
