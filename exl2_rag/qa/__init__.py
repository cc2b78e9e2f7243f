"""Questions about documents, answered with verified quotes. The only place that knows both `llm` and `retrieval`."""
