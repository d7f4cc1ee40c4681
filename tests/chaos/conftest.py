"""What these tests share with those of tests/broker."""

from tests.broker.conftest import installation, own_broker, workers

__all__ = ["installation", "own_broker", "workers"]
