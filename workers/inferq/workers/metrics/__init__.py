"""How others read what a worker counts: from Redis, and by Prometheus."""
