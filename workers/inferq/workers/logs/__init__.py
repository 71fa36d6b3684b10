"""Log lines: their fields, their JSON form, and limits against floods."""
