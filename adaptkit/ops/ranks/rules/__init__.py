"""Rank rules, a file each: the policy and its option.

`Rank`, `Energy` and the three `Sv…` rules decide module by module. `Error` and `Size` look at the
whole adapter, as multiple-choice knapsacks: see `adaptkit.ops.ranks.knapsack`.
"""
