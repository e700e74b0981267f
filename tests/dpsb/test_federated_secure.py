"""Secure sums by themselves: exact sums, dropouts, thresholds, and what a server may not do."""

import builtins
import contextlib
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from dpsb.federated.checks import FederatedError
from dpsb.federated.messages import SUM, Note, Receipt, Refusal, RoundMessage, Summing, Update
from dpsb.federated.secure import masks
from dpsb.federated.secure.masks import SecureSumError, agreed, mask, public_of, seal, unseal
from dpsb.federated.secure.opening import SecureSum
from dpsb.federated.secure.party import Party
from dpsb.federated.secure.sessions import Session
from dpsb.federated.secure.whole_numbers import modular
from dpsb.federated.spec import RoundSpec, SiloPolicy

pytest.importorskip("flwr")

NAMES = ("ada", "bea", "cid", "dan", "eve")
DIMENSION = 1000


def spec(**changes):
    usual = {"run_id": "a" * 32, "round": 0, "rounds": 3, "theta_sha256": "b" * 64, "basis_sha256": "c" * 64}
    asked = {"model": "secagg", "sampling_prob": 0.1, "noise_multiplier": 1.0, "clip_steps": 2**15}
    return RoundSpec(**{**usual, **asked, "clients": 5, "dropouts": 1, "colluders": 1, **changes})


class Network:
    """Five silos' sessions and their vectors behind a transport that loses what it is told to lose."""

    def __init__(self, folder, lost=()):
        self.lost, self.spec, self.folder = set(lost), spec(), folder
        self.seen = []
        for name in NAMES:
            (folder / name).mkdir(exist_ok=True)
        keys = {name: public_of(masks.own_key(folder / name)).hex() for name in NAMES}
        limits = {"max_epsilon": 9.0, "delta": 1e-3, "models": ["secagg"], "clients": 5}
        self.policies = {name: SiloPolicy(silo=name, peers=keys, **limits) for name in NAMES}
        source = np.random.default_rng(1)
        self.vectors = {name: source.integers(-(2**33), 2**33, DIMENSION) for name in NAMES}
        self.sessions = {}

    def send(self, messages):
        for message in messages:
            summing, name = message.summing, message.silo
            self.seen.append((summing.phase, name))
            if (summing.phase, name) in self.lost:
                continue
            if summing.phase == "share":
                self.sessions[name] = Session(self.folder / name, self.policies[name], self.spec, summing.session)
            try:
                if summing.phase == "mask":
                    yield self.masked(name, message)
                else:
                    yield self.sessions[name].note(summing)
            except SecureSumError as error:
                yield Refusal(silo=name, run_id=self.spec.run_id, round=0, kind="state", message=str(error))

    def masked(self, name, message):
        session = self.sessions[name]
        session.begin(message.summing)
        tensors = session.masked({SUM: torch.from_numpy(self.vectors[name])}, message.summing)
        return Update(
            silo=name,
            run_id=self.spec.run_id,
            round=0,
            theta_sha256=self.spec.theta_sha256,
            tensors=tensors,
            receipt=Receipt(ledger_id="x", length=3, head="d" * 64, round=0),
            notes=session.confirmations(),
        )

    def sum(self):
        """The protocol with this network; the sum, and whose vectors are in it."""
        secure = SecureSum(dict.fromkeys(NAMES, self.spec), self, attempts=1)
        members = secure.share(NAMES)
        asked = [RoundMessage(silo=name, spec=self.spec, theta={}, summing=secure.masking(name)) for name in members]
        replies = {reply.silo: reply for reply in self.send(asked) if isinstance(reply, Update)}
        self.masks = {name: update.tensors[SUM].numpy().view("uint32") for name, update in replies.items()}
        return secure.open(replies, self.masks), tuple(replies)


def exact(network, names):
    return modular(sum(network.vectors[name] for name in names))


