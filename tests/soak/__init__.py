"""`make soak`: nothing grows under steady load."""
