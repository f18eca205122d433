"""Published systems, one module each. Each module says which optional packages it needs."""
