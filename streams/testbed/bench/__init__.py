"""The benchmark: what worker processes do on this machine, beside a real Kafka.

Run it as `make bench`. Workers are child processes; everything is measured from outside them:
their committed offsets, their CPU time and memory as the kernel counts them, and their committed
entries.
"""
