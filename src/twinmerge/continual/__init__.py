"""Experts over time: one state of constant size that takes experts in, and gives the merged model of now."""
