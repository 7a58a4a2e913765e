"""Counterfactual studies: base runs, rankings, arms, and the one command that runs them."""
