"""What a cache policy may need of the layers beyond fresh K and V: a mechanism each."""
