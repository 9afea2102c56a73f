"""Evaluation of trained models: metrics with confidence intervals, comparison of answers, LLM as a judge."""
