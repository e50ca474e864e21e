"""The service: an HTTP interface, a durable queue, and workers that run the numerical core in child processes."""
