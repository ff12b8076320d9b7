"""Trainers of retriever and generator."""
