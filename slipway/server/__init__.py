"""An OpenAI-compatible server: HTTP in one process, an engine in another; decides nothing that the engine decides."""
