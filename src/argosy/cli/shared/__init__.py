"""What commands share: options, output, settings, servers that they talk to."""
