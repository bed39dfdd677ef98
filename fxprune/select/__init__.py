"""Selection of the units to remove: budgets, costs of widths, and the choice between units."""
