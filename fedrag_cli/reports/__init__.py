"""What people look at after a run: plots, model card, comparison, HTML report."""
