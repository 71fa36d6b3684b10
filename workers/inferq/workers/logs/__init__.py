"""Log lines: what they tell in fields, their JSON form, and how many of a kind there may be."""
