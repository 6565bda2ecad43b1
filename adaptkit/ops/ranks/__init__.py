"""Choose ranks: options, policies and the knapsack behind them."""
