"""Several machines run the experts of one model: workers, and the coordinator's expert runner."""
