"""Measuring methods: tasks, baselines, meters, a store that survives a kill, and timings."""
