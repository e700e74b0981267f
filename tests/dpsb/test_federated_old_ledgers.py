"""Ledgers and replies of silos that are put back, lost or not grown: nothing is drawn on them, and it is noticed."""

import shutil
from dataclasses import replace

import federation
import pytest
from federation import Faulty, Killed, first_spec, only

from dpsb.federated.messages import Update


def put_back(fed, name, keep, *, replies=True):
    """Puts a silo's folder back to a copy; ``replies=False`` leaves the newer replies there."""
    home = fed.out / "silos" / name
    if replies:
        shutil.rmtree(home)
        shutil.copytree(keep, home)
    else:
        (path,) = home.glob("runs/*/ledger.jsonl")
        shutil.copyfile(next(keep.glob("runs/*/ledger.jsonl")), path)


@pytest.mark.parametrize("replies", [True, False])
def test_an_old_ledger_put_back_is_refused(fed, tmp_path, replies):
    keep = tmp_path / "copy"

    def before(message):
        if only("south", 1)(message):
            shutil.copytree(fed.out / "silos" / "south", keep)
        if only("south", 2)(message):
            put_back(fed, "south", keep, replies=replies)

    state = fed.coordinator(Faulty(fed.silos(), before=before)).run()
    assert state.left["south"].startswith("ledger: ")
    assert "behind" in state.left["south"]
    assert str(tmp_path) not in state.left["south"]
    assert [len(record.silos) for record in state.history] == [3, 3, 2]
    fed.check_all(south=2, released={"south": 4})  # nothing was drawn on the old ledger


def test_an_old_ledger_is_noticed_without_the_coordinator_where_a_reply_saw_more(fed):
    silo, start = fed.silo("north"), fed.trainer.start
    silo.handle(start, first_spec(fed))
    path = fed.ledger("north").path
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]))
    reply = silo.handle(start, first_spec(fed, number=1))
    assert (reply.kind, "behind" in reply.message) == ("ledger", True)
    fed.check("north", 1, released=2)


def test_a_dishonest_silo_on_an_old_ledger_is_caught_by_its_receipts(fed, tmp_path):
    """It leaves the coordinator's receipt unread, and charges the same steps again: the heads cannot be the same."""
    keep = tmp_path / "copy"
    honest = fed.silo("south")

    class Forgets:
        def answer(self, message):
            if message.spec.round == 1:
                shutil.copytree(honest.folder, keep, dirs_exist_ok=True)
                reply = honest.answer(message)
                put_back(fed, "south", keep)
                return reply
            reply = honest.handle(message.theta, message.spec)
            if message.receipt is None or not isinstance(reply, Update):
                return reply
            ledger = fed.ledger("south")
            return replace(reply, follows=ledger.hash_at(min(message.receipt.length, ledger.length) - 1))

    state = fed.coordinator(Faulty({**fed.silos(), "south": Forgets()})).run()
    assert "an old one was put back" in state.left["south"]
    fed.check_all(south=4, released={"south": 6})  # its own ledger is wrong, which is why it is out


def test_a_new_ledger_in_place_of_a_lost_one_is_refused(fed):
    def before(message):
        if only("south", 1)(message):
            shutil.rmtree(fed.out / "silos" / "south")

    state = fed.coordinator(Faulty(fed.silos(), before=before)).run()
    assert "ledger of this run is gone" in state.left["south"]
    fed.check_all(south=0, released={"south": 2})


def test_a_ledger_put_back_while_the_server_was_down_is_refused(fed, monkeypatch, tmp_path):
    """The receipts of a round are on disk before its replies are used, so that this round's charges are covered too."""
    keep, home = tmp_path / "copy", fed.out / "silos" / "south"

    def before(message):
        if only("south", 1)(message):
            shutil.copytree(home, keep)

    inner = federation.Coordinator._next_theta

    def deadly(self, state, *rest):
        if state.round == 1:
            raise Killed
        return inner(self, state, *rest)

    monkeypatch.setattr(federation.Coordinator, "_next_theta", deadly)
    with pytest.raises(Killed):
        fed.coordinator(Faulty(fed.silos(), before=before)).run()
    monkeypatch.undo()
    shutil.rmtree(home)
    shutil.copytree(keep, home)
    state = fed.coordinator().run()
    assert "behind" in state.left["south"]
    fed.check_all(south=2, released={"south": 4})


@pytest.mark.parametrize("how", ["gone", "changed"])
def test_a_paid_reply_that_is_lost_is_not_drawn_again(fed, how):
    silo, start, spec = fed.silo("north"), fed.trainer.start, first_spec(fed)
    silo.handle(start, spec)
    (path,) = fed.replies("north")
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert silo.handle(start, spec).kind == "reply_lost"
    fed.check("north", 2)


def test_a_reply_that_charged_nothing_is_refused(fed):
    held = {}

    def after(message, reply):
        if message.silo != "south":
            return [reply]
        held.setdefault("receipt", reply.receipt)
        return [replace(reply, receipt=held["receipt"], follows=held["receipt"].head if message.receipt else None)]

    state = fed.coordinator(Faulty(fed.silos(), after=after)).run()
    assert "which is less than" in state.left["south"]
    fed.check_all(south=4)
