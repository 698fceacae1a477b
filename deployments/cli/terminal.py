"""What all commands say and are told alike."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import httpx
import typer
from rich.console import Console
from rich.markup import escape

from deployments.remote import Refused
from schemas.errors import Erased, NoRoom, StoreDown

console = Console()
errors = Console(stderr=True)

CONFIG = Path("serve_config.yaml")
Config = Annotated[Path, typer.Option(exists=True, dir_okay=False, help="the server's configuration")]
LOCAL_URL = "http://127.0.0.1:8000"
Key = Annotated[str | None, typer.Option(envvar="FAL_KEY", help="ID:SECRET, where the server wants one")]


@contextmanager
def explained() -> Iterator[None]:
    """Say what is wrong in a line, without a traceback."""
    try:
        yield
    except (
        Refused,
        Erased,
        StoreDown,
        NoRoom,
        RuntimeError,
        ValueError,
        OSError,
        httpx.TransportError,
        httpx.InvalidURL,
    ) as error:
        errors.print(f"[red]{type(error).__name__}[/]: {escape(str(error))}", highlight=False)
        raise typer.Exit(1) from None


def shown_time(at: float | None) -> str:
    return "" if at is None else f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S}Z"
