"""Adapters: merged as factors, made of full models, and written."""
