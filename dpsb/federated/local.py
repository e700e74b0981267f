"""A transport within one process: for simulation, and for tests of every fault that a network can have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from dpsb.federated.messages import Reply, RoundMessage
from dpsb.federated.silo import Silo


class LocalTransport:
    """Calls the silos one after the other.

    Args:
      silos: By name. A message for one that is not here is lost.
      on_reply: Told after each silo's reply, for a progress bar.
    """

    def __init__(self, silos: Mapping[str, Silo], on_reply: Callable[[Reply], None] = lambda _reply: None) -> None:
        self._silos, self._on_reply = dict(silos), on_reply

    def send(self, messages: Sequence[RoundMessage]) -> Iterator[Reply]:
        """Yields each silo's reply as it comes."""
        for message in messages:
            silo = self._silos.get(message.silo)
            if silo is None:
                continue
            reply = silo.answer(message)
            self._on_reply(reply)
            yield reply
