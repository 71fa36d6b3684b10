"""What can be asked of Redis without a worker: depths and dead letters."""
