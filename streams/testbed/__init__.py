"""The testbed: a real broker, load, a simulated payment service, and an independent auditor."""
