"""The worker's process and its host: background threads, child processes, memory, private files."""
