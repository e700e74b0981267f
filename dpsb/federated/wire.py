"""Messages as bytes: some 200 to 300 of framing, then the raw numbers. No names or shapes, which both sides know."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from dpsb.federated.checks import FederatedError, check_whole, checked_fields
from dpsb.federated.messages import REFUSALS, SUM, Note, Receipt, Refusal, RoundMessage, State, Summing, Update
from dpsb.federated.paid_layout import GRADIENT
from dpsb.federated.spec import RoundSpec

_MAGIC = b"dpsbfed2"
_MOST_META = 1 << 16
_Message = TypeVar("_Message", RoundMessage, Update, Refusal)


def _usual() -> bytes:
    """What most framings look like. Both sides know it and compress against it, so that names take next to nothing."""
    run, none = "0" * 32, "0" * 64
    spec = RoundSpec(
        run_id=run, round=0, rounds=1, theta_sha256=none, basis_sha256=none, sampling_prob=0.1, noise_multiplier=1.0
    ).to_json()
    receipt = Receipt(ledger_id=run, length=1, head=none, round=0).to_json()
    update = {"silo": "", "run_id": run, "round": 0, "theta_sha256": none, "follows": none, "receipt": receipt}
    return _compact({"update": update}) + _compact({"round": {"silo": "", "spec": spec, "receipt": receipt}})


def _compact(content: object) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


USUAL = _usual()
"""The dictionary of framings."""


class WireError(FederatedError):
    """Bytes that are no message, or not one for this adapter."""


def pack(message: RoundMessage | Update | Note | Refusal) -> bytes:
    """The message as bytes: magic, length of the framing, zlib-compressed JSON, and the numbers in order of the names.

    What an :class:`Update` holds in a summed model is sensitive, and so are its bytes.
    """
    if isinstance(message, RoundMessage):
        receipt = None if message.receipt is None else message.receipt.to_json()
        meta: dict[str, Any] = {"round": {"silo": message.silo, "spec": message.spec.to_json(), "receipt": receipt}}
        if message.summing is not None:
            meta["round"]["summing"] = {**vars(message.summing), "notes": dict(message.summing.notes)}
        tensors: State = message.theta
    elif isinstance(message, Update):
        fields = ("silo", "run_id", "round", "theta_sha256", "follows")
        meta = {"update": {**{name: getattr(message, name) for name in fields}, "receipt": message.receipt.to_json()}}
        if message.notes:
            meta["update"]["notes"] = dict(message.notes)
        tensors = message.tensors
    elif isinstance(message, Note):
        meta, tensors = {"note": {**vars(message), "notes": dict(message.notes)}}, {}
    else:
        meta, tensors = {"refusal": dict(vars(message))}, {}
    if isinstance(message, RoundMessage) and message.basis:
        meta["basis"] = _shapes(message.basis)
    if any(name.startswith(GRADIENT) for name in tensors):
        meta["sum"] = _shapes(tensors)
    elif set(tensors) == {SUM}:
        meta["sum"] = "whole" if tensors[SUM].dtype == torch.int32 else "real"
    elif not tensors:
        meta["sum"] = "none"
    deflate = zlib.compressobj(9, zdict=USUAL)
    framing = deflate.compress(_compact(meta)) + deflate.flush()
    parts = [_raw(tensors[name]) for name in sorted(tensors)]
    if isinstance(message, RoundMessage):
        parts += [_raw(message.basis[name]) for name in sorted(message.basis)]
    return b"".join((_MAGIC, len(framing).to_bytes(4, "big"), framing, *parts))


def unpack(content: bytes, like: State) -> RoundMessage | Update | Note | Refusal:
    """The inverse of :func:`pack`.

    Args:
      content: From the other side.
      like: Theta, for names, shapes and types.

    Raises:
      WireError: If the bytes are none of the four, are cut off, or hold another number of numbers.
    """
    meta, raw = _split(content)
    layout, basis = _layout(meta.pop("sum", None), like), _layout(meta.pop("basis", "none"), like)
    try:
        ((kind, fields),) = meta.items()
        if kind in ("refusal", "note"):
            if raw:
                raise WireError(f"A {kind} holds numbers.")
            if kind == "note":
                return Note(**checked_fields(Note, fields, "a note"))
            refusal = Refusal(**checked_fields(Refusal, fields, "a refusal"))
            if refusal.kind not in REFUSALS or not str(refusal.message).isprintable():
                raise WireError("A refusal has no known kind, or a message that a terminal might obey.")
            return _checked(refusal)
        split = sum(tensor.numel() * tensor.element_size() for tensor in layout.values())
        tensors, factors = _tensors(raw[:split], layout), _tensors(raw[split:], basis)
        if kind == "update":
            receipt = Receipt.from_json(fields.pop("receipt"))
            filled = {**fields, "receipt": receipt, "tensors": tensors}
            return _checked(Update(**checked_fields(Update, filled, "an update")))
        if kind == "round":
            spec = RoundSpec.from_json(fields.pop("spec"))
            given, summing = fields.pop("receipt"), fields.pop("summing", None)
            receipt_or_none = None if given is None else Receipt.from_json(given)
            filled = {**fields, "spec": spec, "receipt": receipt_or_none, "theta": tensors, "basis": factors}
            if summing is not None:
                filled["summing"] = Summing(**checked_fields(Summing, summing, "a secure sum"))
            return _checked(RoundMessage(**checked_fields(RoundMessage, filled, "a round's message")))
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise WireError(f"The message has wrong fields ({error}).") from None
    raise WireError(f"A message of kind {kind!r} is not known.")


def _shapes(tensors: State) -> list[list[Any]]:
    return [[name, *tensors[name].shape] for name in sorted(tensors)]


def _layout(kind: object, like: State) -> State:
    """Names, shapes and types of the numbers: theta's, one vector's, none, or matrices that are named."""
    if kind == "none":
        return {}
    if isinstance(kind, list):
        try:
            return {str(name): torch.empty(int(rows), int(columns), device="meta") for name, rows, columns in kind}
        except (TypeError, ValueError, OverflowError, RuntimeError):
            raise WireError("The message names matrices without a shape.") from None
    if kind not in ("whole", "real"):
        return like
    total = sum(tensor.numel() for tensor in like.values())
    return {SUM: torch.empty(total, dtype=torch.int32 if kind == "whole" else torch.float64)}


def _checked(message: _Message) -> _Message:
    """The message, if what names and numbers it are texts that may be shown, and whole numbers."""
    for name in ("silo", "run_id", "theta_sha256", "message", "follows"):
        value = getattr(message, name, "")
        if not (isinstance(value, str) and value.isprintable()) and not (name == "follows" and value is None):
            raise WireError(f"The message's {name} is no text that can be shown.")
    check_whole(0, round=getattr(message, "round", 0))
    return message


def framing_bytes(content: bytes) -> int:
    """How many of a message's bytes are not numbers."""
    return len(_MAGIC) + 4 + int.from_bytes(content[8:12], "big")


