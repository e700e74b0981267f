"""What R-only training is compared with, on the same sampler, clip, noise, ledger and report.

A baseline is an :class:`dpsb.Adapter` without cores: what it trains are modules for which Opacus has an exact
per-example rule. One file says which methods there are, one puts them on a model, one writes their results.
"""
