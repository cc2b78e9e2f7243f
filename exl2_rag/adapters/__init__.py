"""Translation between this engine and the frameworks. Each framework is imported only in its own folder."""
