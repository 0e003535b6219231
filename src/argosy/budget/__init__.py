"""One memory budget: what a model takes, the plan, what is lent and what is shared."""
