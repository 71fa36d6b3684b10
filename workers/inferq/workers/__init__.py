"""What serves models: Celery worker, data plane, batching, engines, model repository, CLI."""
