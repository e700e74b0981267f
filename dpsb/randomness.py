"""Where sampling and noise get their random numbers.

Two sources with one interface. :class:`SystemRandomness` is keyed by the operating system and never repeats;
:class:`SeededRandomness` repeats on purpose, for tests, and marks every run that used it (``tainted`` is true, the
ledger records it, and the report of such a run makes no claim). Neither looks at torch's, NumPy's or Python's global
generators, and neither can be saved: a stored generator state would let a reader of the file subtract the noise.
"""

from __future__ import annotations

import hashlib
import os
import threading
from typing import NoReturn

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

SEEDED = ("seeded_randomness", "noise and sampling came from a seed, so they can be re-created")
"""Name and reason of the taint in the ledger of a run that a :class:`SeededRandomness` drew for."""

_BLOCK_BYTES = 1 << 20
_TWO_POW_MINUS_64 = 2.0**-64


class _ChaCha20Stream:
    """The key stream of ChaCha20 with fast key erasure: every read ends by replacing the key.

    What is in memory at one moment therefore reveals nothing of the noise drawn before it, and no key is ever used
    for more than one read, so the block counter cannot wrap.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._lock = threading.Lock()

    def read(self, size: int) -> bytes:
        with self._lock:  # two threads must not read under one key
            encryptor = Cipher(algorithms.ChaCha20(self._key, bytes(16)), mode=None).encryptor()
            self._key = encryptor.update(bytes(32))
        blocks = (min(_BLOCK_BYTES, size - start) for start in range(0, size, _BLOCK_BYTES))
        return b"".join(encryptor.update(bytes(length)) for length in blocks)


class Randomness:
    """Uniform words and standard normals from a ChaCha20 key stream.

    Use :class:`SystemRandomness`; :class:`SeededRandomness` is for tests.

    Guarantees:
      * A process that was forked from this one never continues this one's stream: the source notices and re-keys
        (system) or refuses (seeded).
      * Threads that share a source draw different words.
      * Pickling and copying are refused.
    """

    tainted: bool

    def __init__(self, key: bytes) -> None:
        self._stream = _ChaCha20Stream(key)
        self._process = os.getpid()

    def _after_fork(self) -> None:
        raise NotImplementedError

    def words(self, count: int) -> np.ndarray:
        """``count`` independent uniform 64-bit words, shape ``(count,)``, uint64."""
        if os.getpid() != self._process:
            self._after_fork()
        return np.frombuffer(self._stream.read(8 * count), dtype="<u8")

    def bernoulli(self, count: int, probability: float) -> np.ndarray:
        """``count`` independent coins, shape ``(count,)``, bool.

        A coin is true when a uniform 64-bit word is below ``floor(probability * 2**64)``, so its probability never
        exceeds ``probability`` and falls short of it by less than ``2**-64``.

        Raises:
          ValueError: If ``probability`` is not in [0, 1].
        """
        if not 0.0 <= probability <= 1.0:
            raise ValueError(f"Expected probability={probability!r} in [0, 1].")
        if probability == 1.0:
            return np.ones(count, dtype=bool)
        numerator, denominator = probability.as_integer_ratio()
        return self.words(count) < np.uint64((numerator << 64) // denominator)

    def normal(self, count: int) -> torch.Tensor:
        """``count`` independent standard normals, shape ``(count,)``, float64.

        Box-Muller on 64-bit uniforms in (0, 1]; the largest value that can occur is about 9.5, an event of
        probability ``2**-65`` under the true normal law.
        """
        pairs = (count + 1) // 2
        uniform = (self.words(2 * pairs).astype(np.float64) + 0.5) * _TWO_POW_MINUS_64
        radius = np.sqrt(-2.0 * np.log(uniform[:pairs]))
        angle = 2.0 * np.pi * uniform[pairs:]
        normals = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        return torch.from_numpy(normals[:count])

    def __reduce__(self) -> NoReturn:
        raise TypeError("A source of randomness cannot be pickled or copied: a saved state would reveal the noise.")


class SystemRandomness(Randomness):
    """The only source for private runs: ChaCha20 under a key from ``os.urandom`` that is never shown or stored."""

    tainted = False

    def __init__(self) -> None:
        super().__init__(os.urandom(32))

    def _after_fork(self) -> None:
        super().__init__(os.urandom(32))


class SeededRandomness(Randomness):
    """A repeatable source for tests. Whoever knows the seed can subtract the noise: such a run claims nothing."""

    tainted = True

    def __init__(self, seed: int) -> None:
        super().__init__(hashlib.sha256(f"dpsb test randomness {seed}".encode()).digest())

    def _after_fork(self) -> None:
        raise RuntimeError("SeededRandomness was carried into a forked process; make a new one there.")
