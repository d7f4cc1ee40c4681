"""The wire: every topic, record and header that other programs meet.

Knows nothing of balances and nothing of Kafka clients. Programs in other languages read the
generated JSON Schemas beside this package.
"""
