"""What runs a compiled program: needs numpy and one backend, never torch (the torch backend apart)."""
