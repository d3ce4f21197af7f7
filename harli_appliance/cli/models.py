"""`harli models`: which there are, and the end of one that a job has made."""

from __future__ import annotations

from typing import Annotated

import typer

from harli_appliance.cli.connect import Json, Url, talk
from harli_appliance.cli.output import note, print_json, print_table

app = typer.Typer()


@app.callback(invoke_without_command=True)
def models(context: typer.Context, json: Json = False, url: Url = None) -> None:
    """Show the models that are served, those on this machine, and those that can be fetched."""
    if context.invoked_subcommand is not None:
        return
    from harli_appliance.config import load_settings
    from harli_appliance.errors import ApplianceUnavailable
    from harli_appliance.models.catalog import CATALOG, installed_models

    installed = installed_models(load_settings())
    have = {model.name for model in installed}
    fetchable = [entry for name, entry in CATALOG.items() if name not in have]
    try:
        served = talk(url, lambda client: client.models())
    except ApplianceUnavailable as error:
        note(f"{error.message}; showing what is on this machine")
        served = None
    if json:
        print_json(
            {
                "served": None if served is None else [model.model_dump(mode="json") for model in served],
                "installed": [
                    {"name": model.name, "path": str(model.path), "architecture": model.architecture}
                    for model in installed
                ],
                "fetchable": [
                    {"name": entry.name, "description": entry.description, "license": entry.license}
                    for entry in fetchable
                ],
            }
        )
        return
    rows = [
        (
            model.id,
            "served",
            model.harli.kind if model.harli.parent is None else f"adapter of {model.harli.parent}",
        )
        for model in served or []
    ]
    rows += [(model.name, "installed", str(model.path)) for model in installed]
    rows += [(entry.name, "fetched when served", entry.description) for entry in fetchable]
    print_table(("MODEL", "STATE", "WHAT"), rows)


@app.command("delete")
def delete(
    name: Annotated[str, typer.Argument(help="A finetuned model, as 'harli models' lists it.")],
    url: Url = None,
) -> None:
    """Stop serving a finetuned model and delete its adapter; the job that made it stays listed."""
    talk(url, lambda client: client.delete_model(name))
    typer.echo(f"{name} is deleted")
