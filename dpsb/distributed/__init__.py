"""Several processes, one run: rank 0 leads, the others compute.

The leader alone holds the ledger, the randomness, the optimizer and the noise; it charges a step, draws it, and tells
the others theta and the draw. Every process sums the clipped rows of its part, the leader receives the sum of sums and
releases it exactly as it would alone. Nothing that a privacy reviewer has to read is different: ``Mechanism.release``
is still the only way out, and a process that dies takes the step with it, charged and not released.

``team`` talks, ``work`` divides a draw, ``lead`` and ``follow`` are the two sides of a run, ``sharding`` cuts the
frozen base over the processes.
"""
