"""Other ways to share out a budget, to compare with."""
