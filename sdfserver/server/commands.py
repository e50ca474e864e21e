"""The commands that run the service: serve, api, worker, keys. Nothing heavy is imported before one is run."""

import json
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from sdfserver.errors import ConfigError
from sdfserver.terminal import say

if TYPE_CHECKING:
    from sdfserver.server.settings import Settings


class _WithSettings(TyperCommand):
    """A command whose help lists the service's settings, which takes an import that other commands are spared."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from sdfserver.server.settings import Settings

        rows = [
            f"[bold]SDFSERVER_{name.upper()}[/]: {field.description} [dim]({_shown(field.default)})[/]"
            for name, field in Settings.model_fields.items()
        ]
        self.epilog = "Settings, from the environment:\n\n" + "\n\n".join(rows)
        super().format_help(ctx, formatter)


def _shown(default: object) -> str:
    return "unset" if default is None else f"{default:,}" if isinstance(default, int) else str(default)


Host = Annotated[str | None, typer.Option(metavar="ADDRESS", show_default="127.0.0.1", help="Address to listen on.")]
Port = Annotated[
    int | None,
    typer.Option(metavar="N", min=0, max=65535, show_default="8000", help="Port to listen on; 0 takes a free one."),
]
DataDir = Annotated[
    Path | None,
    typer.Option(metavar="DIR", show_default="sdfserver-data", help="Where clouds, meshes and the database are kept."),
]
Device = Annotated[
    str | None,
    typer.Option(metavar="auto|cpu|cuda", show_default="auto", help="Where to compute."),
]


def add_commands(app: typer.Typer) -> None:
    """Add the service's commands to the command line."""
    for command in (serve, api, worker):
        app.command(rich_help_panel="Service", cls=_WithSettings)(command)
    app.command(rich_help_panel="Service")(status)
    app.command(rich_help_panel="Service")(migrate)
    keys = typer.Typer(help="API keys: create, list and revoke them.", no_args_is_help=True)
    keys.command("create")(create_key)
    keys.command("list")(list_keys)
    keys.command("revoke")(revoke_key)
    app.add_typer(keys, name="keys", rich_help_panel="Service")


def serve(
    host: Host = None,
    port: Port = None,
    data_dir: DataDir = None,
    workers: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, show_default="one for each GPU, or one", help="Worker processes."),
    ] = None,
    device: Device = None,
) -> None:
    """Serve the HTTP interface and run its jobs: there is nothing else to start.

    Jobs survive whatever ends a process: run the command again, and they go on.
    """
    from sdfserver.server.supervisor import serve as run
    from sdfserver.server.supervisor import with_workers

    settings = with_workers(_settings(host=host, port=port, data_dir=data_dir, workers=workers, device=device))
    counted = f"{settings.workers} worker{'' if settings.workers == 1 else 's'}"

    def serving(url: str) -> None:
        say(f"serving on {url} ({counted}, data in {settings.data_dir}); open it in a browser, stop with Ctrl-C")

    run(settings, serving)


def api(
    host: Host = None,
    port: Port = None,
    data_dir: DataDir = None,
    fd: Annotated[int | None, typer.Option(hidden=True, help="A socket that listens already.")] = None,
) -> None:
    """Serve the HTTP interface alone; workers on any host share its database, and its data folder or bucket."""
    from sdfserver.server.storage import open_storage
    from sdfserver.server.supervisor import check_public, listen, run_api, url_of, watch_parent

    settings = _settings(host=host, port=port, data_dir=data_dir)
    if fd is None:
        store = open_storage(settings)
        check_public(settings, store)
        store.close()
        listener = listen(settings)
        say(f"serving the interface on {url_of(listener)}, without a worker")
    else:
        listener = socket.socket(fileno=fd)
    watch_parent()
    run_api(settings, listener)


def worker(data_dir: DataDir = None, device: Device = None) -> None:
    """Run jobs, one at a time, for an API that shares the database, and the data folder or bucket."""
    from sdfserver.server.supervisor import watch_parent
    from sdfserver.server.worker import main

    settings = _settings(data_dir=data_dir, device=device)
    watch_parent()
    main(settings)


def status(
    data_dir: DataDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Show how the service stands: queue, workers and their devices, what failed last.

    It asks the database, so that it answers when no API does.
    """
    from sdfserver.server.status import look, text
    from sdfserver.server.storage import open_store

    settings = _settings(data_dir=data_dir)
    if settings.database_url is None and not settings.database_file.exists():
        raise ConfigError(f"no service has run in {str(settings.data_dir)!r}; give its --data-dir")
    found = look(open_store(settings), settings.lease_seconds)
    sys.stdout.write((json.dumps(found, indent=1) if as_json else text(found)) + "\n")


def migrate(data_dir: DataDir = None) -> None:
    """Bring the database to this version's schema, as every start of the service does by itself.

    Several may do so at once. A database of a later sdfserver is refused.
    """
    from sdfserver.server.storage import migrate_store

    _store, (before, after) = migrate_store(_settings(data_dir=data_dir))
    say(f"the database is at version {after}" + (f"; it was at {before}" if before not in (None, after) else ""))


def create_key(
    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False, help="Whose key it is.")],
    max_jobs: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, show_default="the server's limit", help="Most unfinished jobs of this key."),
    ] = None,
    if_none: Annotated[bool, typer.Option("--if-none", help="Create it only where no key was ever made.")] = False,
    data_dir: DataDir = None,
) -> None:
    """Create a key and print it: it is not stored, and cannot be shown again.

    As soon as there is a key, the server answers nobody without one.
    """
    from sdfserver.server.storage import open_store

    store = open_store(_settings(data_dir=data_dir))
    made = store.create_first_key(name, max_jobs) if if_none else store.create_key(name, max_jobs)
    if made is None:
        return
    key_id, secret = made
    say(f"key {key_id} for {name}; keep it, it will not be shown again:")
    sys.stdout.write(secret + "\n")


def list_keys(data_dir: DataDir = None) -> None:
    """List the keys: id, name, and whether they are in use."""
    from sdfserver.server.storage import open_store

    for row in open_store(_settings(data_dir=data_dir)).list_keys():
        sys.stdout.write(f"{row.id}  {'revoked' if row.revoked_at else 'in use '}  {row.name}\n")


def revoke_key(
    key_id: Annotated[str, typer.Argument(metavar="ID", show_default=False, help="As keys list shows it.")],
    data_dir: DataDir = None,
) -> None:
    """End a key's use, at once."""
    from sdfserver.server.storage import open_store

    if not open_store(_settings(data_dir=data_dir)).revoke_key(key_id):
        raise ConfigError(f"there is no key {key_id!r} in use; see sdfserver keys list")
    say(f"key {key_id} is revoked")


def _settings(**overrides: Any) -> "Settings":
    from sdfserver.server.logs import set_up_logging
    from sdfserver.server.settings import load_settings

    set_up_logging()
    return load_settings(**overrides)
