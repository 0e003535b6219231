"""What a user opens, by path or by name: the one place where names of models become files."""
