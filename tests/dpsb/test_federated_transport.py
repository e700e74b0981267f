"""The core's transport over a grid of Flower's messages without Flower's processes."""

import subprocess
import sys
import time

import pytest
import torch
from federation import NAMES, terms

pytest.importorskip("flwr")

from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from dpsb.federated.channel import WorkerError
from dpsb.federated.flower import transport as transport_module
from dpsb.federated.flower.client_app import RECORD
from dpsb.federated.flower.transport import FlowerTransport
from dpsb.federated.messages import Refusal, RoundMessage
from dpsb.federated.wire import pack

START = {"a.R": torch.ones(2, 2)}
ASKED = "ask"


@pytest.fixture(autouse=True)
def in_a_run(monkeypatch):
    """Flower's messages say from which of its tasks they are."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class Grid:
    """Nodes by number, each a function from what it is asked to bytes; None: no answer ever, an error: an error.

    ``away`` are nodes that are registered and gone: the SuperLink answers with an error for what they were sent.
    """

    def __init__(self, nodes, away=()):
        self.nodes, self.away, self.sent, self.seen = dict(nodes), set(away), {}, []

    def get_node_ids(self):
        return [node for node in self.nodes if node not in self.away]

    def push_messages(self, messages):
        numbers = []
        for message in messages:
            number = f"m{len(self.seen)}"
            self.seen.append(message)
            message.metadata.__dict__["_message_id"] = number
            self.sent[number] = message
            numbers.append(None if message.metadata.dst_node_id in self.away else number)
        return numbers

    def pull_messages(self, numbers):
        for number in numbers:
            message = self.sent[number]
            node = message.metadata.dst_node_id
            found = self.nodes[node](dict(message.content[RECORD]))
            if node in self.away:
                found = ValueError()
            if isinstance(found, bytes):
                reply = Message(RecordDict({RECORD: ConfigRecord({"content": found})}), reply_to=message)
            elif found is None:
                continue
            else:
                reply = Message(Error(code=3, reason="gone"), reply_to=message)
            yield reply


def named(name, answer=lambda _content: None):
    """A node of a silo that says its name, and answers rounds as it is told."""
    return lambda asked: name.encode() if asked[ASKED] == "name" else answer(asked["content"])


def refusing(name):
    return named(name, lambda _content: pack(refusal(name)))


def refusal(name):
    return Refusal(silo=name, run_id="0" * 32, round=0, kind="budget", message="The budget is spent.")


def messages():
    specs = terms().specs("0" * 32, 0, START, "1" * 64)
    return [RoundMessage(silo=name, spec=specs[name], theta=START) for name in NAMES]


def test_replies_come_from_the_nodes_of_the_silos_that_are_asked():
    grid = Grid({number: refusing(name) for number, name in enumerate((*NAMES, "stranger"))})
    transport = FlowerTransport(grid, NAMES, timeout=5.0)
    assert transport.find(5.0) == ()
    assert sorted(reply.silo for reply in transport.send(messages())) == sorted(NAMES)
    assert {message.metadata.dst_node_id for message in grid.seen[4:]} == {0, 1, 2}, "no round goes to the stranger"


def test_a_silo_that_never_comes_is_missing_once_patience_is_over():
    grid = Grid({0: refusing("north"), 1: lambda _asked: ValueError(), 2: refusing("west")})
    transport = FlowerTransport(grid, NAMES, timeout=5.0)
    began = time.monotonic()
    assert transport.find(1.5) == ("south",)
    assert time.monotonic() - began >= 1.5
    assert sorted(reply.silo for reply in transport.send(messages())) == ["north", "west"]


def test_one_that_is_gone_is_not_waited_for_and_is_found_when_it_is_back():
    grid = Grid({number: refusing(name) for number, name in enumerate(NAMES)})
    transport = FlowerTransport(grid, NAMES, timeout=600.0)
    transport.find(5.0)
    grid.away = {1}
    assert sorted(reply.silo for reply in transport.send(messages())) == ["north", "west"]
    grid.away = set()
    assert sorted(reply.silo for reply in transport.send(messages())) == sorted(NAMES)


def test_one_that_goes_while_its_round_is_waited_for_is_lost_at_once():
    grid = Grid({number: refusing(name) for number, name in enumerate(NAMES)})
    grid.nodes[1] = named("south", lambda _content: grid.away.add(1))
    transport = FlowerTransport(grid, NAMES, timeout=600.0)
    transport.find(5.0)
    assert sorted(reply.silo for reply in transport.send(messages())) == ["north", "west"]


def test_a_node_that_takes_long_to_name_its_silo_is_waited_for_between_rounds():
    """It came back from a crash, so that the round asks for names without the patience of the beginning."""
    asked = []

    def slowly(content):
        asked.append(content)
        return b"south" if len(asked) > 3 else None

    grid = Grid({0: refusing("north"), 1: slowly, 2: refusing("west")})
    transport = FlowerTransport(grid, NAMES, timeout=5.0)
    assert transport.find(0.0) == ()
    assert len(asked) == 4


def test_one_that_says_nothing_costs_the_timeout_and_no_more(monkeypatch):
    monkeypatch.setattr(transport_module, "_NAMED", 0.5)
    grid = Grid({0: refusing("north"), 1: named("south"), 2: refusing("west")})
    transport = FlowerTransport(grid, NAMES, timeout=1.0)
    transport.find(5.0)
    began = time.monotonic()
    assert sorted(reply.silo for reply in transport.send(messages())) == ["north", "west"]
    assert time.monotonic() - began >= 1.0


@pytest.mark.parametrize("answer", [b"rubbish", pack(refusal("north"))], ids=["no message", "of another silo"])
def test_what_is_no_reply_of_the_silo_is_as_good_as_lost(answer):
    grid = Grid({0: refusing("north"), 1: named("south", lambda _content: answer), 2: refusing("west")})
    transport = FlowerTransport(grid, NAMES, timeout=5.0)
    transport.find(5.0)
    assert sorted(reply.silo for reply in transport.send(messages())) == ["north", "west"]


def test_two_nodes_with_one_name_stop_the_run():
    grid = Grid({number: refusing(name) for number, name in enumerate((*NAMES, "south"))})
    with pytest.raises(WorkerError, match="Two nodes say that they are silo 'south'"):
        FlowerTransport(grid, NAMES, timeout=5.0).find(5.0)


def test_a_server_imports_none_of_the_models_libraries_before_its_rounds():
    """They take seconds, twice, and silos wait for it."""
    modules = "dpsb.federated.flower.serving, dpsb.federated.flower.server_app"
    code = f"import sys, {modules}; print({{'peft', 'opacus', 'transformers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "set()\n"
