"""Code shared by commands: options, output, settings, and the servers they talk to."""
