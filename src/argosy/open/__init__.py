"""Open what a user names, by path or by name: the only place where names of models become files."""
