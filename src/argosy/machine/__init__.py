"""What this machine allows one process, and what it does: limits, tuning, probes, energy."""
