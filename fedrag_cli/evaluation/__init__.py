"""Metrics, intervals and the evaluation of a RAG system."""
