r"""Noise amplification in closed form: what the same privacy costs in noise on the weights, method by method.

A private step releases a vector with independent Gaussian noise of standard deviation :math:`\tau` on every entry.
Which vector that is decides how much noise reaches the weight W (out m, in n) that the model multiplies with.
Write :math:`|X|` for the Frobenius norm and N for a matrix of independent :math:`N(0, \tau^2)` entries. Three facts
carry everything:

* :math:`E|X N Y|^2 = \tau^2 |X|^2 |Y|^2`, because entry (i, j) of XNY is a sum over (k, l) of independent terms of
  variance :math:`\tau^2 X_{ik}^2 Y_{lj}^2`; with X or Y the identity of size k its squared norm is k;
* :math:`E|N_B N_A|^2 = \tau^4 m n r` for independent N_B (m, r) and N_A (r, n): each of the m n entries is a sum of r
  products of variance :math:`\tau^4`;
* the terms :math:`B N_A`, :math:`N_B A` and :math:`N_B N_A` have mean 0 and are pairwise uncorrelated, so their
  energies add.

Hence, per weight and with one releasing party (rank r, factors B (m, r) and A (r, n)):

==============  ===========================  ====================================================================
method          noise on W                   expected energy
==============  ===========================  ====================================================================
r_only          B N A, orthonormal B and A   :math:`r^2 \tau^2`: the noise of the released vector, not amplified
ffa_lora        N_B A                        :math:`m |A|^2 \tau^2`
lora            B N_A + N_B A + N_B N_A      :math:`(n |B|^2 + m |A|^2) \tau^2 + m n r \tau^4`
full_matrix     N                            :math:`m n \tau^2`
==============  ===========================  ====================================================================

In a federation each of c clients releases its own vector with independent noise, and the server averages:

* `fed_sb` (R-only), `ffa_lora` and `fedsvd` average what is linear in the noise: the energy above divided by c.
  FedSVD turns the averaged product into an orthonormal A by an exact factorization, so :math:`|A|^2 = r`.
* `fedit` averages A and B apart. The averages carry noise of variance :math:`\tau^2/c`, so with the means
  :math:`\bar B, \bar A` the energy is :math:`\frac{\tau^2}{c}(n|\bar B|^2 + m|\bar A|^2) + \frac{\tau^4}{c^2} m n r`.
* `fedex_lora` and `flora` average the products exactly: :math:`\frac1c \sum_i (B_i N_{A,i} + N_{B,i} A_i + N_{B,i}
  N_{A,i})`, whose summands are independent over i, so
  :math:`\frac{\tau^2}{c}(n\,\mathrm{mean}|B_i|^2 + m\,\mathrm{mean}|A_i|^2) + \frac{\tau^4}{c} m n r`: exactness
  keeps c times FedIT's product term.

Equal noise multiplier, sampling and steps mean equal epsilon. **Equal clip norm is not equal information**: a
projected gradient is shorter than the whole one, so R-only may take a smaller clip norm, and what share of the
gradient's mean survives the projection has to be measured, not computed. This module says what the noise does, not
what the model learns.

References:
    Singhal et al. (2025), arXiv:2502.15436 (Fed-SB); Sun et al. (2024), arXiv:2403.12313 (FFA-LoRA); Singhal et al.
    (2024), arXiv:2410.09432 (FedEx-LoRA); Wang et al. (2024), arXiv:2409.05976 (FLoRA); Lee et al. (2025),
    arXiv:2505.12805 (FedSVD); Zhang et al. (2024), arXiv:2305.05644 (FedIT).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dpsb_accounting import _checks
from dpsb_accounting.plan import Plan
from dpsb_accounting.shapes import Layer, layers_from_json

CENTRAL = ("r_only", "ffa_lora", "lora", "full_matrix")
FEDERATED = ("fed_sb", "ffa_lora", "fedsvd", "fedit", "fedex_lora", "flora")
METHODS = tuple(dict.fromkeys(CENTRAL + FEDERATED))
BYTES_PER_NUMBER = 4  # every method is counted in float32
_LINEAR_ONLY = {"r_only", "fed_sb", "ffa_lora", "fedsvd", "full_matrix"}


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerNoise:
    """The expected noise energy of one method on the weights of one `Layer`, all `count` of them together.

    Args:
        layer: The layer.
        linear: Energy of the terms linear in the noise.
        product: Energy of the product of two noises, which only methods that train both factors have.
        dimension: How many numbers are released, and so noised, for these weights.
        received: How many numbers the server sends each client back for them; 0 in a central run.
    """

    layer: Layer
    linear: float
    product: float
    dimension: int
    received: int

    @property
    def energy(self) -> float:
        """Expected squared Frobenius norm of the noise on these weights."""
        return self.linear + self.product


@dataclass(frozen=True, kw_only=True, slots=True)
class Amplification:
    """What the noise of one method does to all the target weights.

    Args:
        method: One of `METHODS`.
        noise_std: Standard deviation of the noise on each released entry, per client.
        clients: How many clients are averaged; 1 for a central run.
        layers: Per layer, in the order given.
    """

    method: str
    noise_std: float
    clients: int
    layers: tuple[LayerNoise, ...]

    @property
    def energy(self) -> float:
        """Expected squared Frobenius norm of the noise on all target weights."""
        return math.fsum(layer.energy for layer in self.layers)

    @property
    def product(self) -> float:
        """The part of `energy` that is quadratic in the noise variance."""
        return math.fsum(layer.product for layer in self.layers)

    @property
    def norm(self) -> float:
        """Root of `energy`: the typical length of the noise, in the unit of the clip norm."""
        return math.sqrt(self.energy)

    @property
    def dimension(self) -> int:
        """How many numbers each party releases for the target weights; a head is the same for every method."""
        return sum(layer.dimension for layer in self.layers)

    @property
    def bytes_released(self) -> int:
        """`dimension` in float32: what a client sends up, per release."""
        return BYTES_PER_NUMBER * self.dimension

    @property
    def bytes_received(self) -> int:
        """What the server sends each client back per release, in float32; 0 in a central run."""
        return BYTES_PER_NUMBER * sum(layer.received for layer in self.layers)

    @property
    def r_only_energy(self) -> float:
        """The energy of R-only at the same noise, layers, rank and number of clients."""
        return math.fsum(_r_only(entry.layer) * self.noise_std**2 / self.clients for entry in self.layers)

    @property
    def ratio_to_r_only(self) -> float:
        """How many times the noise energy of R-only this is."""
        return self.energy / self.r_only_energy

    def to_json(self) -> dict[str, object]:
        """Returns the numbers as a JSON object."""
        return {
            "method": self.method,
            "clients": self.clients,
            "noise_std": self.noise_std,
            "energy": self.energy,
            "product_energy": self.product,
            "norm": self.norm,
            "ratio_to_r_only": self.ratio_to_r_only,
            "dimension": self.dimension,
            "bytes_released": self.bytes_released,
            "bytes_received": self.bytes_received,
        }


def amplification(method: str, layers: Sequence[Layer], *, noise_std: float, clients: int = 1) -> Amplification:
    r"""Returns the expected energy of one method's noise on the target weights.

    The formulas are derived in the docstring of this module.

    Args:
        method: One of `METHODS`.
        layers: The target weights, at least one.
        noise_std: :math:`\tau > 0`, on each released entry, each client's own. Public.
        clients: c, how many equal clients are averaged; 1 for a central run. "lora" and "full_matrix" are central.

    Raises:
        ValueError: If an argument is out of range or the method does not exist.

    Example:
        >>> layer = Layer(out_features=768, in_features=768, rank=16)
        >>> amplification("r_only", [layer], noise_std=1).energy
        256.0
        >>> amplification("ffa_lora", [layer], noise_std=1).ratio_to_r_only
        48.0
    """
    _checks.one_of(choices=METHODS, method=method)
    noise_std = _checks.positive(noise_std=noise_std)
    clients = _checks.whole(at_least=1, clients=clients)
    if clients > 1 and method not in FEDERATED:
        raise ValueError(f"method {method!r} has no federated average, so clients must be 1, not {clients!r}")
    if not layers:
        raise ValueError("layers must hold at least one layer")
    return Amplification(
        method=method,
        noise_std=noise_std,
        clients=clients,
        layers=tuple(_layer_noise(method, layer, noise_std**2, clients) for layer in layers),
    )


def compare(
    layers: Sequence[Layer],
    *,
    noise_multiplier: float,
    l2_clip_norm: float,
    expected_batch_size: float = 1.0,
    steps: int = 1,
    learning_rate: float = 1.0,
    clients: int = 1,
) -> tuple[Amplification, ...]:
    r"""Compares the methods at equal epsilon: equal noise multiplier and clip norm, sampling and steps alike.

    Every method releases the mean gradient with noise :math:`\sigma C / b` per entry. For `steps` steps of plain SGD
    the noise in the parameters is a sum of `steps` independent draws, so its standard deviation is
    :math:`\tau = \eta \sqrt{T} \sigma C / b` and the same formulas hold for what the noise alone does to W, starting
    from the layers' factors: the linear terms grow with T, the product term with :math:`T^2`. (The factors' own
    movement by gradients is not in it.)

    Args:
        layers: The target weights.
        noise_multiplier: :math:`\sigma`, noise standard deviation divided by C. Public.
        l2_clip_norm: C. Public.
        expected_batch_size: b, the public divisor of the noisy sum. Public.
        steps: T, between two averages in a federation. Public.
        learning_rate: :math:`\eta` of plain SGD; 1 gives the noise on the gradient itself.
        clients: 1 compares `CENTRAL`, more compare `FEDERATED`.

    Returns:
        One `Amplification` per method; R-only first.

    Example:
        >>> layer = Layer(out_features=768, in_features=768, rank=32, count=24)
        >>> rows = compare([layer], noise_multiplier=1, l2_clip_norm=1, expected_batch_size=1024)
        >>> [(row.method, round(row.ratio_to_r_only, 1)) for row in rows]
        [('r_only', 1.0), ('ffa_lora', 24.0), ('lora', 48.0), ('full_matrix', 576.0)]
    """
    noise_multiplier = _checks.positive(noise_multiplier=noise_multiplier)
    l2_clip_norm = _checks.positive(l2_clip_norm=l2_clip_norm)
    expected_batch_size = _checks.positive(expected_batch_size=expected_batch_size)
    learning_rate = _checks.positive(learning_rate=learning_rate)
    steps = _checks.whole(at_least=1, steps=steps)
    clients = _checks.whole(at_least=1, clients=clients)
    noise_std = learning_rate * math.sqrt(steps) * noise_multiplier * l2_clip_norm / expected_batch_size
    methods = CENTRAL if clients == 1 else FEDERATED
    return tuple(amplification(method, layers, noise_std=noise_std, clients=clients) for method in methods)


def comparison_for(plan: Plan) -> tuple[Amplification, ...]:
    """Returns the comparison for one step of the run that a plan describes, or nothing if its shapes are not known.

    The plan's details must hold `rank` and `target_shapes`: objects with `out_features`, `in_features` and `count`.

    Args:
        plan: The plan of a private run.

    Returns:
        One `Amplification` per central method, all with the plan's noise multiplier, clip norm and expected batch
        size, and orthonormal factors; empty if the plan is not private or tells no shapes that can be read. Public.
    """
    try:
        layers = layers_from_json(plan.details.get("target_shapes"), plan.details.get("rank"))
    except (TypeError, ValueError):
        return ()
    if not layers or not plan.noise_multiplier:
        return ()
    return compare(
        layers,
        noise_multiplier=plan.noise_multiplier,
        l2_clip_norm=plan.l2_clip_norm,
        expected_batch_size=plan.expected_batch_size,
    )


def _r_only(layer: Layer) -> int:
    """Energy of R-only in units of the noise variance: |B|^2 |A|^2 = r^2 for orthonormal factors."""
    return layer.count * layer.rank**2


def _layer_noise(method: str, layer: Layer, variance: float, clients: int) -> LayerNoise:
    m, n, r = layer.out_features, layer.in_features, layer.rank
    norms = (layer.norm_a, layer.norm_b, layer.norm_of_mean_a, layer.norm_of_mean_b)
    a, b, mean_a, mean_b = (float(norm or 0.0) ** 2 for norm in norms)
    linear, dimension = {
        "r_only": (float(r * r), r * r),
        "fed_sb": (float(r * r), r * r),
        "ffa_lora": (m * a, m * r),
        "fedsvd": (float(m * r), m * r),
        "full_matrix": (float(m * n), m * n),
        "lora": (n * b + m * a, r * (m + n)),
        "fedit": (n * mean_b + m * mean_a, r * (m + n)),
        "fedex_lora": (n * b + m * a, r * (m + n)),
        "flora": (n * b + m * a, r * (m + n)),
    }[method]
    product = 0.0 if method in _LINEAR_ONLY else m * n * r * variance**2 / clients
    if method == "fedit":
        product /= clients
    return LayerNoise(
        layer=layer,
        linear=layer.count * linear * variance / clients,
        product=layer.count * product,
        dimension=layer.count * dimension,
        received=layer.count * _received(method, layer, clients),
    )


def _received(method: str, layer: Layer, clients: int) -> int:
    """How many numbers a client gets back for one weight.

    FedSVD sends the new A beside B. FedEx-LoRA adds to the averages what they miss of the averaged product, a matrix
    of rank (c-1) r at most, whichever form of it is smaller; FLoRA sends all clients' factors.
    """
    if clients == 1:
        return 0
    m, n, r = layer.out_features, layer.in_features, layer.rank
    both = r * (m + n)
    return {
        "fed_sb": r * r,
        "ffa_lora": m * r,
        "fedsvd": both,
        "fedit": both,
        "fedex_lora": both + min(m * n, (clients - 1) * both),
        "flora": clients * both,
    }[method]
