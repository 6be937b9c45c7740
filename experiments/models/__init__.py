"""Encoders and heads, linear models, and what an ablation changes."""
