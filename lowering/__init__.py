"""What each `effpass::` operator means, how a GPU does it, and where a program goes."""
