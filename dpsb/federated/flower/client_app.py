"""The ClientApp: it hands every message to the silo's worker, and neither reads data nor loads a model itself.

Flower starts it anew for each message. What comes with a message is bytes; what the silo does with them is decided by
the worker, its policy and its ledger, not by whoever submitted the app.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from dpsb.federated.channel import LEDGER, NAME, ROUND, ask

RECORD = "dpsb"
"""The one record of every message: ``ask`` and, where it takes any, ``content``; replies hold ``content`` alone."""

_NO_FOLDER = "Give the SuperNode its silo's folder: --node-config 'silo-folder=\"/path\"'."


def silo_folder(context: Context) -> Path:
    """Where the silo's worker listens: said by the SuperNode's own configuration, never by a message or a run.

    Raises:
      ValueError: If the SuperNode does not say.
    """
    folder = context.node_config.get("silo-folder")
    if not isinstance(folder, str):
        raise ValueError(_NO_FOLDER)
    return Path(folder)


def content_of(message: Message) -> bytes:
    """The bytes that a message or a reply carries; none where there are none."""
    record = message.content.get(RECORD)
    value = record.get("content") if isinstance(record, ConfigRecord) else None
    return value if isinstance(value, bytes) else b""


def make_client_app(folder_of: Callable[[Context], Path] = silo_folder) -> ClientApp:
    """A ClientApp that asks the worker in the folder that ``folder_of`` names."""
    client = ClientApp()

    def reply(message: Message, content: bytes) -> Message:
        return Message(RecordDict({RECORD: ConfigRecord({"content": content})}), reply_to=message)

    @client.query()
    def query(message: Message, context: Context) -> Message:
        """The silo's name, or the ledger of a run; both are public."""
        kind = LEDGER if message.content[RECORD]["ask"] == "ledger" else NAME
        return reply(message, ask(folder_of(context), kind, content_of(message)))

    @client.train()
    def train(message: Message, context: Context) -> Message:
        """A round."""
        return reply(message, ask(folder_of(context), ROUND, content_of(message)))

    return client


app = make_client_app()
