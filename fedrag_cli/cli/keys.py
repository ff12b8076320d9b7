"""`fedrag keys`: node keys, a development authority, and server certificates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedrag_cli.cli.session import Session, in_session

DirectoryOption = Annotated[Path, typer.Option("--dir", "-d", help="Folder to write to; nothing is overwritten.")]

app = typer.Typer(
    help="Make keys and certificates for a federation.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    suggest_commands=False,
)


@app.command("node")
@in_session()
def node(
    current: Session,
    name: Annotated[str, typer.Argument(help="Name of the client.")],
    directory: DirectoryOption = Path("keys"),
) -> None:
    """Make a client's key pair: NAME.key stays with the client, NAME.pub goes to the server's owner."""
    from fedrag_cli.config.fields import check_client_name
    from fedrag_cli.errors import ConfigError

    try:
        check_client_name(name)
    except ValueError as error:
        raise ConfigError(f"'{name}' {error}.") from error
    from fedrag_cli.federated.keys import fingerprint, load_public_key, write_node_key

    private, public = write_node_key(directory, name)
    known_by = fingerprint(load_public_key(public))
    current.result(
        {"private_key": str(private), "public_key": str(public), "fingerprint": known_by},
        lambda renderer: renderer.written(
            [private, public],
            f"fingerprint {known_by}\n"
            f"Set federated.key to {private}; give {public} to the server's owner, for federated.allowed_keys.",
        ),
    )


@app.command("ca")
@in_session()
def authority(
    current: Session,
    directory: DirectoryOption = Path("keys"),
) -> None:
    """Make a certificate authority for one federation: ca.key stays with you, ca.crt goes to every client."""
    from fedrag_cli.federated.keys import write_authority

    private, certificate = write_authority(directory)
    current.result(
        {"private_key": str(private), "certificate": str(certificate)},
        lambda renderer: renderer.written(
            [private, certificate],
            f"Next: fedrag keys server HOST --dir {directory}; clients set federated.ca_certificate to ca.crt.",
        ),
    )


@app.command("server")
@in_session()
def server(
    current: Session,
    hosts: Annotated[list[str], typer.Argument(help="Host names and addresses that clients use to reach the server.")],
    directory: DirectoryOption = Path("keys"),
) -> None:
    """Make the server's TLS certificate, signed by the authority in the same folder."""
    from fedrag_cli.federated.keys import write_server_certificate

    private, certificate = write_server_certificate(directory, hosts)
    current.result(
        {"private_key": str(private), "certificate": str(certificate)},
        lambda renderer: renderer.written(
            [private, certificate],
            f"Set federated.certificate to {certificate} and federated.certificate_key to {private}.",
        ),
    )
