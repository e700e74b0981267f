"""Federations on Flower: its transport, deployment and simulation around the engine-free core.

Nothing of Flower's own differential privacy or strategies is used; see docs/federated.md for why.
"""
