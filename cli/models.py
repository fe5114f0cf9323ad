"""Commands for models: train and the registry."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from cli.main import Context, main

if TYPE_CHECKING:
    from core.repository import FeastRepository
    from core.settings import Settings


@main.command()
@click.option("--spec", required=True, help="MODULE:NAME or FILE.py:NAME of a ModelSpec.")
@click.pass_obj
def train(ctx: Context, spec: str) -> None:
    """Build the training set, fit, evaluate and register a model."""


@main.group()
def models() -> None:
    """The model registry: list, show, promote, rollback, verify."""
