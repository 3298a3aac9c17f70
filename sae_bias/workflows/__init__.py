"""Whole jobs: sweep, compare, behavior, study, replication, verify, plan."""
