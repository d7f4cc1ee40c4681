"""The log: shards that own a partition each, and the transactions in which they book.

Knows Kafka and Faust. Knows of money only what passes through `billing.ledger.apply`.
"""
