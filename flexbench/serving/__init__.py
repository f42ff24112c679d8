"""Load on a serving endpoint: throughput-latency curves, and where it saturates."""
