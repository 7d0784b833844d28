"""The GPT over image tokens: models, training and sampling."""
