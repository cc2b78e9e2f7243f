"""`ExL2Embeddings`: this package's embedder as LangChain embeddings."""
