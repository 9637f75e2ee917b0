"""The HTML page about one or several runs: reading their folders, figures, and HTML."""
