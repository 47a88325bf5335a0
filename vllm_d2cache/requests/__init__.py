"""What a request asks, and whether it can be had."""
