"""The core's transport over Flower's grid."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from dpsb.federated.channel import WorkerError
from dpsb.federated.flower.client_app import RECORD, content_of
from dpsb.federated.messages import Note, Refusal, Reply, RoundMessage, Update
from dpsb.federated.wire import WireError, pack, unpack

_PAUSE = 1.0
_NAMED = 60.0  # seconds for a node that is connected to say its silo's name
_SHORTEST, _LONGEST = 0.2, 3.0  # seconds between two looks for replies; Flower's own loop always takes the longest


class FlowerTransport:
    """Sends rounds through a grid, to the nodes whose silos have said their names.

    A node that does not answer in time, or with an error, is a lost silo; the coordinator decides what that means. One
    that is gone is not waited for: the grid answers with an error in its place.
    Flower delivers each message at most once and never again: asking again is the coordinator's, and costs a silo that
    has done the round nothing.

    Args:
      grid: Of the ServerApp.
      silos: Names that take part; other nodes are not sent anything.
      timeout: Seconds to wait for a round's replies.
      on_reply: Told each reply.
    """

    def __init__(
        self, grid: Grid, silos: Sequence[str], timeout: float, on_reply: Callable[[Reply], None] = lambda _reply: None
    ) -> None:
        self._grid, self._silos, self._timeout, self._on_reply = grid, tuple(silos), timeout, on_reply
        self._nodes: dict[str, int] = {}

    def find(self, patience: float) -> tuple[str, ...]:
        """Asks the nodes for their silos' names until all are there, or ``patience`` seconds are over.

        Returns:
          The names that were not found.

        Raises:
          WorkerError: If two nodes give the same name: then one of them is not whose it says.
        """
        last = time.monotonic() + patience
        while True:
            nodes = [node for node in self._grid.get_node_ids() if node not in self._nodes.values()]
            for node, content in self._ask(nodes, "query", {"ask": "name"}, timeout=max(_NAMED, patience)).items():
                name = content.decode("utf-8", "replace")
                if name in self._nodes and self._nodes[name] in self._grid.get_node_ids():
                    raise WorkerError(f"Two nodes say that they are silo {name!r}; unregister the one that is not.")
                if name in self._silos:
                    self._nodes[name] = node
            missing = tuple(name for name in self._silos if name not in self._nodes)
            if not missing or time.monotonic() > last:
                return missing
            time.sleep(_PAUSE)

    def send(self, messages: Sequence[RoundMessage]) -> Iterator[Reply]:
        """Yields the replies that came in time."""
        self._forget_the_gone()
        if any(message.silo not in self._nodes for message in messages):
            self.find(0.0)
        packed = {message.silo: pack(message) for message in messages if message.silo in self._nodes}
        likes = {message.silo: message.theta for message in messages}
        contents: dict[int, Mapping[str, str | bytes]] = {
            self._nodes[silo]: {"ask": "round", "content": content} for silo, content in packed.items()
        }
        owners = {node: silo for silo, node in self._nodes.items()}
        for node, content in self._ask_each(contents, MessageType.TRAIN, self._timeout).items():
            try:
                reply = unpack(content, likes[owners[node]])
            except WireError:
                continue  # as good as lost
            if isinstance(reply, (Update, Note, Refusal)) and reply.silo == owners[node]:
                self._on_reply(reply)
                yield reply

    def ledgers(self, run_id: str) -> dict[str, bytes]:
        """The ledgers of a run, from the silos that hand theirs out now."""
        nodes = {node: silo for silo, node in self._nodes.items()}
        found = self._ask(list(nodes), "query", {"ask": "ledger", "content": run_id.encode()}, self._timeout)
        return {nodes[node]: content for node, content in found.items() if content}

    def _forget_the_gone(self) -> None:
        there = set(self._grid.get_node_ids())
        self._nodes = {silo: node for silo, node in self._nodes.items() if node in there}

    def _ask(
        self, nodes: Sequence[int], kind: str, fields: Mapping[str, str | bytes], timeout: float
    ) -> dict[int, bytes]:
        return self._ask_each({node: fields for node in nodes}, kind, timeout)

    def _ask_each(self, fields: Mapping[int, Mapping[str, str | bytes]], kind: str, timeout: float) -> dict[int, bytes]:
        if not fields:
            return {}
        messages = [
            Message(RecordDict({RECORD: ConfigRecord(dict(each))}), dst_node_id=node, message_type=kind)
            for node, each in fields.items()
        ]
        found = {}
        for reply in self._replies(messages, timeout):
            if not reply.has_error():
                found[reply.metadata.src_node_id] = content_of(reply)
        return found

    def _replies(self, messages: Sequence[Message], timeout: float) -> Iterator[Message]:
        """What comes in time: looked for often at first, ever more seldom where silos take long."""
        began = time.monotonic()
        waiting = {number for number in self._grid.push_messages(messages) if number}  # without one it was not sent
        while waiting:
            for reply in self._grid.pull_messages(tuple(waiting)):
                waiting.discard(reply.metadata.reply_to_message_id)
                yield reply
            waited = time.monotonic() - began
            if waited >= timeout:
                return
            if waiting:
                time.sleep(min(_LONGEST, max(_SHORTEST, waited / 20)))
