"""Running a model: reading prompts of any length, sampling, streaming text and chatting, all in constant memory."""
