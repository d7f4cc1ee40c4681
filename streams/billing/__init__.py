"""The core: what usage costs, how money moves, when more of it is asked for.

Pure: no clock, no I/O, no randomness, no framework. Everything enters through `ledger.apply`.
"""
