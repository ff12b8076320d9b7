"""The RAG system: retriever, generator, knowledge store and prompt."""
