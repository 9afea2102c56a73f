"""What a model is trained for: a task is pure functions over the same parameter tree."""
