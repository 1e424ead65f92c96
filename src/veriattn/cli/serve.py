"""`serve` and `api-key`: the OpenAI-compatible server, and keys for its users."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import click

from veriattn.cli.inputs import check_digest, model_option, prover_words, threads_option
from veriattn.cli.output import json_option, note, print_json
from veriattn.convert.pull import PUBLISHED
from veriattn.errors import UsageError
from veriattn.home import models_directory, resolve_model
from veriattn.native import set_threads

_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "cryptography", "rfc8785")


def _need_extra() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"the server needs packages that are not installed: {', '.join(missing)}",
            hint="pip install 'veriattn[server]'",
        )


@click.command()
@model_option
@click.option("--config", type=click.Path(path_type=Path), metavar="FILE", help="Settings in TOML (docs/serving.md).")
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="0 takes a free one; the log names it.  [default: 8000]")
@click.option("--served-name", metavar="NAME", help="The model's name for clients.  [default: its directory's]")
@click.option("--api-keys", metavar="FILE", help="Who may use it (`veriattn api-key` makes entries).")
@click.option("--strategy", help="Where the work is done.  [default: run-ahead]")
@click.option("--device", help="Where the prover runs, cpu or cuda.  [default: cpu]")
@click.option("--prover-command", metavar="CMD", help="Another program as the prover (docs/wire.md).")
@click.option("--digest", callback=check_digest, metavar="SHA256", help="Refuse a model of another digest.")
@click.option("--demo", is_flag=True, help="The page gets a switch that makes the prover lie.")
@threads_option
@json_option
def serve(model: str, config: Path | None, as_json: bool, **options: Any) -> int:
    """Serve a model to OpenAI's clients; what leaves has been checked. Logs go to standard error as JSON.

    Ends on SIGTERM or Ctrl-C once the requests in progress are done. Needs `pip install 'veriattn[server]'`.

    \b
    Example:
      veriattn serve -m smollm2 --port 8000
      curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"model": "smollm2", "messages": [{"role": "user", "content": "Hello"}]}'
    """
    _need_extra()
    # Not at the top: the rest of the command line works without the server's packages.
    from veriattn.server.config import load_config  # noqa: PLC0415
    from veriattn.server.run import serve as run_server  # noqa: PLC0415

    command = prover_words(options["prover_command"])
    path = resolve_model(model)
    digest: str | None = options["digest"]
    if digest is None and model in PUBLISHED and path == models_directory() / model:
        digest = PUBLISHED[model].model_digest
    settings = load_config(
        config,
        {
            "host": options["host"],
            "port": options["port"],
            "served_name": options["served_name"],
            "keys_file": options["api_keys"],
            "demo": options["demo"] or None,
            "engine.strategy": options["strategy"],
            "engine.device": options["device"],
            "engine.prover_command": None if command is None else list(command),
            "engine.expected_digest": digest,
        },
    )
    if options["threads"] is not None:
        set_threads(options["threads"])
    code = run_server(path, settings)
    if as_json:
        print_json({"exit_code": code})
    return code


@click.command("api-key")
@click.argument("name")
@click.option("--requests-per-minute", type=click.IntRange(min=0), default=0, help="Quota; 0 is none.")
@click.option("--tokens-per-day", type=click.IntRange(min=0), default=0, help="Quota; 0 is none.")
@click.option("--concurrent-requests", type=click.IntRange(min=0), default=0, help="Quota; 0 is none.")
@json_option
def api_key(name: str, as_json: bool, **quotas: int) -> int:
    """Make an API key for the user NAME. The key goes to standard output, once; the entry for the keys file to standard error
    (`2>> keys.toml`).

    The file holds hashes alone. To rotate a key, add an entry of the same name, and `not_after = 2026-12-31T00:00:00Z` to the
    old one; SIGHUP has the server read the file again.

    \b
    Example:
      veriattn api-key alice --tokens-per-day 100000
    """
    _need_extra()
    from veriattn.server.auth import ANONYMOUS, new_key  # noqa: PLC0415

    if name in ("", ANONYMOUS):
        raise UsageError(f"{name!r} cannot be the name of a user", hint="give another")
    key, digest = new_key()
    lines = ["[[key]]", f"id = {json.dumps(name)}", f'sha256 = "{digest}"']
    lines += [f"{quota} = {value}" for quota, value in quotas.items() if value]
    note("\n".join([*lines, ""]))
    if as_json:
        print_json({"key": key, "sha256": digest, "entry": "\n".join(lines)})
    else:
        click.echo(key)
    return 0
