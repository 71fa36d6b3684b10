"""What runs models: the Celery worker, its data plane, batching, engines, model repository, CLI."""
