"""What both sides of the queue know: names, wire format, signatures, errors, settings."""
