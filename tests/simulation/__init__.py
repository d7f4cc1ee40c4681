"""The shard's protocol against a model of Kafka's log: one seed, one schedule, one verdict."""
