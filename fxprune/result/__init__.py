"""What a pruning gives: plans, reports, and how they are saved."""
