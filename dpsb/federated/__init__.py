"""Federated training of R: silos with their own data and ledgers, a coordinator that averages what they release.

Engine-free: nothing here opens a connection. A :class:`~dpsb.federated.silo.Silo` turns one message into one reply,
a :class:`~dpsb.federated.coordinator.Coordinator` runs the rounds over any
:class:`~dpsb.federated.messages.Transport`; :mod:`dpsb.federated.local` is the one within a process.
"""
