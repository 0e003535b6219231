"""Several machines run the experts of one model: the workers, and the coordinator's expert runner."""
