"""`doctor`: what this machine has, and which paths will be used."""

from __future__ import annotations

import click

from veriattn.cli.output import json_option, print_json
from veriattn.doctor import examine, in_words


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """What this machine has: CPU features, GPU, TEE, isolation of the prover, and which paths will be used.

    \b
    Example:
      veriattn doctor
    """
    found = examine()
    if as_json:
        print_json(found)
        return
    click.echo(in_words(found))
