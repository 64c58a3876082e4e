"""`--wait`: for servers that start together with the stores that they need."""

from contextlib import closing
from typing import Annotated

import pymongo
import typer
from pymongo.errors import PyMongoError

from app.starting import UNUSABLE_CONFIGURATION

#: Without `--wait`: long enough for a primary that runs, short enough for an operator who waits.
PROMPT_SECONDS = 3

WaitOption = Annotated[
    int, typer.Option("--wait", min=0, max=600, help="Wait up to this many seconds for MongoDB to take writes.")
]


def wait_for_mongo(uri: str, *, seconds: int) -> None:
    """Return once the primary answers. seconds: 0 means PROMPT_SECONDS. Ends the command if there is no answer in time."""
    if not uri:
        typer.echo("MONGODB_URI is missing: name a replica set, or let `idem up` start one", err=True)
        raise typer.Exit(UNUSABLE_CONFIGURATION)
    seconds = seconds or PROMPT_SECONDS
    milliseconds = seconds * 1000
    try:
        # The driver itself looks again until the time is over; a ping goes to the primary.
        with closing(pymongo.MongoClient[dict[str, object]](uri, serverSelectionTimeoutMS=milliseconds)) as client:
            client.admin.command("ping")
    except PyMongoError as problem:
        typer.echo(f"MONGODB_URI: MongoDB did not answer within {seconds} s: {type(problem).__name__}", err=True)
        raise typer.Exit(UNUSABLE_CONFIGURATION) from problem
