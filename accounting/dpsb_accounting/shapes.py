"""The shapes of the weights that an adapter is added to, and the sizes of a competing method's factors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dpsb_accounting import _checks

_MOST = 10**9  # of a size or count; far above any model, and products of them still fit into floats


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    r"""The shape of `count` equal target weights, and how large the LoRA factors of a competing method are.

    Where a norm is not given, the factor is taken as orthonormal, norm :math:`\sqrt r`: the frozen factors of R-only
    always are, and for the others it is the comparison in which only the parametrisation differs.

    Args:
        out_features: m, rows of W. Public.
        in_features: n, columns of W. Public.
        rank: r, at most min(m, n). Public.
        count: How many weights have this shape.
        norm_a: Frobenius norm of A; over several clients the root of the mean of :math:`|A_i|^2`.
        norm_b: Frobenius norm of B; likewise.
        norm_of_mean_a: Frobenius norm of the clients' average of A, at most `norm_a`; left out it is `norm_a`.
        norm_of_mean_b: Frobenius norm of the clients' average of B, at most `norm_b`; left out it is `norm_b`.

    Example:
        >>> Layer(out_features=768, in_features=768, rank=16).norm_a
        4.0
    """

    out_features: int
    in_features: int
    rank: int
    count: int = 1
    norm_a: float | None = None
    norm_b: float | None = None
    norm_of_mean_a: float | None = None
    norm_of_mean_b: float | None = None

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "out_features", _checks.whole(at_least=1, out_features=self.out_features))
        put(self, "in_features", _checks.whole(at_least=1, in_features=self.in_features))
        put(self, "rank", _checks.whole(at_least=1, rank=self.rank))
        put(self, "count", _checks.whole(at_least=1, count=self.count))
        for name in ("out_features", "in_features", "count"):
            if getattr(self, name) > _MOST:
                raise ValueError(f"{name} must be at most {_MOST}, not {getattr(self, name)!r}")
        if self.rank > min(self.out_features, self.in_features):
            raise ValueError(
                f"rank must be at most {min(self.out_features, self.in_features)}, the smaller side of a weight of "
                f"{self.out_features}x{self.in_features}, not {self.rank!r}"
            )
        for name in ("norm_a", "norm_b"):
            value = getattr(self, name)
            value = math.sqrt(self.rank) if value is None else _checks.nonnegative(**{name: value})
            put(self, name, value)
            mean = getattr(self, f"norm_of_mean_{name[-1]}")
            mean = value if mean is None else _checks.nonnegative(**{f"norm_of_mean_{name[-1]}": mean})
            if mean > value * (1 + 1e-9):
                raise ValueError(
                    f"norm_of_mean_{name[-1]}={mean!r} must not exceed {name}={value!r}: an average is never longer "
                    "than the root mean square of what is averaged"
                )
            put(self, f"norm_of_mean_{name[-1]}", mean)

    @staticmethod
    def at_peft_start(out_features: int, in_features: int, rank: int, count: int = 1) -> Layer:
        r"""Returns the layer as PEFT starts LoRA: B = 0 and A Kaiming-uniform, :math:`E|A|^2 = r/3`."""
        norm_a = math.sqrt(rank / 3)
        return Layer(
            out_features=out_features, in_features=in_features, rank=rank, count=count, norm_a=norm_a, norm_b=0.0
        )


def layers_from_json(data: object, rank: object = None) -> tuple[Layer, ...]:
    """Returns the layers that a JSON array of objects states; nothing for None.

    Args:
        data: An array of objects with the fields of `Layer`; unknown ones are refused.
        rank: The rank of entries that name none.

    Raises:
        ValueError: If an entry is not a layer; the message says which and why.
    """
    if data is None:
        return ()
    if not isinstance(data, Sequence) or isinstance(data, (str, bytes)):
        raise ValueError(f"layers must be a JSON array, not {data!r}")
    return tuple(_layer_from_json(entry, rank) for entry in data)


def _layer_from_json(entry: object, rank: object) -> Layer:
    if not isinstance(entry, Mapping):
        raise ValueError(f"a layer must be a JSON object, not {entry!r}")
    known = set(Layer.__dataclass_fields__)
    unknown = sorted(str(name) for name in entry if name not in known)
    if unknown:
        raise ValueError(f"a layer has unknown fields: {', '.join(map(repr, unknown))}")
    fields = {"rank": rank, **entry} if rank is not None else dict(entry)
    missing = sorted({"out_features", "in_features", "rank"} - set(fields))
    if missing:
        raise ValueError(f"a layer lacks fields: {', '.join(map(repr, missing))}")
    return Layer(**fields)
