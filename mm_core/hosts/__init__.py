"""Where the adapter runs: a file for each model family in each library that hosts it (docs/architecture.md)."""
