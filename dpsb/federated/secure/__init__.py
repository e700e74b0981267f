"""Sums that nobody sees the parts of: whole numbers, Skellam noise in shares, masks from a stream cipher. Experimental.

Engine-free like the core: four short messages beside the masked vector go through the same transport. Flower's own
SecAgg+ is not used: its masks come from a generator that is seeded with 32 bits, its public keys are not authenticated,
and its clients unmask for whatever lists a server sends. Of it, only the secret sharing is taken.
"""
