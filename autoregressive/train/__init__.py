"""Floor 3: extracting codes and training the GPT."""
