"""An HTTP server for one model that speaks OpenAI's protocol: completions, chat, contexts, metrics."""
