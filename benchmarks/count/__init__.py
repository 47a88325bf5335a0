"""What a step asks of the device outside the layers, counted without one."""
