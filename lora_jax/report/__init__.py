"""The page about one or several runs: what is read of a run's folder, the figures, and the HTML around them."""