@pytest.mark.parametrize(
    ("lost", "added"),
    [
        ((), NAMES),
        ([("share", "bea")], ("ada", "cid", "dan", "eve")),
        ([("mask", "bea")], ("ada", "cid", "dan", "eve")),
        ([("mask", "eve")], ("ada", "bea", "cid", "dan")),
        ([("agree", "bea")], NAMES),
        ([("open", "ada")], NAMES),
        ([("mask", "bea"), ("agree", "bea"), ("open", "bea")], ("ada", "cid", "dan", "eve")),
    ],
)
def test_the_opened_sum_is_exactly_that_of_the_vectors(tmp_path, lost, added):
    """Whatever one silo drops out of: every vector that arrived is in the sum, masks and all others are not."""
    network = Network(tmp_path, lost)
    total, names = network.sum()
    assert names == added
    np.testing.assert_array_equal(total, exact(network, added))


@pytest.mark.parametrize(
    "lost",
    [
        [("share", "ada"), ("share", "bea")],
        [("mask", "ada"), ("mask", "bea")],
        [("agree", "ada"), ("agree", "bea")],
        [("open", "ada"), ("open", "bea")],
        [("mask", "ada"), ("agree", "bea")],
        [("mask", "ada"), ("open", "bea")],
    ],
)
def test_below_the_threshold_nothing_is_opened(tmp_path, lost):
    network = Network(tmp_path, lost)
    with pytest.raises(SecureSumError):
        network.sum()


def test_a_masked_vector_is_uniform_and_never_the_same(tmp_path):
    network = Network(tmp_path)
    network.vectors = {name: np.zeros(DIMENSION, dtype=np.int64) for name in NAMES}
    network.sum()
    first = dict(network.masks)
    network.sum()
    for name in NAMES:
        assert stats.kstest(first[name] / 2.0**32, "uniform").pvalue > 1e-6
        assert not np.array_equal(first[name], network.masks[name])
    apart = first["ada"] - first["bea"]
    assert stats.kstest(apart / 2.0**32, "uniform").pvalue > 1e-6


def test_masks_are_a_256_bit_stream_and_not_flowers():
    """ChaCha20 by the vector of RFC 8439, section 2.4.2's cipher at counter 0 and nonce 0 (appendix A.1, vector 1)."""
    wanted = bytes.fromhex("76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7")
    assert mask(bytes(32), 8).tobytes() == wanted
    one = bytearray(os.urandom(32))
    other = bytearray(one)
    other[31] ^= 1
    other[27] ^= 1  # what Flower's folding to 32 bits would not see
    assert not np.array_equal(mask(bytes(one), 100), mask(bytes(other), 100))


