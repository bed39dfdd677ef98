"""Which units go: budgets, the costs of widths, and the choice between units."""
