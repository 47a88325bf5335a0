"""What may be said: options of servers and requests, and their types."""
