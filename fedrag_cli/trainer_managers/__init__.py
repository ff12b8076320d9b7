"""Which trainer runs when: retriever, generator, or both in turn."""
