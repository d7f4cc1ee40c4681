"""Faust agents: where the source topics are consumed."""
