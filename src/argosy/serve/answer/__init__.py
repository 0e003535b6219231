"""From a request to its answer, in terms common to all dialects."""
