"""Does it beat the optimizer that you have?  Equal budgets, seeds that tuned nothing, refusals where noise rules."""
