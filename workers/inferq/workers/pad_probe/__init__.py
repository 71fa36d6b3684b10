"""What a model makes of padding is found out once it is loaded: what to cut, and whether to pad."""
