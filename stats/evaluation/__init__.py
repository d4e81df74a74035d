"""Evaluation tasks: what a merged model is scored on, in memory. docs/evaluation.md is the user's page."""
