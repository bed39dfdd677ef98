"""The result of pruning: the smaller model, its plan and its report, and how they are saved."""