def _split(content: bytes) -> tuple[dict[str, Any], bytes]:
    if content[:8] != _MAGIC or len(content) < 12:
        raise WireError("The bytes are no message of a federation.")
    length = int.from_bytes(content[8:12], "big")
    if length > _MOST_META or len(content) < 12 + length:
        raise WireError("The message is cut off.")
    try:
        inflate = zlib.decompressobj(zdict=USUAL)
        meta = json.loads(inflate.decompress(content[12 : 12 + length], _MOST_META))
    except (zlib.error, ValueError, RecursionError):
        raise WireError("The framing of the message cannot be read.") from None
    if not isinstance(meta, dict):
        raise WireError("The framing of the message is no object.")
    return meta, content[12 + length :]


def _raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _tensors(raw: bytes, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    sizes = {name: like[name].numel() * like[name].element_size() for name in sorted(like)}
    if len(raw) != sum(sizes.values()):
        raise WireError(f"The message holds {len(raw)} bytes of numbers, this adapter has {sum(sizes.values())}.")
    found, start = {}, 0
    for name, size in sizes.items():
        empty = torch.empty(0, dtype=like[name].dtype)
        part = torch.frombuffer(bytearray(raw[start : start + size]), dtype=like[name].dtype) if size else empty
        found[name] = part.reshape(like[name].shape)
        start += size
    return {name: found[name] for name in like}
