"""The demo's page: what `app.py` shows in a browser."""
