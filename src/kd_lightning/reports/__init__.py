"""Runs become tables, statistics, Markdown, CSV and pictures."""
