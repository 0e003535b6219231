"""From a request to its answer, in the form common to all dialects."""
