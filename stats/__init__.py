"""What is measured: statistics of models and of their differences."""
