"""This package evaluates trained models: it computes metrics with confidence intervals, compares the answers of models,
and scores answers with an LLM as a judge."""
