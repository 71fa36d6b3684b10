"""What a worker counts, how others read it, and how Prometheus does."""
