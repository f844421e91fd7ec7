"""Reports of runs: tables, statistics, Markdown, CSV and figures."""
