"""What anybody may ask of Redis, without a worker: depths and dead letters."""