def test_without_the_secret_sharing_there_is_no_secure_sum(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("flwr"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SecureSumError, match=r"secret sharing of Flower .*, which is not there"):
        masks.split(bytes(32), 2, 3)


def test_a_secret_sharing_that_changed_is_refused(monkeypatch):
    monkeypatch.setattr(masks, "_sharing", lambda: (lambda s, _t, n: [s[:-1]] * n, lambda shares: shares[0]))
    with pytest.raises(SecureSumError, match="does not give a secret back"):
        masks.split(bytes(32), 2, 3)


def test_fewer_shares_than_the_threshold_are_of_no_use():
    secret = os.urandom(32)
    shares = masks.split(secret, 3, 5)
    assert masks.join([shares[4], shares[0], shares[2]]) == secret
    with contextlib.suppress(SecureSumError):
        assert masks.join(shares[:2]) != secret


def test_sealed_notes_are_of_one_sender_and_one_sum():
    one, other = os.urandom(32), os.urandom(32)
    key = agreed(one, public_of(other), "x")
    assert key == agreed(other, public_of(one), "x")
    assert key != agreed(other, public_of(one), "y")
    sealed = seal(key, b"share", "sum 1")
    assert unseal(key, sealed, "sum 1") == b"share"
    for wrong in ((key, sealed, "sum 2"), (bytes(32), sealed, "sum 1"), (key, sealed[:-1] + b"\0", "sum 1")):
        with pytest.raises(SecureSumError, match="not from the silo that it names"):
            unseal(*wrong)
    with pytest.raises(SecureSumError, match="not valid"):
        agreed(one, bytes(32), "x")


# --- what a server may try


def parties(threshold=4, context="sum"):
    keys = {name: os.urandom(32) for name in NAMES}
    publics = {name: public_of(key) for name, key in keys.items()}
    return {
        name: Party(name, keys[name], {n: p for n, p in publics.items() if n != name}, threshold, context)
        for name in NAMES
    }


def joined(everybody, members=NAMES):
    sent = {name: everybody[name].share() for name in NAMES}
    for name in members:
        everybody[name].join({other: sent[other][name] for other in members if other != name})
        everybody[name].mask(np.zeros(8, dtype=np.int64))
    return {name: everybody[name].confirm() for name in members}


def addressed(sent, name, names):
    return {other: sent[other][name] for other in names if other != name}


def test_a_second_sum_of_the_same_vectors_is_never_agreed_to():
    """The difference of two sums is one silo's vector under its own share of the noise."""
    everybody = parties()
    confirmed = joined(everybody)
    everybody["ada"].agree(addressed(confirmed, "ada", NAMES))
    with pytest.raises(SecureSumError, match="agreed to another sum"):
        everybody["ada"].agree(addressed(confirmed, "ada", NAMES[:4]))


def test_a_silo_that_announces_anothers_key_cancels_no_mask(monkeypatch):
    """Eve colludes and shows Ada's key as her own. Bea's masks with both must not be the same with opposite signs."""
    everybody = parties(threshold=5)
    sent = {name: everybody[name].share() for name in NAMES}
    copied = sent["ada"]["ada"]
    monkeypatch.setattr("dpsb.federated.secure.party.public_of", lambda _secret: copied)
    eve = parties_again(everybody["eve"])
    sent["eve"] = eve.share()
    monkeypatch.undo()
    bea = everybody["bea"]
    bea.join({other: sent[other]["bea"] for other in NAMES if other != "bea"})
    vector = np.arange(8, dtype=np.int64)
    left = bea.mask(vector) - mask(bea._seed, 8)
    for name in ("cid", "dan"):  # taken off, as if they had dropped out
        shared = mask(agreed(bea._secret, sent[name][name], masks.mask_purpose("sum", "bea", name)), 8)
        left = left - shared
    assert not np.array_equal(left, modular(vector))


def parties_again(party):
    """The same silo with fresh secrets in the same sum."""
    return Party(party._name, party._key, party._peers, party._threshold, party._context)


def test_lists_that_differ_open_nothing():
    """Ada is told that five vectors arrived, the others that Eve's did not: neither sum has enough behind it."""
    everybody = parties()
    confirmed = joined(everybody)
    told = {"ada": NAMES, "bea": NAMES, "cid": NAMES[:4], "dan": NAMES[:4]}
    agreements = {name: everybody[name].agree(addressed(confirmed, name, told[name])) for name in told}
    for name in told:
        heard = {other: sent[name] for other, sent in agreements.items() if other != name and name in sent}
        with pytest.raises(SecureSumError, match="Only 2 silos agree to this sum; it takes 4"):
            everybody[name].open(heard)


def test_a_silo_that_masked_for_others_is_not_added():
    """Were members not the same for all, a server could cut the sum into small ones."""
    everybody = parties()
    sent = {name: everybody[name].share() for name in NAMES}
    told = {"ada": NAMES, "bea": NAMES, "cid": NAMES, "dan": NAMES, "eve": ("bea", "cid", "dan", "eve")}
    for name, members in told.items():
        everybody[name].join({other: sent[other][name] for other in members if other != name})
        everybody[name].mask(np.zeros(8, dtype=np.int64))
    confirmed = {name: everybody[name].confirm() for name in NAMES}
    proofs = {**addressed(confirmed, "bea", NAMES)}
    with pytest.raises(SecureSumError, match="Silo 'eve' did not mask for the members"):
        everybody["bea"].agree(proofs)


@pytest.mark.parametrize("forged", ["old", "made up", "of another silo"])
def test_forged_agreements_open_nothing(forged):
    everybody, before = parties(), parties()
    confirmed = joined(everybody)
    for name in NAMES:
        everybody[name].agree(addressed(confirmed, name, NAMES))
    old = {name: before[name].agree(addressed(c, name, NAMES)) for c in [joined(before)] for name in NAMES}
    heard = {
        "old": addressed(old, "ada", NAMES),
        "made up": {name: bytes(32) for name in NAMES[1:]},
        "of another silo": {
            name: everybody["bea"].agree(addressed(confirmed, "bea", NAMES))["ada"] for name in NAMES[1:]
        },
    }[forged]
    with pytest.raises(SecureSumError, match="silos agree to this sum; it takes 4"):
        everybody["ada"].open(heard)


def test_a_silo_gives_one_share_of_each_other_never_both():
    everybody = parties()
    confirmed = joined(everybody)
    added = ("ada", "bea", "cid", "dan")
    agreements = {name: everybody[name].agree(addressed(confirmed, name, added)) for name in added}
    given = everybody["ada"].open(addressed(agreements, "ada", added))
    shares = everybody["ada"]._shares
    for name in NAMES:
        assert given[name] == shares[name][1 if name in added else 0]


def test_one_vector_and_one_list_of_members():
    everybody = parties()
    joined(everybody)
    with pytest.raises(SecureSumError, match="masks one vector of a silo"):
        everybody["ada"].mask(np.zeros(8, dtype=np.int64))
    with pytest.raises(SecureSumError, match="settled already"):
        everybody["ada"].join({})
    fresh = parties()
    sent = {name: fresh[name].share() for name in NAMES}
    with pytest.raises(SecureSumError, match="needs 4 of the silos that the policy knows, not 3"):
        fresh["ada"].join({name: sent[name]["ada"] for name in ("bea", "cid")})
    with pytest.raises(SecureSumError, match="not from the silo that it names"):
        fresh["ada"].join({"bea": sent["cid"]["ada"], "cid": sent["bea"]["ada"], "dan": sent["dan"]["ada"]})
    with pytest.raises(SecureSumError, match="once its members are known"):
        fresh["bea"].mask(np.zeros(8, dtype=np.int64))


def test_a_server_that_brings_its_own_keys_is_refused(tmp_path):
    """Public keys are in the policy; a pair that the server knows seals nothing that a silo opens."""
    network = Network(tmp_path)
    stranger = os.urandom(32)
    fake = {**network.policies["bea"].peers, "bea": public_of(stranger).hex()}
    with pytest.raises(SecureSumError, match="names another public key than its own"):
        Session(tmp_path / "bea", replace(network.policies["bea"], peers=fake), network.spec, "e" * 32)
    twice = {**network.policies["ada"].peers, "bea": network.policies["ada"].peers["cid"]}
    with pytest.raises(SecureSumError, match="the same public key twice"):
        Session(tmp_path / "ada", replace(network.policies["ada"], peers=twice), network.spec, "e" * 32)


def test_keys_are_for_their_owner_alone(tmp_path):
    key = masks.own_key(tmp_path)
    assert masks.own_key(tmp_path) == key
    assert len(key) == 32
    assert (tmp_path / masks.KEY_NAME).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("clients", "dropouts", "colluders", "right"),
    [(3, 0, 1, True), (3, 1, 1, False), (4, 1, 1, True), (10, 4, 1, True), (10, 5, 1, False), (10, 3, 4, False)],
)
def test_sums_that_could_be_opened_twice_are_refused(clients, dropouts, colluders, right):
    changes = {"clients": clients, "dropouts": dropouts, "colluders": colluders}
    if right:
        assert spec(**changes).honest >= 1
    else:
        with pytest.raises(FederatedError, match=r"two different sums of the same vectors opened|none is left"):
            spec(**changes)


@pytest.mark.parametrize("changes", [{"local_steps": 2}, {"model": "silo_local"}, {"model": "trusted_server"}])
def test_one_gradient_release_in_a_secure_sum(changes):
    with pytest.raises(FederatedError, match=r"one gradient release|is of secagg"):
        spec(**changes)


def test_notes_are_the_same_when_asked_again_and_only_then(tmp_path):
    network = Network(tmp_path)
    network.sum()
    session = network.sessions["ada"]
    shared = session.note(Summing(session=session.session, phase="share"))
    assert shared == session.note(Summing(session=session.session, phase="share"))
    assert isinstance(shared, Note)
    with pytest.raises(SecureSumError, match="asked something else in phase 'agree'"):
        session.note(Summing(session=session.session, phase="agree", notes={"bea": "00"}))
