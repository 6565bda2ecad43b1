"""Rewrite adapters: what convert, resize and combine share."""
